"""Accuracy on the key that is bound by a row's very first token, and on all other keys.

    python experiments/forgetting_mqar/first_key.py attention linear_attention

Of the runs of seed 0 in float32 that sweep.py, beside this file, has made in runs/.
"""

import sys

import numpy as np

from memjax import data, evaluate, generate
from memjax.sweep import chosen
from memjax.trials import Sweep


def main(cells):
    sweep = Sweep("experiments/forgetting_mqar/sweep.py")
    for cell in cells:
        (trial,) = chosen(sweep.trials, f"cell={cell},seed=0,dtype=float32")
        _, model, params, meta = generate.load(sweep.workdir(trial, "runs"))
        settings = meta["config"]
        source = data.make(settings["data"], batch=settings["batch"], seed=settings["seed"])
        found = {"first key": [], "other keys": []}
        for batch in evaluate.score_rows(model, params, source, None):
            first = batch["inputs"] == batch["inputs"][:, :1]
            found["first key"].append(batch["correct"][batch["mask"] & first])
            found["other keys"].append(batch["correct"][batch["mask"] & ~first])
        shown = (f"{name} {np.concatenate(group).mean():.3f}" for name, group in found.items())
        print(f"{cell}: {', '.join(shown)}")


if __name__ == "__main__":
    main(sys.argv[1:])
