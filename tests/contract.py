"""Inputs, the float64 reference and the measures of the contract that every memory cell must keep.

Everything is drawn from the registry: `cases()` lists each registered cell and its variants, and
`draw` makes inputs from the cell's `fields`, so that a cell that registers is tested as it is.
All comparisons are made in numpy: on the CPU `jnp.max` loses NaN.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

import memjax
from memjax import inputs, registry
from memjax.cell import MemoryCell
from memjax.registry import BlockSpec, CellSpec
from memjax.typing import Field, fields

BATCH, HEADS, QUERIES = 3, 2, 2
SCENARIOS = ("random", "correlated", "equal", "gates")


class Case(NamedTuple):
    """A cell under test and the spec that says what its inputs hold."""

    name: str
    spec: CellSpec | BlockSpec
    cell: MemoryCell

    @property
    def fields(self) -> Mapping[str, Field]:
        """What the leaves of its inputs hold."""
        return fields(self.cell.inputs)


class Given(NamedTuple):
    """All that `memjax.run` is given, in numpy."""

    params: Any
    xs: Any
    state: Any = None
    reset: Any = None
    write: Any = None


def cases(variants: bool = True, blocks: bool = True) -> list[Case]:
    """Every registered cell with small chunks, and its variants and the cells of blocks when asked
    for.

    A cell that stands behind several names, whatever its scale, is there once, under that of its
    own file.
    """
    found: dict[MemoryCell, Case] = {}
    kinds = (CellSpec, BlockSpec) if blocks else (CellSpec,)
    specs = [registry.get(name) for kind in kinds for name in registry.names(kind)]
    specs = [spec for spec in specs if spec.cell is not None]
    for spec in sorted(specs, key=lambda s: type(s.cell()).__module__ != s.mixer.__module__):
        name = spec.name
        makers = {name: spec.cell}
        if variants:
            makers |= {f"{name}-{variant}": make for variant, make in spec.variants.items()}
        for label, make in makers.items():
            case = small(Case(label, spec, make()))
            plain = {"scale": None} if hasattr(case.cell, "scale") else {}
            found.setdefault(dataclasses.replace(case.cell, **plain), case)
    return list(found.values())


def small(case: Case, size: int = 8) -> Case:
    """The same case with chunks of `size` tokens; the fields named here change speed only."""
    return case._replace(cell=_small(case.cell, size))


def _small(cell: MemoryCell, size: int) -> MemoryCell:
    fields = {field.name for field in dataclasses.fields(cell)}
    changes: dict[str, Any] = dict.fromkeys(fields & {"chunk", "block"}, size)
    if "inner" in fields:
        changes["inner"] = _small(cell.inner, size)
    return dataclasses.replace(cell, **changes)


def forms(case: Case) -> list[str]:
    """The forms that serve this cell here, `scan` first."""
    if case.cell not in _SERVING:
        params = _init_params.eval_shape(case.cell, jax.random.key(0), HEADS)
        given = Given(params, draw(case, np.random.default_rng(0), 3))
        _SERVING[case.cell] = serving = ["scan"]
        for form in ("chunked", "pallas"):
            if getattr(type(case.cell), form) is getattr(MemoryCell, form):
                continue  # it has none of its own
            try:
                jax.eval_shape(partial(apply, case.cell, form), given)
            except NotImplementedError:
                continue
            serving.append(form)
    return _SERVING[case.cell]


_SERVING: dict[MemoryCell, list[str]] = {}  # what was found, at most once for a cell


def scenarios(case: Case) -> list[str]:
    """Those that differ for this cell."""
    gated = {field.kind for field in case.fields.values()} & {"log_decay", "rate"}
    return [name for name in SCENARIOS if gated or name != "gates"]


def units(cell: MemoryCell) -> set[int]:
    """The lengths at which a form may change its ways: a chunk, a block, a window."""
    found = {
        getattr(cell, name, None)
        for name in ("chunk", "block", "window", "frozen_chunk", "segment")
    }
    return {unit for unit in found - {None} if unit <= 64} or {8}


def lengths(cell: MemoryCell) -> list[int]:
    """1 and C - 1, C, C + 1, 3 C + 5 for every unit C of the cell."""
    return sorted({n for c in units(cell) for n in (1, c - 1, c, c + 1, 3 * c + 5) if n > 0})


def draw(case: Case, rng, length: int, heads: int = HEADS, scenario: str = "random") -> Any:
    """Inputs of one scenario, float32 leaves [BATCH, length, heads, ...].

    random: independent. correlated: keys at cosine 0.9. equal: one key for all tokens, rates at
    the upper end. gates: decays and rates at their limits among ordinary ones.
    """
    leaf = partial(_leaf, scenario)
    return inputs.draw(case.cell, rng, BATCH, length, heads, QUERIES, leaf)


def _leaf(scenario: str, field: Field, rng, shape: tuple[int, ...]) -> np.ndarray:
    ordinary = inputs.draw_field(field, rng, shape)
    if field.kind == "key" and scenario in ("correlated", "equal"):
        common = inputs.draw_field(field, rng, (1, 1, *shape[2:]))
        mixed = common + (1 / 3 if scenario == "correlated" else 0) * ordinary
        return mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)
    if field.kind in ("rate", "query_rate", "multiple") and scenario == "equal":
        return np.full(shape, max(field.low, field.high, key=abs))
    if field.kind not in ("log_decay", "rate", "query_rate", "multiple") or scenario != "gates":
        return ordinary
    decays = (0.0, -1e3)
    limits = decays if field.kind == "log_decay" else (field.low, field.high, min(1.0, field.high))
    leaf = np.where(rng.random(shape) < 0.5, rng.choice(limits, shape), ordinary)
    if field.kind == "log_decay":
        leaf[0, shape[1] // 2] = -np.inf
    return leaf


def problem(
    case: Case,
    seed: int,
    length: int,
    scenario: str = "random",
    heads: int = HEADS,
    state: bool = True,
    masks: bool = True,
) -> Given:
    """Inputs, with a state that is reachable and with resets and writes when asked for."""
    rng = np.random.default_rng(seed)
    params = to_numpy(_init_params(case.cell, jax.random.key(seed), heads))
    given = Given(params, draw(case, rng, length, heads, scenario))
    if state:
        prefix = Given(params, draw(case, rng, 11, heads), write=rng.random((BATCH, 11)) < 0.8)
        given = given._replace(state=values(case.cell, "scan", prefix)[1])
    if masks:
        given = given._replace(
            reset=reset_mask(length, rng), write=rng.random((BATCH, length)) < 0.7
        )
    return given


def reset_mask(length: int, rng) -> np.ndarray:
    """Row 0: at the first and the last token, two in a row, several in one chunk. Row 1: none.
    The others: rare."""
    reset = rng.random((BATCH, length)) < 0.1
    marks = np.array([0, 3, 4, 6, length // 2, length - 1])
    reset[:2] = False
    reset[0, marks[marks < length]] = True
    return reset


def apply(cell: MemoryCell, form: str | None, given: Given):
    """`memjax.run` of one form."""
    params, xs, state, reset, write = given
    return memjax.run(cell, params, xs, state=state, reset=reset, write=write, implementation=form)


def values(cell: MemoryCell, form: str | None, given: Given):
    """(y, state) in numpy."""
    return to_numpy(_values(cell, form, given))


_values = jax.jit(apply, static_argnums=(0, 1))
_init_params = jax.jit(lambda cell, key, heads: cell.init_params(key, heads), static_argnums=(0, 2))


def evaluate(
    cell: MemoryCell,
    form: str,
    given: Given,
    dtype: Any = None,
    optimised: bool = False,
    length: int | None = None,
) -> dict:
    """Name -> array for y, each leaf of the final state, and the gradients of all inputs.

    dtype: what the floating leaves are cast to; None leaves them. optimised, length: as in
    `slopes`.
    """
    given = given if dtype is None else cast(given, dtype)
    out, _, gradients = slopes(cell, form, given, optimised, length)
    return named(out) | {f"gradient of {name}": leaf for name, leaf in gradients.items()}


def scanned(cell: MemoryCell, given: Given, dtype: Any = None) -> dict:
    """What `evaluate` gives for `scan`. One compilation serves many lengths, with and without
    masks: masks are explicit, and tokens that are not written follow up to the longest of
    `lengths`."""
    length = batch_and_length(given)[1]
    found = evaluate(cell, "scan", _whole(cell, given), dtype, length=length)
    tokens = ("[0]", "gradient of .xs")
    return {n: a[:, :length] if n.startswith(tokens) else a for n, a in found.items()}


def scanned_values(cell: MemoryCell, given: Given):
    """What `values` gives for `scan`, compiled once as in `scanned`, for any state and masks."""
    y, state = values(cell, "scan", explicit(cell, _whole(cell, given)))
    return y[:, : batch_and_length(given)[1]], state


def explicit(cell: MemoryCell, given: Given) -> Given:
    """The same with all that may be None: the initial state, resets [B, T], writes [B, T, H]."""
    (batch, length), (reset, write) = batch_and_length(given), _masks(given)
    heads = memjax.recurrence.memories(given.params, given.state, given.xs)
    state = given.state
    if state is None:
        state = to_numpy(memjax.initial_state(cell, given.params, batch, heads))
    write = repeat(write.reshape(batch, length, -1), heads)
    return given._replace(state=state, reset=reset, write=write)


def batch_and_length(given: Given) -> tuple[int, int]:
    """(B, T)."""
    return jax.tree.leaves(given.xs)[0].shape[:2]


def _masks(given: Given) -> tuple[np.ndarray, np.ndarray]:
    """reset and write, with what None stands for."""
    reset = np.zeros(batch_and_length(given), bool) if given.reset is None else given.reset
    write = np.ones(batch_and_length(given), bool) if given.write is None else given.write
    return reset, write


def _whole(cell: MemoryCell, given: Given) -> Given:
    """The same with tokens behind it that are not written, up to the longest of `lengths`."""
    more, (reset, write) = max(0, lengths(cell)[-1] - batch_and_length(given)[1]), _masks(given)
    xs = jax.tree.map(partial(longer, more=more, mode="edge"), given.xs)
    return given._replace(xs=xs, reset=longer(reset, more), write=longer(write, more))


def longer(leaf: np.ndarray, more: int, mode: Any = "constant") -> np.ndarray:
    """A leaf [B, T, ...] with `more` tokens behind it: zeros, or with mode "edge" the last one."""
    return np.pad(leaf, [(0, 0), (0, more), *[(0, 0)] * (leaf.ndim - 2)], mode=mode)


def slopes(
    cell: MemoryCell,
    form: str,
    given: Given,
    optimised: bool = False,
    length: int | None = None,
) -> tuple[Any, dict, dict]:
    """(y, state), the cotangents c of their floating leaves, and the gradients of <c, (y, state)>.

    The cotangents are normal, the same for equal shapes, and representable in bfloat16; those of
    answers behind the first `length` tokens are zero. optimised: compiled as models are.
    """
    wide = any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(given))
    rng = np.random.default_rng(1)
    with x64(wide):
        cotangents = {}
        for name, leaf in floating(_values.eval_shape(cell, form, given)).items():
            more = 0 if name != "[0]" or length is None else leaf.shape[1] - length
            shape = leaf.shape if not more else (leaf.shape[0], length, *leaf.shape[2:])
            drawn = rng.normal(size=shape).astype(jnp.bfloat16).astype(np.float32)
            cotangents[name] = longer(drawn, more) if more else drawn
        compiled = _optimised if optimised else _gradients
        out, gradients = to_numpy(compiled(cell, form, given, list(cotangents.values())))
    return out, cotangents, dict(zip(floating(given), gradients, strict=True))


def _differentiate(cell, form, given, cotangents):
    leaves, tree = jax.tree.flatten(given)
    where = [i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.floating)]

    def loss(variable):
        every = dict(enumerate(leaves)) | dict(zip(where, variable, strict=True))
        out = apply(cell, form, tree.unflatten(every.values()))
        floats = floating(out).values()
        return sum(jnp.sum(c * a) for c, a in zip(cotangents, floats, strict=True)), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)([leaves[i] for i in where])
    return out, gradients


_gradients = jax.jit(_differentiate, static_argnums=(0, 1))
# As models are compiled; conftest.py turns optimisations off for the other tests.
_optimised = jax.jit(
    _differentiate,
    static_argnums=(0, 1),
    compiler_options={"xla_backend_optimization_level": 3},
)


def reference(cell: MemoryCell, given: Given):
    """(y, state) by a plain loop over tokens in float64: the definition, without `run`."""
    (batch, length), (reset, write) = batch_and_length(given), _masks(given)
    heads = memjax.recurrence.memories(given.params, given.state, given.xs)
    write = repeat(write.reshape(batch, length, -1), heads)
    with x64(True):
        params, xs, state = cast((given.params, given.xs, given.state), np.float64)
        xs = jax.tree.map(lambda a: repeat(a, heads), xs)
        fresh = to_numpy(memjax.initial_state(cell, params, batch, heads, jnp.float64))
        state, answers = fresh if state is None else state, []
        for t in range(length):
            state = where(reset[:, t, None], fresh, state)
            written, kept = to_numpy(_token(cell, params, state, tokens(xs, t)))
            y, state = where(write[:, t], written, (kept, state))
            answers.append(y)
    return np.stack(answers, axis=1), state


@partial(jax.jit, static_argnums=0)
def _token(cell, params, state, x):
    def one(params, state, x):
        return cell.step(params, state, x), cell.read(params, state, x)

    return jax.vmap(jax.vmap(one), (None, 0, 0))(params, state, x)


def tokens(tree, index):
    """Tokens [B, T, ...] -> those at an integer or a slice of the time axis."""
    return jax.tree.map(lambda a: a[:, index], tree)


def where(condition: np.ndarray, on_true, on_false):
    """`np.where` over trees, for a condition [B, H] or [B, 1]."""

    def choose(a, b):
        return np.where(np.expand_dims(condition, tuple(range(2, a.ndim))), a, b)

    return jax.tree.map(choose, on_true, on_false)


def repeat(leaf: np.ndarray, heads: int) -> np.ndarray:
    """A leaf [B, T, h, ...] that several heads share, as [B, T, heads, ...]."""
    return np.repeat(leaf, heads // leaf.shape[2], axis=2)


def rms(leaf: np.ndarray) -> float:
    """Root mean square, in float64."""
    return float(np.sqrt(np.mean(np.asarray(leaf, np.float64) ** 2)))


def distance(value: np.ndarray, exact: np.ndarray, floor: float = 0.0) -> float:
    """RMS of the difference over the RMS of `exact`, or over `floor` where that is larger.

    AssertionError for what is not finite.
    """
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    assert value.shape == exact.shape, f"shape {value.shape}, expected {exact.shape}"
    assert np.isfinite(value).all(), "not finite"
    assert np.isfinite(exact).all(), "the reference is not finite"
    difference = rms(value - exact)
    return difference / max(rms(exact), floor) if difference else 0.0


def floors(exact: dict) -> dict:
    """Name -> the least RMS that errors of a leaf are measured by.

    None for values. A gradient may be zero on paper (of a query when all keys are equal), where
    only rounding is left: it is measured by 1 % of the largest gradient at least.
    """
    sizes = {name: rms(leaf) for name, leaf in exact.items() if name.startswith("gradient")}
    least = 0.01 * max(sizes.values(), default=0.0)
    return {name: least if name in sizes else 0.0 for name in exact}


def assert_close(value: dict, own: dict, exact: dict, what: str, allowed: Any = None) -> None:
    """Each leaf at most max(1e-5, 3 x the float32 scan's own distance) from float64.

    allowed: name -> a distance that is allowed in any case.
    """
    assert value.keys() == exact.keys() == own.keys()
    for name, floor in floors(exact).items():
        scan = distance(own[name], exact[name], floor)
        assert scan < 1e-4, f"{what}: scan itself loses {name} in float32"
        bound = max(1e-5, 3 * scan, (allowed or {}).get(name, 0))
        try:
            far = distance(value[name], exact[name], floor)
        except AssertionError as error:
            raise AssertionError(f"{what}: {name}: {error}") from None
        assert far <= bound, f"{what}: {name} is {far:.2e} from float64; allowed {bound:.2e}"


def assert_identical(value, expected, what: str) -> None:
    """The same trees bit by bit."""
    value, expected = named(value), named(expected)
    assert value.keys() == expected.keys(), f"{what}: {sorted(value)}, expected {sorted(expected)}"
    for name in value:
        assert value[name].dtype == expected[name].dtype, f"{what}: dtype of {name}"
        assert np.array_equal(value[name], expected[name]), f"{what}: {name} differs"


def named(tree) -> dict:
    """Path -> leaf, in numpy."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def floating(tree) -> dict:
    """Path -> leaf, of the floating leaves only."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def layout(tree) -> dict:
    """Path -> dtype and shape."""
    return {
        jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def cast(tree, dtype):
    """The floating leaves in another dtype."""

    def one(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def to_numpy(tree):
    """The same tree of numpy arrays."""
    return jax.tree.map(np.asarray, tree)


def x64(on: bool):
    """float64 inside the `with` block, in the oldest and the newest JAX."""
    owner = jax if hasattr(jax, "enable_x64") else jax.experimental
    return owner.enable_x64(on)
