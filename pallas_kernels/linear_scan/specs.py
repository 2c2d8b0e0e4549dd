"""The cases of linear_scan."""

import dataclasses
import math

import numpy as np

from pallas_kernels import walks_specs


class Spec(walks_specs.Spec):
    def inputs(self, seed: int = 0) -> dict:
        """x, g, reset, initial_state and weighted; arrays in numpy."""
        rng = np.random.default_rng(seed)
        x, g = self.arrays(self.numbers(rng), self.logs(rng))
        state = rng.standard_normal((self.B, self.D)).astype(np.float32) if self.state else None
        return {"x": x, "g": g, "initial_state": state, "reset": self.reset()}


ALL = tuple(range(20))
PLAIN = (
    Spec(name="one_block", T=64, tags=("fast",)),
    Spec(name="blocks", B=2, T=600, D=256),
    Spec(name="ragged", B=3, T=41, D=72),
    Spec(name="one_token", B=2, T=1),
    Spec(name="wide", T=40, D=1280),
    Spec(name="no_state", T=40, state=False),
    Spec(name="resets", B=2, T=300, resets=(0, 7, 31, 32, 256, 299), tags=("race",)),
    Spec(name="all_resets", T=20, resets=ALL),
    Spec(name="gate_exactly_1", T=40, gate=0.0),
    Spec(name="gate_slow", T=300, gate=1e-3),
    Spec(name="gate_extreme", T=64, gate=60.0, resets=(9,)),
    Spec(name="gate_infinite", T=64, strong=math.inf),
    Spec(name="bf16", B=2, T=96, dtype="bfloat16", resets=(40,), tags=("fast", "race")),
    Spec(name="bf16_slow", T=300, dtype="bfloat16", gate=1e-3),
    Spec(name="bf16_narrow", T=96, dtype="bfloat16", narrow=True),
)
SPECS = (
    *PLAIN,
    *(
        dataclasses.replace(spec, name=f"weighted_{spec.name}", weighted=True, tags=())
        for spec in PLAIN
        if spec.name in ("resets", "bf16") or spec.name.startswith("gate")
    ),
)
