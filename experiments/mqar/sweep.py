"""Runs every cell and seed with the train command, then gathers the summaries.

    python experiments/mqar/sweep.py [--cells=delta_net,attention] [--seeds=0,1,2]

Runs that are finished are kept, interrupted ones continue. Writes results.jsonl beside this file.
"""

import argparse
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
CELLS = "attention,delta_net,gated_delta_net,linear_attention"
KEPT = ("query_accuracy", "sequence_accuracy", "loss", "seconds", "parameters", "versions")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    rows = []
    for cell in given.cells.split(","):
        for seed in map(int, given.seeds.split(",")):
            workdir = ROOT / "runs" / "mqar" / f"{cell}-{seed}"
            if not finished(workdir):
                subprocess.run(
                    [
                        *(sys.executable, "-m", "memjax.train"),
                        f"--config=configs/mqar.py:{cell},seed={seed}",
                        f"--workdir={workdir}",
                    ],
                    cwd=ROOT,
                    check=True,
                )
            summary = json.loads((workdir / "summary.json").read_text())
            rows.append({"cell": cell, "seed": seed, **{k: summary[k] for k in KEPT}})
    (HERE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finished(workdir):
    path = workdir / "summary.json"
    return path.exists() and json.loads(path.read_text())["finished"]


if __name__ == "__main__":
    main()
