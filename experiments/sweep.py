"""Trains every cell with every seed on a recall task, then gathers the summaries.

    python experiments/sweep.py mqar --cells=attention,delta_net,gated_delta_net,linear_attention
    python experiments/sweep.py forgetting_mqar --jobs=2 --steps=1000

The task is the name of a config in configs/ and of a folder beside this file, where results.jsonl
is written, a row for each run. Runs that are finished are kept, interrupted ones continue; one that
fails is named and left out.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import memjax

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
KEPT = ("steps", "query_accuracy", "sequence_accuracy", "loss", "seconds", "parameters", "versions")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--cells", default=",".join(memjax.cells.names()))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="default: the config's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each if > 1")
    given = parser.parse_args()
    runs = [(cell, int(seed)) for cell in given.cells.split(",") for seed in given.seeds.split(",")]
    results = HERE / given.task / "results.jsonl"
    results.parent.mkdir(exist_ok=True)
    rows = {}
    if results.exists():
        old = (json.loads(line) for line in results.read_text(encoding="utf-8").splitlines())
        rows = {(row["cell"], row["seed"]): row for row in old}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        for (cell, seed), summary in zip(
            runs, pool.map(lambda run: train(given, *run), runs), strict=True
        ):
            if summary:
                rows[cell, seed] = {"cell": cell, "seed": seed} | {k: summary[k] for k in KEPT}
                lines = "".join(json.dumps(row) + "\n" for row in rows.values())
                results.write_text(lines, encoding="utf-8")


def train(given, cell, seed):
    """The summary of one run, which is made unless it is there; None when it fails."""
    length = f"-{given.steps}" if given.steps else ""
    workdir = ROOT / "runs" / given.task / f"{cell}-{seed}{length}"
    if not finished(workdir):
        steps = f",steps={given.steps}" if given.steps else ""
        command = (sys.executable, "-m", "memjax.train", f"--workdir={workdir}")
        config = f"--config=configs/{given.task}.py:{cell},seed={seed}{steps}"
        alone = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"} if given.jobs > 1 else {}
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{workdir}.log", "a", encoding="utf-8") as log:
            environment = {**os.environ, **alone}
            done = subprocess.run(
                [*command, config], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        if done.returncode:
            print(f"{cell}, seed {seed}: failed, see {workdir}.log", flush=True)
            return None
        print(f"{cell}, seed {seed}: finished", flush=True)
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def finished(workdir):
    path = workdir / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["finished"]


if __name__ == "__main__":
    main()
