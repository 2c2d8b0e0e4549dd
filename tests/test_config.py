"""Configs: what a command line accepts, and the one message that every mistake gets."""

import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from memjax import config as cfg

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections calls it

GOOD = """
from ml_collections import ConfigDict, config_dict
from memjax.config import parse_arg

def get_config(arg=None):
    given = parse_arg(arg, cell=('gated_delta_net', ('attention', 'delta_net', 'gated_delta_net')),
                      steps=100, tie=False)
    config = ConfigDict(dict(seed=0, steps=given.steps))
    config.model = ConfigDict(dict(dim=64, layers=(((given.cell,), 2),), tie=given.tie, mixers={},
                                   untyped=None, clip=config_dict.placeholder(float)))
    config.optim = ConfigDict(dict(lr=1e-3))
    config.names = ['a']
    return config
"""
HEAD = "from ml_collections import ConfigDict\n"
FILES = {
    "good.py": GOOD,
    "plain.py": HEAD + "def get_config():\n    return ConfigDict()\n",
    "needs.py": HEAD + "def get_config(a):\n    return ConfigDict()\n",
    "raises.py": "def get_config():\n    x = 1\n    return x / 0\n",
    "syntax.py": "x = 1\ndef get_config(:\n",
    "empty.py": "x = 1\n",
    "none.py": "def get_config():\n    pass\n",
    "method.py": "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    "    return ConfigDict({'data': {'values': 8}})\n",
    "module.py": "import no_such_module_anywhere\n",
}
SHOW = """
import json, sys
from absl import app, flags
from memjax import config
flags.DEFINE_string('workdir', 'none', 'folder')

@config.exit_on_user_error
def main(argv):
    if flags.FLAGS.workdir == 'user':
        raise config.UserError('two words')
    if flags.FLAGS.workdir == 'defect':
        raise ValueError('a defect')
    print(config.to_json(flags.FLAGS.config), flags.FLAGS.workdir, argv[1:])

app.run(main, flags_parser=config.parse_flags)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name, text in FILES.items():
        (tmp_path / "configs" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*args):
    from absl import flags

    values = flags.FlagValues()
    rest = cfg.parse_flags(["program", *args], flag_values=values)
    return values.config, rest


def message(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        parse(*args)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    assert len(err) < 700
    return err[len("error: ") :].strip()


def test_what_is_accepted(folder):
    config, rest = parse(
        "--config=configs/good.py:delta_net,steps=7,tie",
        "--config.model.dim=128",
        "--config.optim.lr",
        "3e-4",
        "--config.model.layers=((('attention',),3),)",
        "--config.model.clip=1",
        "--noconfig.model.tie",
        "rest",
    )
    assert config.steps == 7 and config.model.dim == 128 and config.optim.lr == 3e-4
    assert config.model.layers == ((("attention",), 3),)
    assert config.model.clip == 1.0 and config.model.tie is False and rest == ["program", "rest"]
    assert config.is_locked
    config, _ = parse(
        "--config", "configs/good.py", "--config.model.mixers={'delta_net': {'heads': 4}}"
    )
    assert config.model.mixers.delta_net.heads == 4
    assert config.model.layers == ((("gated_delta_net",), 2),)
    (folder / "flags.txt").write_text("--config=configs/good.py\n--config.model.dim=9\n")
    assert parse("--flagfile=flags.txt")[0].model.dim == 9


MISTAKES = [
    (
        ["--config.model.dmi=512"],
        (
            "--config.model.dmi: no such field; fields of model: clip, dim, "
            "layers, mixers, tie, untyped. Did you mean --config.model.dim?"
        ),
    ),
    (
        ["--config.modle.dim=512"],
        (
            "--config.modle.dim: config has no section modle; fields of "
            "config: model, names, optim, seed, steps. Did you mean --config.model.dim?"
        ),
    ),
    (
        ["--config.lr=1"],
        "fields of config: model, names, optim, seed, steps. Did you mean --config.optim.lr?",
    ),
    (["--config.model.dim.x=1"], "--config.model.dim.x: model.dim is a field (an int), not"),
    (["--config.model.dim=0.5"], "--config.model.dim=0.5: expected an int (now 64)."),
    (["--config.optim.lr=fast"], "--config.optim.lr=fast: expected a float (now 0.001)."),
    (["--config.model.tie=maybe"], "--config.model.tie=maybe: expected a bool (now False)."),
    (["--config.model.clip=x"], "--config.model.clip=x: expected a float (now None)."),
    (
        ["--config.model.layers=abc"],
        '--config.model.layers=abc: expected a tuple, written as in --config.model.layers="',
    ),
    (["--config.model.layers[0]=a"], "an element cannot be set alone; set the whole field."),
    (["--config.model=4"], "--config.model=4: model is a section; set one of its fields: clip,"),
    (["--config.model={'dim': 4}"], "--config.model: set the fields of this section one by one:"),
    (
        ["--config.model.mixers.delta_net.heads=4"],
        (
            "fields of model.mixers: none. An empty section "
            "is set as a whole: --config.model.mixers=\"{'delta_net': ...}\"."
        ),
    ),
    (
        ["--config.model.untyped=4"],
        "sets this field to None without a type; write config_dict.placeholder(float)",
    ),
    (["--config.names=4"], "--config.names: a list cannot be set; make it a tuple"),
    (["--workdri=x"], "Unknown command line flag 'workdri'"),
    (["--config=configs/good.py"], "--config is given twice"),
    (["--flagfile=nowhere"], "Unable to open flagfile: [Errno 2] No such file or directory: 'now"),
]


@pytest.mark.parametrize("args, expected", MISTAKES, ids=[a[0] for a, _ in MISTAKES])
def test_mistaken_fields(folder, capsys, args, expected):
    assert expected in message(capsys, "--config=configs/good.py", *args)


SOURCES = [
    (
        "--config=configs/god.py",
        (
            "--config=configs/god.py: no such file; configs has empty.py, "
            "good.py, method.py, module.py, needs.py, none.py, plain.py, raises.py, syntax.py. "
            "Did you mean 'configs/good.py'?"
        ),
    ),
    ("--config=configs/good", "Did you mean 'configs/good.py'?"),
    ("--config=cnfigs/good.py", "no such folder 'cnfigs'"),
    ("--config=cnfigs/good.py", "Did you mean 'configs/good.py'?"),
    (
        "--config=configs/good.py:deltanet",
        (
            "config argument cell='deltanet' is not allowed; allowed:"
            " attention, delta_net, gated_delta_net. Did you mean 'delta_net'?"
        ),
    ),
    (
        "--config=configs/good.py:step=4",
        (
            "--config=configs/good.py:step=4: config argument 'step' is"
            " unknown; allowed: cell, steps, tie. Did you mean 'steps'?"
        ),
    ),
    ("--config=configs/good.py:steps=x", "config argument steps='x': expected an int."),
    (
        "--config=configs/plain.py:tiny",
        (
            "--config=configs/plain.py:tiny: its get_config takes no "
            "argument; write --config=configs/plain.py."
        ),
    ),
    (
        "--config=configs/needs.py",
        (
            "--config=configs/needs.py: its get_config needs an argument; "
            "write --config=configs/needs.py:ARGUMENT."
        ),
    ),
    (
        "--config=configs/raises.py",
        (
            "--config=configs/raises.py: the config file raised "
            "ZeroDivisionError, line 3: division by zero"
        ),
    ),
    ("--config=configs/syntax.py", "the config file raised SyntaxError, line 2: "),
    (
        "--config=configs/module.py",
        "the config file raised ModuleNotFoundError, line 1: No module ",
    ),
    ("--config=configs/empty.py", "the file has no function get_config; define get_config()"),
    ("--config=configs/none.py", "must return an ml_collections.ConfigDict, it returned a None"),
    (
        "--config=configs/method.py",
        (
            "data.values has the name of a method of ConfigDict, so that no flag could set it; "
            "name the field otherwise, for example 'values_'"
        ),
    ),
    ("--config=", "--config is missing; write --config=FILE.py"),
    (
        "--config.model.dim=3",
        "--config.model.dim=3 comes before --config=FILE; give --config first",
    ),
    ("--confg=configs/good.py", "Unknown command line flag 'confg'. Did you mean: config ?"),
    ("argument", "--config is missing; write --config=FILE.py or --config=FILE.py:ARGUMENT"),
]


@pytest.mark.parametrize("arg, expected", SOURCES, ids=[f"{i}" for i in range(len(SOURCES))])
def test_mistaken_files_and_arguments(folder, capsys, arg, expected):
    assert expected in message(capsys, arg)


def test_a_program_without_config(capsys):
    from absl import flags

    values = flags.FlagValues()
    flags.DEFINE_integer("top", 3, "a number", flag_values=values)
    assert cfg.parse_flags(["p", "--top=4", "x"], config=False, flag_values=values) == ["p", "x"]
    assert values.top == 4
    with pytest.raises(SystemExit) as exit_:
        cfg.parse_flags(["p", "--top=a"], config=False, flag_values=values)
    assert exit_.value.code == 2 and "flag --top=a" in capsys.readouterr().err


def test_real_program(folder):
    """Through app.run: mistakes exit with 2 and one line, defects keep their traceback."""
    (folder / "show.py").write_text(SHOW)
    root = os.path.dirname(os.path.dirname(os.path.abspath(cfg.__file__)))
    env = {**os.environ, "PYTHONPATH": root}

    def run(*args):
        done = subprocess.run(
            [sys.executable, "show.py", *args],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    code, out, _ = run("--config=configs/good.py", "--config.model.dim=7", "--workdir=w", "more")
    assert code == 0 and '"dim": 7' in out and "w ['more']" in out
    code, out, err = run("--config=configs/good.py", "--config.model.dmi=7")
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    code, _, err = run("--config=configs/good.py", "--workdir=user")
    assert code == 2 and err == "error: two words\n"
    code, _, err = run("--config=configs/good.py", "--workdir=defect")
    assert code == 1 and "Traceback" in err


# ---------------------------------------------------------------- Python


def test_load(folder):
    config = cfg.load("configs/good.py:attention", {"model.dim": 3, "optim.lr": 1})
    assert config.model.dim == 3 and config.optim.lr == 1.0 and config.is_locked
    with pytest.raises(cfg.UserError, match=r"config.model.dmi: no such field.*--config.model.dim"):
        cfg.load("configs/good.py", {"model.dmi": 3})
    with pytest.raises(cfg.UserError, match="config.model.dim='x': expected an int, got a str"):
        cfg.load("configs/good.py", {"model.dim": "x"})
    assert not [n for n in sys.modules if n.startswith("_memjax_config")]


def test_parse_arg():
    spec = dict(cell=("a", ("a", "b(c,d=1)")), steps=3, lr=0.1, wide=False, name="x")
    got = cfg.parse_arg("b(c,d=1), lr=2, wide,name=y=z", **spec)
    assert got.to_dict() == dict(cell="b(c,d=1)", steps=3, lr=2.0, wide=True, name="y=z")
    assert cfg.parse_arg(None, **spec).cell == "a" and cfg.parse_arg("", steps=3).steps == 3
    assert cfg.parse_arg("wide=no", **spec).wide is False
    for arg, text in [
        ("wide=2", "wide='2': expected true or false"),
        ("steps=1,steps=2", "'steps' is given twice"),
        ("lr=a", "lr='a': expected a float"),
        ("b(c)", "cell='b\\(c\\)' is not allowed; allowed: a, b\\(c,d=1\\)"),
        ("wdie", "Did you mean 'wide'"),
    ]:
        with pytest.raises(cfg.UserError, match=text):
            cfg.parse_arg(arg, **spec)
    with pytest.raises(cfg.UserError, match="'x' is unknown; allowed: none"):
        cfg.parse_arg("x")


def test_user_errors():
    with pytest.raises(cfg.UserError, match="^config.model: unknown cell 'x'$"):
        with cfg.user_errors("config.model", KeyError):
            raise KeyError("unknown cell 'x'")
    with pytest.raises(cfg.UserError, match="^inner$"):
        with cfg.user_errors("outer"):
            raise cfg.UserError("inner")
    with pytest.raises(TypeError):
        with cfg.user_errors("outer"):
            raise TypeError("a defect")


def test_text_round_trip_and_difference():
    config = ConfigDict(dict(b=dict(x=1, t=((("a",), 2),), none=None, empty={}), a=0.5))
    flat = {"a": 0.5, "b.empty": {}, "b.none": None, "b.t": ((("a",), 2),), "b.x": 1}
    assert cfg.flatten(config) == flat and list(cfg.flatten(config)) == sorted(flat)
    back = cfg.from_json(cfg.to_json(config))
    assert cfg.flatten(back) == flat and back.is_locked
    assert cfg.difference(config, cfg.plain(config)) == []
    other = ConfigDict(dict(b=dict(x=2, t=((("a",), 3),), none=None, empty={"y": 1}), c="n"))
    assert cfg.difference(config, other) == [
        "a: 0.5 -> (absent)",
        "b.empty: {} -> (absent)",
        "b.empty.y: (absent) -> 1",
        "b.t: [[['a'], 2]] -> [[['a'], 3]]",
        "b.x: 1 -> 2",
        "c: (absent) -> 'n'",
    ]
    assert cfg.difference(config, other, ignore=("b", "a")) == ["c: (absent) -> 'n'"]
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        cfg.to_json({"f": len})


def test_claim(tmp_path):
    workdir = str(tmp_path / "run")
    config = ConfigDict(dict(steps=10, model=dict(dim=4)))
    cfg.claim(workdir, config)
    cfg.claim(workdir, config)
    longer = ConfigDict(dict(steps=20, model=dict(dim=4)))
    cfg.claim(workdir, longer, ignore=("steps",))
    assert '"steps": 20' in (tmp_path / "run" / "config.json").read_text()
    other = ConfigDict(dict(steps=20, model=dict(dim=8)))
    with pytest.raises(cfg.UserError) as err:
        cfg.claim(workdir, other)
    assert str(err.value) == (
        f"{workdir} holds a run with another config. Fields that differ, there -> now:\n"
        "  model.dim: 4 -> 8\n"
        "Use another --workdir, or give the fields the values they have there."
    )
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(cfg.UserError, match="config.json cannot be read"):
        cfg.claim(workdir, config)
    (tmp_path / "file").write_text("")
    with pytest.raises(cfg.UserError, match="cannot be written: "):
        cfg.claim(str(tmp_path / "file" / "run"), config)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json"]
