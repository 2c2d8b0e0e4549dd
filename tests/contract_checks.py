"""The contract of a memory cell: one function per law, each for one case and one form.

They raise AssertionError, so that a test can also show that they catch a planted mistake.
"""

from functools import partial

import contract
import jax
import jax.numpy as jnp
import numpy as np
from contract import Case, Given, tokens

import memjax


def check_forms(
    case: Case,
    form: str,
    given: Given,
    rounded_products: bool = False,
    optimised: bool = False,
) -> None:
    """Values, final state and all gradients in float32 against float64.

    The float64 values are those of a plain loop over tokens; the float64 gradients are those of
    `scan`, whose values must equal the loop's. rounded_products: also allow what rounding k.k
    does to the float64 result. optimised: the form is compiled as models are.
    """
    exact = contract.scanned(case.cell, given, np.float64)
    loop = contract.named(contract.reference(case.cell, given))
    for name in loop:
        assert contract.distance(exact[name], loop[name]) < 1e-12, f"scan differs in {name}"
    own = contract.scanned(case.cell, given)
    value = contract.evaluate(case.cell, form, given, optimised=optimised)
    allowed = dict.fromkeys(exact, 0.0)
    if rounded_products:
        moved = contract.scanned(case.cell, _longer_keys(case, given), np.float64)
        allowed = {name: contract.distance(moved[name], exact[name]) for name in exact}
    contract.assert_close(value, own, exact, f"{case.name}, {form}", allowed)


def _longer_keys(case: Case, given: Given) -> Given:
    """Keys whose k.k is larger by K 2^-24, as much as float32 may lose in a sum of K products."""
    longer = {
        name: np.float64(leaf) * (1 + leaf.shape[-1] * 2.0**-25)
        for name, leaf in given.xs._asdict().items()
        if case.fields[name].kind == "key"
    }
    return given._replace(xs=given.xs._replace(**longer))


def check_values(case: Case, form: str, given: Given) -> None:
    """Values and final state in float32 against the float64 loop."""
    _assert_values(case, given, contract.values(case.cell, form, given), form)


def _assert_values(case: Case, given: Given, out, what: str) -> None:
    exact = contract.named(contract.reference(case.cell, given))
    own = contract.named(contract.scanned_values(case.cell, given))
    contract.assert_close(contract.named(out), own, exact, f"{case.name}, {what}")


def check_float64(case: Case, form: str) -> None:
    """With float64 inputs a form is `scan` to float64's rounding."""
    given = contract.cast(contract.problem(case, 14, 29), np.float64)
    with contract.x64(True):
        scan, value = (contract.named(contract.values(case.cell, f, given)) for f in ("scan", form))
    for name, leaf in scan.items():
        far = contract.distance(value[name], leaf)
        assert far < 1e-11, f"{case.name}, {form}, float64: {name} is {far:.2e} from scan"


def check_split(case: Case, first: str, second: str, length: int, points) -> None:
    """x[:t] in one form, then x[t:] in another from the state it leaves, equals x."""
    given = contract.problem(case, 2, length)
    for point in points:
        head, state = _piece(case.cell, first, _part(given, slice(0, point)))
        rest = _part(given, slice(point, length))._replace(state=state)
        tail, state = _piece(case.cell, second, rest)
        out = np.concatenate([head, tail], axis=1), state
        _assert_values(case, given, out, f"{first} to token {point}, then {second}")


def _piece(cell, form, given):
    """(y, state); those of `scan` by one compilation for all lengths."""
    if form == "scan":
        return contract.scanned_values(cell, given)
    return contract.values(cell, form, given)


def check_decode(case: Case, form: str, length: int, prompt: int) -> None:
    """A prompt in one form, then token by token with whatever `run` chooses."""
    given = contract.problem(case, 3, length)
    y, state = contract.values(case.cell, form, _part(given, slice(0, prompt)))
    answers = [y]
    for t in range(prompt, length):
        token = _part(given, slice(t, t + 1))._replace(state=state)
        y, state = contract.values(case.cell, None, token)
        answers.append(y)
    _assert_values(case, given, (np.concatenate(answers, axis=1), state), f"{form}, then decode")


def _part(given: Given, span: slice) -> Given:
    xs, reset, write = tokens((given.xs, given.reset, given.write), span)
    return given._replace(xs=xs, reset=reset, write=write)


# In the laws of resets and writes `fill` says how a form is given what may be None: `explicit`, so
# that one compilation serves them all, or `as_it_is`.


def as_it_is(cell, given: Given) -> Given:
    """Masks and states stay None."""
    return given


def check_resets(case: Case, form: str, fill=contract.explicit) -> None:
    """Packed documents equal separate sequences; what was carried in before them is gone."""
    lengths, given = (6, 1, 6), contract.problem(case, 4, 13, masks=False)
    borders = np.cumsum((0, *lengths))
    reset = np.zeros((contract.BATCH, 13), bool)
    reset[:, borders[:-1]] = True
    y, final = contract.values(case.cell, form, fill(case.cell, given._replace(reset=reset)))
    for begin, end in zip(borders, borders[1:], strict=False):
        alone = _part(given, slice(begin, end))._replace(state=None)
        exact = contract.named(contract.reference(case.cell, alone))
        own = contract.named(contract.scanned_values(case.cell, alone))
        packed = contract.named((y[:, begin:end], final))
        if end != borders[-1]:  # only the last document's state can be seen
            exact, own, packed = ({"[0]": tree["[0]"]} for tree in (exact, own, packed))
        contract.assert_close(packed, own, exact, f"{case.name}, {form}, document at {begin}")


def check_unwritten(case: Case, form: str, fill=contract.explicit) -> None:
    """Tokens that are not written leave the state bit-identical and carry nothing into it."""
    given = fill(case.cell, contract.problem(case, 5, 13))
    never = given._replace(reset=np.zeros_like(given.reset), write=np.zeros_like(given.write))
    out = contract.values(case.cell, form, never)
    contract.assert_identical(out[1], given.state, f"{case.name}, {form}, nothing written")
    _assert_values(case, never, out, f"{form}, nothing written")
    never.reset[:, 2] = True
    started = (never, contract.explicit(case.cell, never._replace(state=None)))
    out, other = (contract.values(case.cell, form, given) for given in started)
    _assert_values(case, never, out, f"{form}, emptied, nothing written")
    contract.assert_identical(out[1], other[1], f"{case.name}, {form}, emptied, nothing written")

    out = contract.values(case.cell, form, given)
    written = given.write.reshape(*given.write.shape[:2], -1)[..., 0]  # of all heads
    changed = type(given.xs)(
        *(
            leaf
            if case.fields[name].asks
            else np.where(
                np.expand_dims(written, tuple(range(2, leaf.ndim))), leaf, np.float32(np.nan)
            )
            for name, leaf in given.xs._asdict().items()
        )
    )
    again = contract.values(case.cell, form, given._replace(xs=changed))
    contract.assert_identical(again, out, f"{case.name}, {form}, other unwritten tokens")


def check_removed(case: Case, form: str, fill=contract.explicit) -> None:
    """A write mask per head equals, head by head, the sequence without the unwritten tokens."""
    length, kept, rng = 13, 9, np.random.default_rng(6)
    given = contract.problem(case, 6, length, masks=False)
    order = rng.random((contract.BATCH, length, contract.HEADS)).argsort(axis=1)
    write = order < kept
    index = np.sort(order.argsort(axis=1)[:, :kept], axis=1)  # where the kept tokens stand

    def compress(leaf):
        return np.take_along_axis(leaf, np.expand_dims(index, tuple(range(3, leaf.ndim))), axis=1)

    y, state = contract.values(case.cell, form, fill(case.cell, given._replace(write=write)))
    removed = given._replace(xs=jax.tree.map(compress, given.xs))
    _assert_values(case, removed, (compress(y), state), f"{form}, tokens left out")
    _assert_values(case, given._replace(write=write), (y, state), f"{form}, write per head")


@partial(jax.jit, static_argnums=(0, 1))
def _influence(cell, form, given, cotangent):
    """Gradient of the answer of each token s: leaves [S, B, T, h, ...]."""

    def answers(xs):
        return contract.apply(cell, form, given._replace(xs=xs))[0]

    y, pull = jax.vjp(answers, given.xs)
    time = jnp.arange(y.shape[1]).reshape(1, -1, *(1,) * (y.ndim - 2))
    return jax.vmap(lambda s: pull(jnp.where(time == s, cotangent, 0))[0])(jnp.arange(y.shape[1]))


def check_causality(case: Case, form: str, scenario: str = "random") -> None:
    """An answer depends on no later token, no other document, no unwritten token, no other
    sequence and no other head: these gradients are zero exactly. What it may see, it sees."""
    length = 19
    given = contract.problem(case, 7, length, scenario)
    shape = jax.eval_shape(partial(contract.apply, case.cell, form), given)[0].shape
    cotangent = np.random.default_rng(7).normal(size=shape).astype(np.float32)
    cotangent[-1, :, -1] = 0  # one head of one sequence is not asked for anything
    gradients = contract.to_numpy(_influence(case.cell, form, given, cotangent))

    document = np.cumsum(given.reset, axis=1)
    past = np.tri(length, dtype=bool)[:, None, :]
    past = past & (document.T[:, :, None] == document[None])  # [S, B, T]
    own = np.eye(length, dtype=bool)[:, None, :]
    asked = not any(field.asks for field in case.fields.values())
    for name, gradient in zip(given.xs._fields, gradients, strict=True):
        what = f"{case.name}, {form}: gradient of {name}"
        assert np.isfinite(gradient).all(), f"{what} is not finite"
        size = np.abs(gradient).reshape(*gradient.shape[:4], -1).max(-1)  # [S, B, T, h]
        assert not size[:, -1, :, -1].any(), f"{what} reaches another head or sequence"
        kind = case.fields[name].kind
        allowed = past if case.fields[name].asks else past & given.write[None]
        assert not size[~allowed].any(), f"{what} reaches a token that must not be seen"
        if case.fields[name].asks:  # some need not count, as gates where nothing is gated
            asked |= size[:, :-1].max(-1)[np.broadcast_to(own, past.shape)[:, :-1]].any()
        elif kind == "value" and scenario == "random":
            earlier = size[:, 1].max(-1)[(allowed & ~own)[:, 1]]
            assert earlier.any(), f"{what} sees nothing of the past"
    assert asked, f"{case.name}, {form}: no answer depends on what is asked"


def check_bfloat16(case: Case, form: str, narrow_gates: bool = True) -> None:
    """bfloat16 inputs: what is bfloat16 too is off by at most twice the rounding of the float32
    result, the rest keeps the bound of float32.

    narrow_gates: False leaves log decays and rates in float32, as mixers do.
    """
    given = contract.problem(case, 8, 29)
    narrow = {
        name: leaf.astype(jnp.bfloat16)
        for name, leaf in given.xs._asdict().items()
        if narrow_gates or case.fields[name].kind in ("query", "key", "value")
    }
    given = given._replace(xs=given.xs._replace(**narrow))
    rounded = {"[0]"} | {f"gradient of .xs.{name}" for name in narrow}
    exact, own = (
        contract.evaluate(case.cell, "scan", contract.cast(given, dtype))
        for dtype in (np.float64, np.float32)
    )
    value = contract.evaluate(case.cell, form, given)
    for name, leaf in own.items():
        what = f"{case.name}, {form}, bfloat16 inputs: {name}"
        expected = jnp.dtype(jnp.bfloat16) if name in rounded else leaf.dtype
        assert value[name].dtype == expected, f"{what} is {value[name].dtype}"
        if name in rounded:
            far = contract.distance(value.pop(name), leaf)
            bound = 2 * contract.distance(leaf.astype(jnp.bfloat16), leaf)
            assert far <= bound, f"{what} is {far:.2e} from float32; allowed {bound:.2e}"
    wide = ({name: tree[name] for name in value} for tree in (own, exact))
    contract.assert_close(value, *wide, f"{case.name}, {form}, bfloat16 inputs")


def check_transformations(case: Case, form: str) -> None:
    """Under vmap and under checkpoint the results are the same."""
    first, second = (contract.problem(case, seed, 19) for seed in (9, 10))
    run = partial(contract.apply, case.cell, form)
    stacked = jax.tree.map(lambda *a: np.stack(a), first, second)
    mapped = jax.jit(jax.vmap(run))
    out = contract.to_numpy(mapped(stacked))
    for i, given in enumerate((first, second)):
        part = jax.tree.map(lambda a, i=i: a[i], out)
        _assert_values(case, given, part, f"{form}, under vmap")

    @jax.jit
    def gradients(xs):
        def loss(run, xs):
            y, _ = run(first._replace(xs=xs))
            return jnp.sum(jnp.sin(y))

        return [jax.grad(partial(loss, f))(xs) for f in (run, jax.checkpoint(run))]

    plain, rematerialised = (contract.named(tree) for tree in gradients(first.xs))
    for name, leaf in plain.items():
        assert contract.distance(rematerialised[name], leaf) < 1e-5, f"checkpoint: {name}"


def check_without_jit(case: Case, form: str) -> None:
    """Op by op the results are the same."""
    given = contract.problem(case, 9, 19)
    eager = contract.to_numpy(contract.apply(case.cell, form, given))
    _assert_values(case, given, eager, f"{form}, without jit")


def check_shared_heads(case: Case, form: str, counts: tuple[int, ...] = (4, 2, 1)) -> None:
    """A leaf with fewer heads equals the repeated one; its gradient is the sum of theirs."""
    length, heads = 13, 4
    given = contract.problem(case, 11, length, heads=heads)
    few = [counts[i % len(counts)] for i in range(len(given.xs))]
    xs = type(given.xs)(*(a[:, :, :h] for a, h in zip(given.xs, few, strict=True)))
    write = np.random.default_rng(11).random((contract.BATCH, length, 2)) < 0.7
    given = given._replace(xs=xs, write=write)
    repeated = jax.tree.map(lambda a: contract.repeat(a, heads), xs)
    repeated = given._replace(xs=repeated, write=contract.repeat(write, heads))
    exact, own = (
        contract.evaluate(case.cell, "scan", repeated, dtype) for dtype in (np.float64, None)
    )
    for name, count in zip(xs._fields, few, strict=True):
        for tree in exact, own:
            leaf = tree[f"gradient of .xs.{name}"]
            leaf = leaf.reshape(*leaf.shape[:2], count, -1, *leaf.shape[3:]).sum(axis=3)
            tree[f"gradient of .xs.{name}"] = leaf
    value = contract.evaluate(case.cell, form, given)
    contract.assert_close(value, own, exact, f"{case.name}, {form}, heads {few} of {heads}")


def check_layout(case: Case) -> None:
    """All forms give the trees, shapes and dtypes of `initial_state`, whatever they are given.

    With float64 allowed by the process, float32 and bfloat16 inputs still never widen.
    """
    serving = contract.forms(case)
    for dtype, wide, length, carried in (
        (np.float32, False, 9, True),
        (np.float32, True, 9, True),
        (jnp.bfloat16, False, 1, False),
        (jnp.bfloat16, True, 9, False),
        (np.float64, True, 9, True),
    ):
        state_dtype = np.float64 if dtype == np.float64 else np.float32
        given = contract.problem(case, 12, length, state=carried, masks=carried)
        given = given._replace(xs=contract.cast(given.xs, dtype))
        given = given._replace(state=contract.cast(given.state, state_dtype))
        with contract.x64(wide):
            fresh = memjax.initial_state(
                case.cell, given.params, contract.BATCH, contract.HEADS, state_dtype
            )
            for form in serving:
                y, state = jax.eval_shape(partial(contract.apply, case.cell, form), given)
                what = f"{case.name}, {form}, {np.dtype(dtype)}, float64 allowed: {wide}"
                assert contract.layout(state) == contract.layout(fresh), what
                assert y.dtype == dtype, f"{what}: y is {y.dtype}"
                assert y.shape[:3] == (contract.BATCH, length, contract.HEADS), what


def check_slope(case: Case) -> None:
    """The float64 gradient of `scan` along a random direction against a central difference."""
    given = contract.cast(contract.problem(case, 13, 29), np.float64)
    rng, step = np.random.default_rng(13), 1e-6
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape) * (a.dtype == np.float64), given)
    outs = []
    for sign in (1, -1):
        moved = jax.tree.map(
            lambda a, d, sign=sign: a + sign * step * d if a.dtype == np.float64 else a,
            given,
            direction,
        )
        outs.append(contract.named(contract.reference(case.cell, moved)))
    _, cotangents, gradients = contract.slopes(case.cell, "scan", given)
    difference = sum(
        float(np.sum(c * (outs[0][name] - outs[1][name]))) / (2 * step)
        for name, c in cotangents.items()
    )
    directions = contract.named(direction)
    slope = sum(float(np.sum(g * directions[name])) for name, g in gradients.items())
    scale = sum(float(np.linalg.norm(g)) for g in gradients.values())
    assert abs(slope - difference) < 1e-7 * scale, f"{case.name}: {slope} and {difference}"
