"""B'MOJO: its equation, what it comes to in special cases, and what its store holds."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_references import KEY, Same, T, W, attend, context, initialise, norm, project, tokens
from contract import distance

from memjax.blocks.bmojo import BMojo, BMojoF
from memjax.nn.stack import make_mixer

pytestmark = pytest.mark.usefixtures("exact_products")
LONG = 29


def inner(name):
    """A maker of what fades."""
    return Same if name == "same" else make_mixer(name, {name: {"heads": 2}}, dim=8, std=0.5)


def block(kind, name="same", **options):
    """The block over `name`, two heads."""
    options = {"window": W, "rotary_base": 0.0} | options
    return kind(dim=8, inner=(inner(name),), std=0.5, heads=2, **options)


def fading(name, params, x):
    """F of tokens."""
    if name == "same":
        return x
    made = inner(name)(name="mixer").apply(
        {"params": params["fading"]}, x, None, context(*x.shape[:2])
    )
    return np.asarray(made[0])


def innovation(made, predictor=4):
    """e of tokens, rounded as selections are."""
    e = []
    for t, now in enumerate(np.float64(made)):
        past = made[max(t - predictor, 0) : t].mean(axis=0) if t else np.zeros_like(now)
        e.append(np.linalg.norm(now - past) / max(np.linalg.norm(now), np.linalg.norm(past)))
    return np.asarray(jnp.asarray(np.array(e), jnp.bfloat16), np.float64)


def stored(e, *, stored, top, threshold=0.0, evict="smallest"):
    """[T, T]: whether a token sees another in the store, by its definition."""
    seen, store = np.zeros((len(e), len(e)), bool), []
    for t in range(len(e)):
        if t and t % W == 0:
            chunk = [s for s in range(t - W, t) if e[s] > threshold]
            store += sorted(chunk, key=lambda s: -e[s])[:top]
            worth = (lambda s: -e[s]) if evict == "smallest" else (lambda s: -s)
            store = sorted(store, key=worth)[:stored]
        seen[t, [s for s in store if t - s >= 2 * W]] = True
    return seen


def expected(params, x, made, tie=True, eidetic=None):
    """The block's answers [B, T, 8]; eidetic: [B, T, T] or None for no store."""
    own = params if tie else {n: params[f"fading_{n}"] for n in ("key", "value")}
    q, k, v = (project(x, params[name]) for name in ("query", "key", "value"))
    fading_k, fading_v = (project(made, own[name]) for name in ("key", "value"))
    q, k, fading_k = norm(q), norm(k), norm(fading_k)
    age = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    near, behind = (age >= 0) & (age < W), (age >= W) & (age < 2 * W)
    rows = []
    for i in range(len(x)):
        store = np.zeros_like(near) if eidetic is None else eidetic[i]
        visible = np.concatenate([near, behind, store], axis=1)
        keys, values = ((a[i], b[i], a[i]) for a, b in ((k, fading_k), (v, fading_v)))
        keys, values = (np.concatenate(part)[None] for part in (keys, values))
        rows.append(attend(params, q[i : i + 1], keys, values, visible)[0])
    return np.stack(rows)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "tie"), [("same", True), pytest.param("delta_net", False, marks=slow)]
)
def test_bmojo_f_equals_its_equation(name, tie):
    """Query 6 of a window of 3 sees tokens 4 to 6 and fading tokens 1 to 3."""
    x = tokens(2)
    params, apply = initialise(block(BMojoF, name, tie=tie), x)
    assert distance(apply(params, x), expected(params, x, fading(name, params, x), tie)) <= 2e-6


@pytest.mark.parametrize(
    ("name", "window", "seen"), [("same", 3, 6), pytest.param("delta_net", T, T, marks=slow)]
)
def test_bmojo_f_is_a_window_twice_as_long_or_attention(name, window, seen):
    """Of tokens themselves, with rotary positions; and when all tokens fit."""
    x = tokens(2)
    params, apply = initialise(block(BMojoF, name, window=window, rotary_base=1e4), x)
    assert distance(apply(params, x), attention(params, x, seen)) <= 1e-6


def attention(params, x, window):
    """A plain window of that length from the block's own weights, with rotary positions."""
    options = {"sliding_window": {"heads": 2, "window": window, "qk_norm": True}}
    plain = make_mixer("sliding_window", options, dim=8, std=0.5)(name="mixer")
    used = "query", "key", "value", "output", "query_norm", "key_norm"
    shared = {name: params[name] for name in used}
    return plain.apply({"params": shared}, x, None, context(*x.shape[:2]))[0]


@pytest.mark.parametrize(
    "options",
    [
        dict(stored=3, top=2),
        pytest.param(dict(stored=4, top=3, threshold=0.9, evict="oldest"), marks=slow),
        pytest.param(dict(stored=LONG, top=W, threshold=-1.0), marks=slow),
    ],
)
def test_bmojo_equals_its_equation(options):
    x = tokens(2, LONG)
    params, apply = initialise(block(BMojo, "delta_net", **options), x)
    made = fading("delta_net", params, x)
    seen = np.stack([stored(innovation(row), **options) for row in made])
    assert seen.any(axis=(1, 2)).all() and not seen.all()
    assert distance(apply(params, x), expected(params, x, made, eidetic=seen)) <= 3e-6


@slow
def test_bmojo_without_a_store_is_bmojo_f_and_with_all_tokens_attention():
    """tau above all e; and every token stored, where what fades are the tokens themselves."""
    x = tokens(2, LONG)
    params, apply = initialise(block(BMojo, "delta_net", threshold=np.inf, top=W), x)
    faded = initialise(block(BMojoF, "delta_net"), x)[1]
    assert distance(apply(params, x), faded(params, x)) <= 1e-6
    options = dict(threshold=-1.0, top=W, stored=LONG, rotary_base=1e4)
    params, apply = initialise(block(BMojo, **options), x)

    def slopes(function):
        y, pull = jax.vjp(lambda params, x: function(params, x, LONG), params, x)
        gradients, of_x = pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
        return {"y": y, "x": of_x, **gradients}

    both = jax.jit(lambda: (slopes(lambda p, x, _: apply(p, x)), slopes(attention)))()
    own, plain = map(contract.named, both)
    for name, leaf in plain.items():
        assert distance(own[name], leaf) <= 3e-6, name


@slow
def test_a_foreseen_stream_stores_nothing_and_what_differs_is_stored():
    module = block(BMojo, stored=6, top=2, predictor=2)
    x = np.ones((2, LONG, 8), np.float32)
    x[1, 13] = 3.0
    params, _ = initialise(module, x)
    state = module.apply({"params": params}, x, None, context(2, LONG))[1]
    constant, outlier = np.asarray(state["memory"].store.token)[:, 0]  # of the first head
    # the first token has no past to be foreseen from; 13 is an outlier, which also spoils the
    # predictions of the two tokens behind it
    assert sorted(constant[constant > 0] - 1) == [0]
    assert sorted(outlier[outlier > 0] - 1) == [0, 13, 14, 15]


@slow
def test_no_token_changes_what_stands_in_front_of_it():
    """To the bit: selections have no gradient that could tell."""
    module = block(BMojo, "delta_net", stored=3, top=2)
    x = tokens(1, LONG)
    params, _ = initialise(module, x)
    changed = x + np.eye(LONG, dtype=np.float32)[:, :, None] * jax.random.normal(KEY, (8,))
    rows = np.concatenate([x, changed])
    ctx = context(len(rows), LONG)
    y = np.asarray(jax.jit(module.apply)({"params": params}, rows, None, ctx)[0])
    assert np.isfinite(y).all()
    same = (y[1:] == y[0]).all(axis=-1)
    assert (same == np.tri(LONG, k=-1, dtype=bool)).all()


def test_messages_of_the_store():
    for options, message in (
        (dict(top=4), "top from 1 to the window, 3, .* given stored 64, top 4"),
        (dict(top=2, threshold=np.nan), "threshold a number"),
        (dict(stored=0), "stored must be at least 1"),
        (dict(top=2, evict="newest"), "evict smallest or oldest"),
        (dict(top=2, predictor=0), "predictor must be at least 1; given 0"),
    ):
        with pytest.raises(ValueError, match=message):
            initialise(block(BMojo, **options), tokens())
