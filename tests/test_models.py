"""Whole models over every registered mixer: decoding, splitting, documents, padding, causality.

The bound is the contract's: max(1e-5, 3 x the float32 forward pass's own distance from float64).
Plain tests take one of each kind of state (`EVERY`); the other cells and combinations are marked
slow, and so are cells inside of other layers (decoding and bits). Splits, padding, gradients and
bfloat16 are the work of what the layers share: of the cells, those that differ in what they keep or
tell stand for all (`DIFFERENT`).
"""

import contract
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from models import BATCH, LENGTH, VOCAB

from memjax.nn.lm import LanguageModel, ModelConfig, blank, capacity, initial_state
from memjax.recurrence import positions

pytestmark = pytest.mark.usefixtures("exact_products")
GROUPED_BY = "name"  # tests of one model share compiled code, see conftest.py
BORDER = 5  # where the plain tests split; the parts are alike and share their compilations


# One of each kind of state: convolutions, windows, a scan over layers; rings. Slow: token shifts
# and an earlier layer's values, matrices alone, frozen chunks.
EVERY = ("scanned", "attention")
KINDS = (*EVERY, "rwkv7_channel", "mamba2", "omega_net")
DIFFERENT = {
    name: models.ALL[name] for name in (*models.COMBINED, "mac_tokens", *models.INSIDE, "attention")
}


def each(*names, every=models.FAST):
    """`names` plain, the others of `every` marked slow."""
    slow = [n for n in every if n not in names]
    return pytest.mark.parametrize(
        "name", [*names, *(pytest.param(n, marks=pytest.mark.slow) for n in slow)]
    )


def part(arguments, span):
    """The same tokens [B, T] of every array."""
    return tuple(None if a is None else a[:, span] for a in arguments)


def decode(name, tokens, state):
    """Token by token, without masks."""
    logits = []
    for t in range(tokens.shape[1]):
        y, state = models.apply(name, tokens[:, t : t + 1], state)
        logits.append(y)
    return np.concatenate(logits, axis=1), state


@each(*EVERY, every=models.ALL)
def test_prefill_and_decode_equal_the_forward_pass(name):
    tokens = models.text()
    head, state = models.apply(name, tokens[:, :BORDER])
    tail, state = decode(name, tokens[:, BORDER:], state)
    out = np.concatenate([head, tail], axis=1), state
    models.assert_close(name, out, models.explicit(name, tokens), "prefill, then decode")


def check_split(name, points):
    rng = np.random.default_rng(1)
    _, state = models.apply(name, models.text(1), models.fresh(name), *models.masks(LENGTH))
    reset, write = rng.random((BATCH, LENGTH)) < 0.2, rng.random((BATCH, LENGTH)) < 0.7
    given = (models.text(2), reset, write)
    for point in points:
        (tokens, *rest), last = part(given, slice(0, point)), part(given, slice(point, None))
        head, middle = models.apply(name, tokens, state, *rest)
        tail, final = models.apply(name, last[0], middle, *last[1:])
        out = np.concatenate([head, tail], axis=1), final
        models.assert_close(name, out, (given[0], state, reset, write), f"split at {point}")


@each(*EVERY, every=DIFFERENT)
def test_split(name):
    check_split(name, (BORDER,))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_split(name):
    check_split(name, range(1, LENGTH))


def check_resets(name, border):
    """Convolution tails, positions, windows and memories; what was carried in is gone."""
    tokens = models.text(3)
    _, carried = models.apply(name, *models.explicit(name, models.text(4)))
    logits, final = models.apply(name, tokens, carried, *models.masks(LENGTH, reset=(0, border)))
    for span in (slice(0, border), slice(border, LENGTH)):
        alone = models.explicit(name, tokens[:, span])
        state = final if span.stop == LENGTH else models.apply(name, *alone)[1]
        what = f"document {span.start} to {span.stop}"
        models.assert_close(name, (logits[:, span], state), alone, what)


@each(*EVERY)
def test_resets_equal_separate_documents(name):
    check_resets(name, BORDER)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_resets_anywhere_equal_separate_documents(name):
    for border in (1, 2, 4, 7, LENGTH - 1):
        check_resets(name, border)


@each(*EVERY, every=DIFFERENT)
def test_padding(name):
    """Prompts of 10, 5 and 5 tokens in one batch, padded left, right or in between."""
    prompts, fresh, width = (10, 5, 5), models.fresh(name), 10
    tokens, rng = models.text(5, width), np.random.default_rng(5)
    places = {
        "left": [np.arange(width - n, width) for n in prompts],
        "right": [np.arange(n) for n in prompts],
        "between": [np.sort(rng.permutation(width)[:n]) for n in prompts],
    }
    for where, index in places.items():
        padded, (reset, write) = models.text(6, width), models.masks(width)
        write[:] = False
        for row, slots in enumerate(index):
            padded[row, slots], write[row, slots] = tokens[row, : len(slots)], True
        out = models.apply(name, padded, fresh, reset, write)
        for row, slots in enumerate(index):
            alone = models.explicit(name, tokens[:, : len(slots)])
            logits, state = jax.tree.map(np.copy, models.apply(name, *alone))
            logits[row] = out[0][row, slots]
            state = put_row(state, out[1], row)
            models.assert_close(name, (logits, state), alone, f"{where} padding, row {row}")
        noise = np.where(write, padded, (padded + 1) % VOCAB).astype(np.int32)
        again = models.apply(name, noise, fresh, reset, write)
        written = [np.where(write[..., None], logits, 0) for logits in (out[0], again[0])]
        contract.assert_identical((written[1], again[1]), (written[0], out[1]), "other padding")


def put_row(state, other, row):
    """`state` with one sequence of `other`; scanned layers have a leading axis."""

    def put(mine, theirs):
        axis = 0 if mine.shape[0] == BATCH else 1
        index = (slice(None),) * axis + (row,)
        mine[index] = theirs[index]
        return mine

    return jax.tree.map(put, state, other)


@each(*EVERY, every=models.ALL)
def test_nothing_written_changes_no_bit(name):
    fresh, (reset, write) = models.fresh(name), models.masks(5)
    _, carried = models.apply(name, models.text(7), fresh, *models.masks(LENGTH))
    for state in (fresh, carried):
        _, after = models.apply(name, models.text(8, 5), state, reset, ~write)
        contract.assert_identical(after, state, f"{name}: nothing written")
    reset[:, 2] = True
    _, after = models.apply(name, models.text(8, 5), carried, reset, ~write)
    contract.assert_identical(after, fresh, f"{name}: emptied, nothing written")


@each(*EVERY, every=DIFFERENT)
def test_initial_state_equals_none(name):
    given = models.explicit(name, models.text(length=BORDER))
    out = models.apply(name, given[0])
    assert contract.layout(out[1]) == contract.layout(models.fresh(name))
    models.assert_close(name, out, given, "no state and no masks")


@each(*EVERY)
def test_no_later_token_changes_a_bit(name):
    tokens = models.text(10)
    reset, write = models.masks(LENGTH, reset=(6,), unwritten=(2, 8))
    logits, _ = models.apply(name, tokens, models.fresh(name), reset, write)
    for t in (1, 4, 7, LENGTH - 1):
        changed = np.where(np.arange(LENGTH) < t, tokens, (tokens + 1) % VOCAB).astype(np.int32)
        again, _ = models.apply(name, changed, models.fresh(name), reset, write)
        assert np.array_equal(again[:, :t], logits[:, :t]), f"{name} sees token {t} or later ones"
        assert not np.array_equal(again[:, t:], logits[:, t:])


@each(*EVERY, every=DIFFERENT)
def test_causality(name):
    """The gradient of each token's logits with respect to each embedding, tokens all different."""
    shell = LanguageModel(models.config(name, tie=False))
    params = models.initialise(shell, 2)
    tokens = np.random.default_rng(9).permutation(VOCAB)[None, :LENGTH].astype(np.int32)
    reset, write = (mask[:1] for mask in models.masks(LENGTH, reset=(6,), unwritten=(2, 8)))

    @jax.jit
    def influence(params):
        def logits(embedding):
            changed = {**params, "embedding": embedding}
            return shell.apply({"params": changed}, tokens, reset=reset, write=write)[0][0]

        y, pull = jax.vjp(logits, params["embedding"])
        cotangents = jnp.eye(LENGTH)[..., None] * jnp.sin(1 + jnp.arange(VOCAB))
        return jax.vmap(lambda c: pull(c)[0])(cotangents.astype(y.dtype))

    gradient = np.asarray(influence(params))[:, tokens[0]]  # [answer, token, D]
    assert np.isfinite(gradient).all()
    seen = np.abs(gradient).max(-1) > 0
    document = np.cumsum(reset[0])
    past = np.tri(LENGTH, dtype=bool) & (document[:, None] == document)
    own = np.eye(LENGTH, dtype=bool)
    allowed = (past & write[0]) | own
    assert not seen[~allowed].any(), f"{name} sees what it must not"
    assert seen[own].all() and seen[allowed & np.eye(LENGTH, k=-1, dtype=bool)].all()


def test_select_equals_indexing():
    name, tokens = "delta_net", models.text()
    index = np.array([[0, 3, 3], [9, 5, 1], [7, 8, 9]], np.int32)
    logits, state = models.apply(name, tokens)
    chosen, same = models.apply(name, tokens, select=index)
    assert chosen.shape == (BATCH, 3, VOCAB)
    expected = np.take_along_axis(logits, index[..., None], axis=1)
    assert contract.distance(chosen, expected) <= 1e-6
    contract.assert_identical(same, state, "select")


@pytest.mark.parametrize(
    "name",
    [
        *(fast := ("delta_net", "attention")),
        *(pytest.param(n, marks=pytest.mark.slow) for n in DIFFERENT if n not in fast),
    ],
)
def test_bfloat16_is_off_by_rounding(name):
    """Rounding the weights alone to bfloat16 moves the float32 model by d. A bfloat16 model
    rounds, at each product, the weight, the input, the answer and what follows it: 4 independent
    errors of that size, 2 d in RMS; twice that is allowed."""
    tokens = models.text()
    _, params, run = models.model(name)
    given = models.explicit(name, tokens)
    exact = models.apply(name, *given)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
    moved = contract.to_numpy(run({"params": rounded}, *given))
    logits, state = models.apply(name, tokens, dtype="bfloat16")
    assert logits.dtype == np.float32
    narrow = LanguageModel(models.config(name, dtype="bfloat16"))
    expected = jax.eval_shape(lambda: initial_state(narrow, params, BATCH))
    assert contract.layout(state) == contract.layout(expected)
    bound = 4 * contract.distance(moved[0], exact[0])
    far = contract.distance(logits, exact[0])
    assert far <= bound, f"{name}: bfloat16 is {far:.2e} from float32; allowed {bound:.2e}"


@pytest.mark.parametrize("name", ["delta_net", pytest.param("scanned", marks=pytest.mark.slow)])
def test_remat_changes_memory_only(name):
    tokens, results = models.text(), []
    for remat in ("none", "full"):
        shell = LanguageModel(models.config(name, remat=remat))
        _, params, _ = models.model(name)

        def loss(params, shell=shell):
            return jnp.mean(jnp.sin(shell.apply({"params": params}, tokens)[0]))

        results.append(contract.named(jax.jit(jax.value_and_grad(loss))(params)))
    assert results[0].keys() == results[1].keys()
    for path, leaf in results[0].items():
        assert contract.distance(results[1][path], leaf) <= 1e-5, path


def test_vectors_that_stand_for_tokens_give_what_tokens_give():
    """One-hot inputs select rows of the matrix that reads vectors."""
    sizes = dict(vocab=VOCAB, dim=16, layers=((("delta_net",), 1),), tie=False)
    of_tokens = LanguageModel(ModelConfig(**sizes))
    of_vectors = LanguageModel(ModelConfig(**sizes, features=VOCAB))
    tokens = jnp.asarray(models.text())
    params = of_tokens.init(jax.random.key(0), tokens)["params"]
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: a.shape == b.shape,
            params,
            jax.eval_shape(
                lambda: of_vectors.init(jax.random.key(0), blank(of_vectors.config, 1, 2))
            )["params"],
        )
    )
    expected, state = of_tokens.apply({"params": params}, tokens)
    found, other = of_vectors.apply({"params": params}, jax.nn.one_hot(tokens, VOCAB))
    for a, b in zip(
        jax.tree.leaves((expected, state)), jax.tree.leaves((found, other)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert initial_state(of_vectors, params, 1)["position"] == 0
    with pytest.raises(
        ValueError, match="model.features must be 0, or above 0 with model.tie=False"
    ):
        ModelConfig(**{**sizes, "tie": True}, features=3)


def test_positions_count_written_tokens_of_the_document():
    reset = np.array([[0, 0, 1, 0, 0, 1], [0] * 6], bool)
    write = np.array([[1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1]], bool)
    start = np.array([7, 2], np.int32)
    each_token, end = positions(reset, write, start, 6)
    assert np.array_equal(each_token, [[7, 8, 0, 0, 1, 0], [2, 3, 4, 4, 5, 5]])
    assert np.array_equal(end, [1, 6])
    each_token, end = positions(None, None, start, 3)
    assert np.array_equal(each_token, [[7, 8, 9], [2, 3, 4]])
    assert np.array_equal(end, [10, 5])


def test_capacity():
    assert capacity(models.config("scanned")) is None
    assert capacity(models.config("attention")) == 40
    layers = ((("hybrid(attention, delta_net)", "sliding_window"), 1),)
    mixers = models.options(layers, {"attention": {"window": 30}})
    assert capacity(models.config("nested", layers=layers, mixers=mixers)) == 30
    with pytest.raises(ValueError, match="41 tokens do not fit its capacity of 40"):
        models.apply("attention", models.text(0, 41))
    full, state = models.apply("attention", models.text(0, 40))
    beyond, _ = models.apply("attention", models.text(1, 1), state)
    assert np.isfinite(full).all() and np.isnan(beyond).all()
