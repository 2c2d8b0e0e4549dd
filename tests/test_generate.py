"""Generation from a checkpoint: what is drawn, the stream of text, mistakes."""

import functools
import itertools
import json

import contract
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import tiny_runs as runs

from memjax import generate
from memjax.data import tokens
from memjax.nn.lm import LanguageModel, ModelConfig

PROMPT = [tokens.BOS, *tokens.BYTES.encode("The quick brown fox ")]

pytestmark = pytest.mark.usefixtures("compiled_once")
compiled_once = runs.compiled_once


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def model(workdir):
    """The trained model, its weights scaled up so that its choices are not near ties."""
    step, model, params, meta = generate.load(workdir)
    assert step == 12 and meta["config"]["steps"] == 12
    return model, {**params, "embedding": 20 * params["embedding"]}


def sample(model, length=12, **options):
    return list(generate.sample(*model, PROMPT, length, **options))


def gaps(model, drawn, rank=1):
    """How far each drawn token's logit lies below the `rank`-th likeliest, 0 or less when it is
    among them: from one pass over the whole sequence, as a fraction of the largest logit."""
    ids = jnp.asarray([[*PROMPT, *drawn]])
    found, _ = jax.jit(model[0].apply)({"params": model[1]}, ids)
    rows = np.asarray(found, np.float64)[0, len(PROMPT) - 1 : -1]
    assert np.isfinite(rows).all() and len(rows) == len(drawn)
    rows[:, : tokens.OFFSET] = -np.inf
    best = np.sort(rows)[:, -rank]
    return (best - rows[np.arange(len(drawn)), drawn]) / np.abs(rows[:, tokens.OFFSET :]).max()


@pytest.fixture
def command(capfd):
    """Runs the command: (exit code, stdout, stderr)."""
    return functools.partial(runs.called, generate, capfd)


# ---------------------------------------------------------------- what is drawn


def test_temperature_zero_takes_what_the_full_forward_pass_finds_likeliest(model):
    """Prefill and decode states give the argmax of the whole sequence, padding left out."""
    found = sample(model, temperature=0)
    assert (gaps(model, found) <= 1e-5).all()  # a tie within rounding may go either way
    assert sample(model, temperature=0, seed=5) == found


def test_the_seed_decides_the_draw(model):
    first = sample(model, 30, temperature=1.0, seed=1)
    assert sample(model, 30, temperature=1.0, seed=1) == first
    assert sample(model, 30, temperature=1.0, seed=2) != first
    assert sample(model, 12, temperature=1.0, seed=1) == first[:12]
    assert len(set(first)) > 5
    assert min(first) >= tokens.OFFSET


def test_top_k_draws_from_the_likeliest_only(model):
    drawn = sample(model, top_k=3, temperature=50.0)
    assert (gaps(model, drawn, rank=3) <= 1e-5).all()
    assert (gaps(model, drawn) > 1e-5).any()  # it does not always take the first
    assert (gaps(model, sample(model, temperature=50.0), rank=3) > 1e-5).any()
    assert sample(model, top_k=1000, seed=1) == sample(model, seed=1)


def test_nothing_is_generated_for_length_zero(model):
    assert sample(model, 0) == []


RAGGED = [[1, 5, 9, 3, 16, 4, 4, 12, 7, 8, 15], [1, 6, 6, 13]]


@pytest.mark.slow
def test_rows_of_any_length_are_decoded_as_alone():
    """The hybrid's window of 2 fills up within either prompt and while decoding."""
    hybrid, seeds = models.model("window_exit")[:2], [3, 4]
    found = generate.sample_rows(*hybrid, RAGGED, 8, temperature=1.0, seeds=seeds)
    rows = np.stack([*found], axis=1).tolist()
    for row, prompt, seed in zip(rows, RAGGED, seeds, strict=True):
        assert row == [*generate.sample(*hybrid, prompt, 8, temperature=1.0, seed=seed)]
    assert rows[0] != rows[1]


@pytest.mark.slow
def test_a_prompt_in_pieces_leaves_the_state_of_one_pass():
    """1e-5: the pieces' sums are added in another order, 11 tokens in float32 (1e-7 each)."""
    model, params, _ = models.model("window_exit")
    read = jax.jit(functools.partial(generate.absorb, model))
    tokens_, write = generate.padded(RAGGED)
    whole, state = read(params, tokens_, None, write), None
    parts = generate.pieces(11, 3)
    assert parts == [slice(0, 2), slice(2, 5), slice(5, 8), slice(8, 11)]
    for part in parts:
        state = read(params, tokens_[:, part], state, write[:, part])
    assert whole["position"].tolist() == [11, 4]
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        assert contract.distance(np.asarray(leaf), np.asarray(other)) < 1e-5


def test_prompts_are_padded_in_front():
    tokens_, write = generate.padded([[5, 6, 7], [8]])
    assert tokens_.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert write.tolist() == [[True] * 3, [False, False, True]]
    assert generate.padded([[5, 6], [7, 8]])[1] is None
    assert generate.pieces(4, 0) == [slice(0, 4)] == generate.pieces(4, 9)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"length": -1}, "-1"),
        ({"temperature": -0.5}, "-0.5"),
        ({"top_k": -2}, "-2"),
        ({"prefill": -3}, "-3"),
    ],
)
def test_negative_settings_are_refused_before_anything_is_drawn(model, options, given):
    with pytest.raises(ValueError, match=f">= 0; given .*{given}"):
        generate.sample(*model, PROMPT, **{"length": 4, **options})
    with pytest.raises(ValueError, match="at least one token"):
        generate.sample(*model, [], 4)


def test_rows_that_do_not_fit_are_refused(model):
    for prompts, given in (([], r"given \[\]"), ([PROMPT, []], r"given \[21, 0\]")):
        with pytest.raises(ValueError, match=f"at least one token.*{given}"):
            generate.sample_rows(*model, prompts, 4, seeds=[0] * len(prompts))
    with pytest.raises(ValueError, match="a seed for each of 2 prompts; given 1"):
        generate.sample_rows(*model, [PROMPT, PROMPT], 4, seeds=[0])


def test_more_than_attention_can_hold_is_refused():
    layers = ((("hybrid(attention, linear_attention)",), 1),)
    sizes = {"attention": {"window": 24, "heads": 2}, "linear_attention": {"heads": 2}}
    small = LanguageModel(ModelConfig(259, 8, layers, mixers=sizes))
    with pytest.raises(ValueError, match=r"prompt 21 \+ length 5.* capacity of 24.* at most 4"):
        generate.sample(small, None, PROMPT, 5)


def test_an_earlier_checkpoint_can_be_loaded(workdir, model):
    step, _, params, _ = generate.load(workdir, 8)
    assert step == 8
    assert np.abs(params["norm"]["scale"] - model[1]["norm"]["scale"]).max() > 0


# ---------------------------------------------------------------- the stream of text


def test_text_is_streamed_as_characters_become_complete():
    text = "aß語🜚b"
    pieces = list(generate.stream_text(iter(tokens.BYTES.encode(text).tolist())))
    assert "".join(pieces) == text
    seen = "".join(p or "." for p in pieces)
    assert seen == "a.ß..語...🜚b."


def test_bytes_that_are_no_text_are_replaced():
    ids = tokens.BYTES.encode(b"a\xffb\xe8\xaa").tolist()
    assert "".join(generate.stream_text(iter(ids))) == "a\ufffdb\ufffd"


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_prompt_and_what_follows(command, workdir):
    given = f"--workdir={workdir}", "--prompt=für", "--length=40"
    code, out, err = command(*given, "--seed=3")
    assert code == 0 and out.startswith("für") and out.endswith("\n") and err == ""
    assert command(*given, "--seed=3") == (code, out, err)
    assert command(*given, "--seed=4")[1] != out


@pytest.mark.slow
def test_the_command_takes_several_prompts(command, workdir):
    """Each with its own seed, and in pieces: what it gives alone."""
    given = f"--workdir={workdir}", "--length=9", "--prefill=4"
    code, out, err = command(*given, "--prompt=The quick", "--prompt=x", "--seed=3")
    assert code == 0 and err == ""
    alone = [
        command(f"--workdir={workdir}", "--length=9", f"--prompt={prompt}", f"--seed={seed}")[1]
        for prompt, seed in (("The quick", 3), ("x", 4))
    ]
    assert out == "".join(alone)
    nothing = command(*given, "--prompt=a", "--prompt=b", "--length=0")[1]
    assert nothing == "a\nb\n"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--length=-1"], ["length=-1", "non-negative"]),
        (["--temperature=-1"], ["temperature=-1", "non-negative"]),
        (["--prefill=-1"], ["prefill=-1", "non-negative"]),
        (["--top_k=-1"], ["top_k=-1", "non-negative"]),
        (["--length=ten"], ["length=ten"]),
        (["--step=3"], ["no checkpoint of step 3", "8, 12"]),
        (["--promt=x"], ["'promt'", "Did you mean: prompt"]),
        (["--prompt=def", "main"], ["'main' is no flag", "quotes"]),
        (["--workdir=/nowhere/run"], ["/nowhere/run holds no checkpoint", "memjax.train"]),
    ],
)
def test_mistakes(command, workdir, given, parts):
    code, out, err = command(f"--workdir={workdir}", *given)
    assert code == 2 and out == "" and "Traceback" not in err, (code, out, err)
    assert err.startswith("error: ") and all(part in err for part in parts), err


def test_a_missing_workdir(command):
    code, out, err = command()
    assert code == 2 and out == "" and "--workdir" in err and "Traceback" not in err, err


def test_a_run_on_a_task_is_no_text(command, workdir, monkeypatch):
    load = generate.load

    def of_a_task(*args):
        step, model, params, meta = load(*args)
        meta = json.loads(json.dumps(meta))
        meta["config"]["data"]["name"] = "mqar"
        return step, model, params, meta

    monkeypatch.setattr(generate, "load", of_a_task)
    code, out, err = command(f"--workdir={workdir}")
    assert code == 2 and out == "" and "'mqar'" in err and "data.name='text'" in err


def test_the_command_says_what_attention_can_hold(command, workdir, monkeypatch):
    monkeypatch.setattr(generate, "capacity", lambda _: 30)
    code, out, err = command(f"--workdir={workdir}", "--prompt=abc", "--length=40")
    assert code == 2 and out == "" and "ask for at most 27" in err


def test_the_stream_is_lazy(model):
    endless = generate.sample(*model, PROMPT, 10**9)
    assert len(list(itertools.islice(endless, 3))) == 3
