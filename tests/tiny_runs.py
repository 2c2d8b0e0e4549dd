"""Tiny runs for the tests of the commands: settings, files of text, and how a run is started."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from memjax import config, train

ROOT = pathlib.Path(__file__).parents[1]
MQAR = f"{ROOT}/configs/mqar.py"
TEXT = f"{ROOT}/configs/text.py:gated_delta_net,layers=1"
COMMON = {
    "steps": 12,
    "batch": 4,
    "optim.warmup": 2,
    "eval.every": 5,
    "eval.batches": 1,
    "checkpoint.every": 4,
    "log.every": 3,
}
TASK = {
    **COMMON,
    "data.length": 16,
    "data.pairs": 2,
    "data.vocab": 32,
    "data.eval_examples": 8,
    "model.vocab": 32,
    "model.dim": 8,
}
PAGES = {
    "a.txt": "The quick brown fox jumps over the lazy dog.\n" * 6,
    "b.txt": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n" * 5,
    "c.txt": "いろはにほへと ちりぬるを\n" * 4,
    "d.txt": "0123456789 " * 30,
    "e.txt": "Portez ce vieux whisky au juge blond qui fume.\n" * 6,
    "f.txt": "x = 1\n",
}
_TRAINED: list[str] = []


def text(folder, **changes) -> dict:
    """Settings of a run on the files of `folder`/pages, which are written."""
    pages = pathlib.Path(folder) / "pages"
    pages.mkdir(exist_ok=True)
    for name, content in PAGES.items():
        (pages / name).write_text(content, encoding="utf-8")
    sizes = {"data.length": 16, "data.holdout": 0.45, "model.dim": 16, "eval.sample": 20}
    return {**COMMON, "data.glob": f"{pages}/*.txt", **sizes, **changes}


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Keeps compiled programs in a folder, for modules that make the same run again and again."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    yield
    _configure(before)


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax reads the settings once, at its next compilation


def trained(factory) -> str:
    """The workdir of a finished run on text, made once in a process."""
    if not _TRAINED:
        folder = factory.mktemp("trained")
        settings = text(folder, steps=12, accumulate=2)
        train.train(load(TEXT, settings), str(folder / "run"))
        _TRAINED.append(str(folder / "run"))
    return _TRAINED[0]


def load(source: str, settings: dict):
    """The config of a file with these settings."""
    return config.load(source, settings)


def arguments(source: str, workdir, settings: dict) -> list[str]:
    """The same, as a command line without the program."""
    changed = [f"--config.{name}={value}" for name, value in settings.items()]
    return [f"--config={source}", f"--workdir={workdir}", *changed]


def command(module: str, *args: str, cache=None, **variables) -> subprocess.Popen:
    """Starts `python -m memjax.<module>`, its output in pipes.

    cache: folder for compiled programs, which makes the next start of the same run cheaper.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    return subprocess.Popen(
        [sys.executable, "-m", f"memjax.{module}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def on_eight_devices(program: str, *args: str):
    """What a Python program prints last, as JSON; it sees eight virtual devices and the tests."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests",
        "JAX_PLATFORMS": "cpu",
    }
    out = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


def called(module, capture, *args: str) -> tuple[int, str, str]:
    """Runs the `main` of a command in this process: (exit code, stdout, stderr).

    capture: pytest's capsys or capfd.
    """
    before = set(flags.FLAGS)
    module.define_flags()
    capture.readouterr()
    try:
        code = module.main(config.parse_flags([module.__name__, *args], config=False)) or 0
    except SystemExit as end:
        code = end.code
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    return code, *capture.readouterr()


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for a process that must exit with `code`; its two outputs."""
    out, err = process.communicate(timeout=250)
    assert process.returncode == code, f"exit {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    return out, err


def records(workdir) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock; every line must be whole."""
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    of_the_clock = ("time", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in of_the_clock} for r in rows]


def summary(workdir) -> dict:
    """summary.json without what depends on the clock."""
    with open(os.path.join(workdir, "summary.json"), encoding="utf-8") as file:
        values = json.load(file)
    return {k: v for k, v in values.items() if k not in ("seconds", "tokens_per_second")}


def tree(folder) -> dict[str, bytes]:
    """Every file below a folder with its content; {} when there is no folder."""
    found = pathlib.Path(folder).rglob("*")
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(found)}
