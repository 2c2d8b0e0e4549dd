"""A trace of a few training steps, to look at where their time goes.

    python -m memjax.train --config=configs/quickstart.py --workdir=runs/x --profile=100:5

traces 5 steps behind the 100th into runs/x/profile. TensorBoard's profile plugin and xprof read the
folder; the file *.trace.json.gz in it opens in ui.perfetto.dev.
"""

import os
import re

import jax

from memjax.errors import UserError


class Trace:
    """Traces steps into `workdir`/profile.

    steps: "START:NUMBER", the finished steps in front of the first one, and how many; "" for none.

    Raises:
      UserError: another text, or no step.
    """

    def __init__(self, steps: str, workdir: str):
        match = re.fullmatch(r"(\d+):([1-9]\d*)", steps)
        if steps and not match:
            raise UserError(
                f"--profile={steps}: expected START:NUMBER, steps to skip and steps to trace, such "
                "as 100:5"
            )
        start, count = map(int, match.groups()) if match else (-1, 0)
        self.borders = (start, start + count)  # finished steps where it begins and where it ends
        self.folder = os.path.join(workdir, "profile")
        self.running = False

    def begins(self, done: int) -> bool:
        """Whether it begins behind `done` finished steps."""
        return done == self.borders[0]

    def ends(self, done: int) -> bool:
        """Whether it ends there."""
        return self.running and done == self.borders[1]

    def switch(self) -> None:
        """Begins the trace, or ends it; whoever calls it has waited for the steps."""
        if self.running:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(self.folder)
        self.running = not self.running

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: object) -> None:
        if self.running:  # the end of the run cuts it short
            self.switch()
