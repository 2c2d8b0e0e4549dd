"""Accuracy on the key that is bound by a row's very first token, and on all other keys.

    python experiments/forgetting_mqar/first_key.py attention linear_attention

Of the runs of seed 0 that `experiments/sweep.py forgetting_mqar --steps=500` has made.
"""

import pathlib
import sys

import numpy as np

from memjax import data, evaluate, generate

RUNS = pathlib.Path(__file__).parents[2] / "runs" / "forgetting_mqar"


def main(cells):
    for cell in cells:
        _, model, params, meta = generate.load(str(RUNS / f"{cell}-0-500"))
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
