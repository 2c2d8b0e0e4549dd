"""Trains every cell with every seed on a task, then gathers the summaries.

    python experiments/sweep.py mqar --cells=attention,delta_net,gated_delta_net,linear_attention
    python experiments/sweep.py forgetting_mqar --jobs=2 --steps=500
    python experiments/sweep.py tiny_text --jobs=2 --seeds=0 --dtype=bfloat16

The task is the name of a config in configs/ and of a folder beside this file, where results.jsonl
is written, a row for each run. Runs that are finished are kept, interrupted ones continue; one that
fails is named and left out. dtype: of the activations. What is compiled for a cell's first seed
serves the others (runs/compiled).
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
KEPT = (
    "steps", "query_accuracy", "sequence_accuracy", "bits_per_byte", "loss", "seconds",
    "tokens_per_second", "parameters", "state_bytes", "versions",
)  # fmt: skip
NAMED = ("cell", "seed", "dtype")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--cells", default=",".join(memjax.cells.names()))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="default: the config's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each if > 1")
    given = parser.parse_args(argv)
    runs = [(cell, int(seed)) for cell in given.cells.split(",") for seed in given.seeds.split(",")]
    rows = {tuple(row[name] for name in NAMED): row for row in read(given.task)}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        for (cell, seed), summary in zip(
            runs, pool.map(lambda run: train(given, *run), runs), strict=True
        ):
            if summary:
                named = dict(zip(NAMED, (cell, seed, given.dtype), strict=True))
                row = named | {name: summary[name] for name in KEPT if name in summary}
                rows[tuple(named.values())] = row
                write(given.task, rows.values())


def read(task):
    """The rows of a task's results.jsonl."""
    results = HERE / task / "results.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else ()
    return [json.loads(line) for line in lines]


def write(task, rows):
    """Writes the rows of a task's results.jsonl."""
    results = HERE / task / "results.jsonl"
    results.parent.mkdir(exist_ok=True)
    results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_table(task, head, rows):
    """Writes a table between the two marks in the README.md of a task's folder."""
    readme = HERE / task / "README.md"
    begin, end = "<!-- table: written by the script -->\n", "<!-- /table -->"
    lines = [head, ["---"] * len(head), *rows]
    table = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    readme.write_text(before + begin + table + end + rest.partition(end)[2], encoding="utf-8")


def train(given, cell, seed):
    """The summary of one run of the sweep; None when it fails."""
    parts = [cell, seed, given.steps, None if given.dtype == "float32" else given.dtype]
    name = "-".join(str(part) for part in parts if part is not None)
    steps = f",steps={given.steps}" if given.steps else ""
    return trained(
        ROOT / "runs" / given.task / name,
        f"--config=configs/{given.task}.py:{cell},seed={seed}{steps}",
        f"--config.model.dtype={given.dtype}",
        alone=given.jobs == 1,
    )


def trained(workdir, *arguments, alone=True):
    """The summary of a run, which is made with these arguments unless it is there; None when it
    fails. alone: whether it may use all cores."""
    if not finished(workdir):
        command = (sys.executable, "-m", "memjax.train", f"--workdir={workdir}", *arguments)
        one_core = {} if alone else {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs" / "compiled")}
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{workdir}.log", "a", encoding="utf-8") as log:
            environment = {**compiled, **os.environ, **one_core}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if done.returncode:
            print(f"{workdir.name}: failed, see {workdir}.log", flush=True)
            return None
        print(f"{workdir.name}: finished", flush=True)
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def finished(workdir):
    path = workdir / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["finished"]


if __name__ == "__main__":
    main()
