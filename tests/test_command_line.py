"""Mistakes on the command line: one message, exit code 2, no traceback, nothing written.

Most run in this process, through the same parser and the same `main` as the command.
"""

import contextlib
import json
import os
import signal

import pytest
import tiny_runs as runs
from absl import flags

from memjax import config, train

LAYERS = "--config.model.layers="


pytestmark = pytest.mark.usefixtures("compiled_once")
compiled_once = runs.compiled_once


@pytest.fixture
def command(capfd):
    """Runs train's `main` on a command line: (exit code, stdout, stderr)."""

    def run(*args):
        for name in ("workdir", "profile"):
            with contextlib.suppress(AttributeError):
                delattr(flags.FLAGS, name)
        train.define_flags()
        capfd.readouterr()
        try:
            code = train.main(config.parse_flags(["train", *map(str, args)]))
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    yield run
    for name in [
        n for n in flags.FLAGS if n in ("workdir", "profile") or n.partition(".")[0] == "config"
    ]:
        delattr(flags.FLAGS, name)


def refused(command, *args, unchanged=None) -> str:
    """The one message of a command that must be refused and change nothing in `unchanged`."""
    before = runs.tree(unchanged) if unchanged else {}
    code, out, err = command(*args)
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, err
    assert len(err) < 1000, err
    assert unchanged is None or runs.tree(unchanged) == before
    return err


# What is wrong -> parts of the message: what was given, what is allowed or what to do.
MISTAKES = {
    "--config.model.dmi=3": ["fields of model: channel, dim", "Did you mean --config.model.dim?"],
    "--config.modle.dim=3": ["no section modle", "model", "Did you mean --config.model.dim?"],
    "--config.lr=3": ["config.lr", "Did you mean --config.optim.lr?"],
    "--config.optim.lr=abc": ["optim.lr=abc", "expected a float"],
    "--config.steps=1.5": ["steps=1.5", "expected an int"],
    "--config.model.tie=maybe": ["tie=maybe", "expected a bool"],
    "--wrkdir=x": ["'wrkdir'", "Did you mean: workdir"],
    "config.steps=3": ["'config.steps=3' is no flag", "--config.section.field=value"],
    f"{LAYERS}oops": ["layers=oops", "expected a tuple"],
    f"{LAYERS}()": ["given ()", "expected pairs (pattern, repeats)"],
    f"{LAYERS}(('delta_net',),2)": ["given (('delta_net',), 2)", "expected pairs"],
    f"{LAYERS}((('delta_net',),0),)": ["given ((('delta_net',), 0),)", "expected pairs"],
    f"{LAYERS}((('delta_net(',),1),)": ["'delta_net('", "expected a name or name(name, ...)"],
    f"{LAYERS}((('base_conv','delta_nte'),1),)": ["'delta_nte'", "Did you mean 'delta_net'?"],
    f"{LAYERS}((('base_conv','hybrid(delta_net)'),1),)": ["hybrid takes 2 mixers", "given 1"],
    f"{LAYERS}((('base_conv','delta_net(base_conv)'),1),)": ["delta_net takes 0 mixers"],
    "--config.model.mixers.delta_net.heads=3": ["dim 8", "3 heads", "change heads"],
    "--config.model.mixers.delta_net.norm=lyer": ["'lyer'", "allowed are 'rms' and 'layer'"],
    "--config.model.dim=0": ["model.dim", "at least 1", "given 0"],
    "--config.model.dtype=float23": ["'float23'", "float32, bfloat16"],
    "--config.model.vocab=33": ["model.vocab is 33", "the data has 32", "set model.vocab to 32"],
    "--config.accumulate=3": ["accumulate 3", "does not divide", "4 rows"],
    "--config.batch=0": ["batch=0", "positive number"],
    "--config.data.pairs=9": ["pairs=9", "more than length=16", "fewer pairs"],
    "--config.data.length=15": ["length=15 is odd", "such as 16"],
    "--config.data.name=mqra": ["'mqra'", "text, tfds, ", "Did you mean 'mqar'?"],
    "--config.mesh.data=3": ["data=3", "1 devices"],
    "--config.optim.warmup=100": ["warmup=100", "0 to config.steps (12)"],
    "--config.steps=0": ["steps=0", "at least 1"],
    "--config.seed=-1": ["seed=-1", "0 to 2**32 - 1"],
    "--config.log.every=0": ["log.every=0", "at least 1"],
    "--config.checkpoint.every=0": ["checkpoint.every=0", "at least 1"],
    "--config.eval.batches=0": ["eval.batches=0", "at least 1"],
    "--config.eval.every=-1": ["eval.every=-1", "0 evaluates at the end only"],
    "--config.eval.sample=-1": ["eval.sample=-1", "0 draws none"],
}
SOURCES = {
    "configs/mqra.py": ["mqar.py, oracle.py, passkey.py", "Did you mean 'configs/mqar.py'?"],
    "confgs/mqar.py": ["no such folder 'confgs'", "Did you mean 'configs/mqar.py'?"],
    "configs/mqar.py:delta_nte": ["'delta_nte'", "linear_attention", "Did you mean 'delta_net'?"],
    "configs/mqar.py:delta_net,sede=1": ["'sede'", "cell, seed, steps, lr", "Did you mean 'seed'?"],
    "configs/mqar.py:delta_net,seed=x": ["seed='x'", "expected an int"],
    "configs/hybrid_recall.py:delta_net,stored=4": ["stored=4", "option of bmojo", "delta_net"],
    "configs/quickstart.py:delta_net": ["takes no argument", "--config=configs/quickstart.py"],
    "configs/text.py:gated_delta_nte": ["'gated_delta_nte'", "Did you mean 'gated_delta_net'?"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_setting(command, tmp_path, mistake):
    workdir = tmp_path / "run"
    given = [*runs.arguments(f"{runs.MQAR}:delta_net", workdir, runs.TASK), mistake]
    message = refused(command, *given, unchanged=tmp_path)
    assert all(part in message for part in MISTAKES[mistake]), message


@pytest.mark.parametrize("source", SOURCES)
def test_a_mistaken_config(command, tmp_path, monkeypatch, source):
    monkeypatch.chdir(runs.ROOT)
    given = f"--config={source}", f"--workdir={tmp_path}/run"
    message = refused(command, *given, unchanged=tmp_path)
    assert all(part in message for part in SOURCES[source]), message


def test_what_is_missing(command):
    assert "write --workdir=runs/NAME" in refused(command, f"--config={runs.MQAR}")
    assert "write --config=FILE.py" in refused(command, "--workdir=x")


def test_attention_that_cannot_hold_a_row(command, tmp_path):
    small = {**runs.TASK, "model.mixers.attention.window": 8}
    given = runs.arguments(f"{runs.MQAR}:attention", tmp_path / "run", small)
    message = refused(command, *given, unchanged=tmp_path)
    assert "16 tokens do not fit its capacity of 8" in message and "raise the capacity" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data.glob": "/nowhere/*.txt"}, ["'/nowhere/*.txt' matches nothing", "two files"]),
        ({"data.glob": "{folder}/pages"}, ["none of them a file", "pages/**/*.txt"]),
        ({"data.glob": "{folder}/pages/a.txt"}, ["of one file (a.txt)", "at least 2"]),
        ({"data.holdout": 0.9999}, ["holdout=0.9999", "no training file", "allowed is"]),
        ({"model.vocab": 256}, ["model.vocab is 256", "set model.vocab to 259"]),
    ],
)
def test_text_that_cannot_be_used(command, tmp_path, changes, parts):
    settings = runs.text(tmp_path)
    for name, value in changes.items():
        settings[name] = value.format(folder=tmp_path) if isinstance(value, str) else value
    given = runs.arguments(runs.TEXT, tmp_path / "run", settings)
    message = refused(command, *given, unchanged=tmp_path)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("workdir", ["file", "file/run"])
def test_a_workdir_that_cannot_be_written(command, tmp_path, workdir):
    (tmp_path / "file").write_text("kept")
    given = runs.arguments(runs.MQAR, os.path.join(tmp_path, workdir), runs.TASK)
    message = refused(command, *given, unchanged=tmp_path)
    assert workdir in message and "cannot be written" in message


# ---------------------------------------------------------------- workdirs of other runs


@pytest.fixture
def interrupted(command, tmp_path, monkeypatch):
    """The arguments and the workdir of a run on text that was interrupted after one step."""
    describe = train.describe

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        describe(*args)

    workdir = tmp_path / "run"
    given = runs.arguments(runs.TEXT, workdir, runs.text(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train, "describe", interrupt)
        code, out, err = command(*given)
    assert code == train.UNFINISHED and "stopped at step 1 and saved" in out, err
    return given, workdir


def test_workdirs_of_another_run(command, interrupted, tmp_path):
    given, workdir = interrupted
    message = refused(command, *given, "--config.optim.lr=0.5", unchanged=workdir)
    assert "optim.lr: 0.001 -> 0.5" in message and "another --workdir" in message
    with open(tmp_path / "pages" / "a.txt", "a", encoding="utf-8") as file:
        file.write("One more line.\n")
    message = refused(command, *given, unchanged=workdir)
    assert "trained on other data" in message and "content" in message
    assert "another --workdir" in message


def test_a_refused_first_attempt_leaves_the_workdir_free(command, tmp_path):
    given = runs.arguments(runs.MQAR, tmp_path, {**runs.TASK, "steps": 1, "optim.warmup": 0})
    refused(command, *given, "--config.accumulate=3", unchanged=tmp_path)
    code, out, err = command(*given)
    assert code == 0 and "query accuracy" in out, err
    with open(tmp_path / "summary.json", encoding="utf-8") as file:
        assert json.load(file)["finished"] is True


def test_the_real_commands_refuse_in_the_same_way(tmp_path):
    given = runs.arguments(runs.MQAR, tmp_path / "run", runs.TASK)
    mistakes = {
        ("train", *given, "--config.model.dmi=3"): "Did you mean --config.model.dim?",
        ("train", *given, "--config.data.pairs=9"): "more than length=16",
        ("generate", f"--workdir={tmp_path}/run"): "holds no checkpoint",
    }
    started = [(runs.command(*args), part) for args, part in mistakes.items()]
    for process, part in started:
        out, err = runs.finish(process, 2)
        assert out == "" and part in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()
