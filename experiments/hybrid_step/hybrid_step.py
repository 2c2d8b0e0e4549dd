"""What joining a window and a memory costs: blocks against the sum of their halves.

    python experiments/hybrid_step/hybrid_step.py

Forward and backward of one layer, gradients of weights included: milliseconds of the blocks and of
their halves alone, which take turns, and operations counted from the programs (`memjax.cost`). The
table is written into the README.md beside this file.
"""

import functools
import pathlib

import jax
import numpy as np

from memjax import cost, results
from memjax.benchmark import layer_calls, time_in_turns
from memjax.nn.stack import make_mixer

README = pathlib.Path(__file__).parent / "README.md"
LENGTH, DIM, HEADS, WINDOW, TURNS = 2048, 256, 4, 128, 9
OPTIONS = {name: {"heads": HEADS} for name in ("gated_delta_net", "titans")}
OPTIONS["sliding_window"] = {"heads": HEADS, "window": WINDOW}
OPTIONS["bmojo_f"] = OPTIONS["bmojo"] = {"heads": HEADS, "window": WINDOW}
DELTA = "hybrid(sliding_window, gated_delta_net)"
HALVES = ("sliding_window", "gated_delta_net", "titans")
# block: (layer, the hybrid's option, its memory)
BLOCKS = {
    **{
        f"hybrid, {combine}": (DELTA, combine, "gated_delta_net")
        for combine in ("gate", "parallel", "sequential", "window_exit")
    },
    "bmojo_f": ("bmojo_f(gated_delta_net)", None, "gated_delta_net"),
    "bmojo": ("bmojo(gated_delta_net)", None, "gated_delta_net"),
    "mag": ("mag(sliding_window, titans)", None, "titans"),
    "mal": ("mal(sliding_window, titans)", None, "titans"),
}


def module(layer, combine=None):
    options = {**OPTIONS, "hybrid": {"combine": combine}} if combine else OPTIONS
    return make_mixer(layer, options, dim=DIM, std=0.02)()


def main():
    x = np.random.default_rng(0).normal(size=(1, LENGTH, DIM)).astype(np.float32)
    modules = {half: module(half) for half in HALVES}
    modules |= {name: module(layer, combine) for name, (layer, combine, _) in BLOCKS.items()}
    calls, operations = {}, {}
    for name, made in modules.items():
        both = layer_calls(made, x)[1]
        calls[name] = both
        shapes = jax.eval_shape(lambda *given: given, *both.args)
        operations[name] = cost.flops(functools.partial(both.func), *shapes)
        print(f"{name}: {operations[name] / 1e9:.2f} Gflop", flush=True)
    seconds = time_in_turns(calls, TURNS)
    head = ["layer", "ms", "of its halves' sum", "Gflop", "of its halves' sum"]
    lines = []
    for name in modules:
        line = [f"`{name}`"]
        for values, unit in ((seconds, 1e-3), (operations, 1e9)):
            line.append(f"{values[name] / unit:.1f}")
            if name in BLOCKS:
                halves = values["sliding_window"] + values[BLOCKS[name][2]]
                line.append(f"{values[name] / halves:.2f}")
            else:
                line.append("-")
        lines.append(line)
        print(" ".join(line), flush=True)
    results.write_tables(str(README), {"step": (head, lines)})


if __name__ == "__main__":
    main()
