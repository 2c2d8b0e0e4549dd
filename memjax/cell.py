"""The memory cell: what it is to write a key-value pair into a memory and to read it.

A cell is defined for one memory (one head of one sequence) and one token by `init_state`,
`write` and `read`. Its sequence forms take whole batches and agree with `scan` in values and
gradients. `run` is the only thing that models call.
"""

import dataclasses
import functools
import warnings
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax import forms, spans
from memjax.axes import per_device, platform
from memjax.recurrence import (
    accumulator_dtype,
    memories,
    per_head,
    promote,
    scan_tokens,
    select,
)
from memjax.registry import get, names
from memjax.typing import AXES, Array, Bool, DTypeLike, PRNGKeyArray, PyTree, fields

FORMS = ("pallas", "chunked", "scan")


@dataclasses.dataclass(frozen=True)
class MemoryCell:
    """Base of all memories: hyper-parameters only, hashable and printable.

    A subclass defines `init_state`, `write`, `read`; it overrides `step` when it reads before it
    writes, `init_params` when the memory has weights of its own, `chunked` and `pallas` when it
    has faster forms of the same recurrence. `scan` is derived and never overridden.

    inputs: the NamedTuple type of its inputs, each leaf annotated with a `memjax.typing.Field`.

    Shapes of one token of one head: params and state are the cell's own trees, x is its inputs'
    NamedTuple with the axes [B, T, h] taken off. Sequence forms: params [H, ...], state
    [B, H, ...] or None for the initial one, xs leaves [B, T, h, ...], reset [B, T] or None,
    write [B, T] or [B, T, h] or None. Every function that returns both returns (y, state).
    """

    inputs: ClassVar[type]

    def init_params(self, key: PRNGKeyArray, heads: int) -> PyTree:
        """Weights of the memory itself, every leaf [heads, ...]; {} when it has none."""
        del key, heads
        return {}

    def init_state(self, params: PyTree) -> PyTree:
        """The state of one memory before its first token."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")

    def write(self, params: PyTree, state: PyTree, x: PyTree) -> PyTree:
        """The state after one token."""
        raise NotImplementedError(f"{type(self).__name__} must define write")

    def read(self, params: PyTree, state: PyTree, x: PyTree) -> Array:
        """What the memory answers to the query in x; uses the query leaves of x only."""
        raise NotImplementedError(f"{type(self).__name__} must define read")

    @property
    def linear(self) -> bool:
        """Whether `read` is linear in the state, so that a sum of memories answers with the sum of
        their answers."""
        return False

    @property
    def routes(self) -> bool:
        """Whether leaves of the query decide also what is written."""
        return hasattr(self, "inner") and self.inner.routes

    def readable(self, state: PyTree) -> PyTree:
        """What `read` needs of a state, None for the rest: what is kept of a memory that is not
        written any more."""
        return state

    def axis(self, letter: str) -> int | None:
        """The size of an axis of the inputs by its letter in `Field.shape`; None when it is
        free."""
        return getattr(self, AXES[letter]) if letter in AXES else None

    def check(self, length: int) -> None:
        """ValueError where the memory cannot take so many tokens."""

    def step(self, params: PyTree, state: PyTree, x: PyTree) -> tuple[Array, PyTree]:
        """One token: write, then read. The definition of the cell."""
        state = self.write(params, state, x)
        return self.read(params, state, x), state

    def preferred(self, length: int, differentiate: bool) -> tuple[str, ...]:
        """The forms to try for `length` tokens when the caller does not choose: those measured on
        this platform, fastest first (see `memjax.forms`), then the others."""
        measured = forms.fastest(platform(), type(self).__name__, length, differentiate)
        others = ("scan", "chunked") if length == 1 else ("chunked", "scan")
        return tuple(dict.fromkeys((*measured, *others)))

    def fresh(self, params: PyTree, dtype: DTypeLike) -> PyTree:
        """The initial state of one memory for accumulators of `dtype` (float32 or float64)."""
        state = self.init_state(params)
        return promote(state, dtype) if dtype == jnp.float64 else state

    @per_head
    def scan(self, params, state, xs, reset, write):
        """The sequential reference: `step`, token by token."""
        dtype = accumulator_dtype(params, state, xs)
        params = promote(params, dtype)
        fresh = self.fresh(params, dtype)
        output = jax.tree.leaves(xs)[0].dtype

        def step(state, x):
            y, state = self.step(params, state, promote(x, dtype))
            return y.astype(output), state

        def read(state, x):
            return self.read(params, state, promote(x, dtype)).astype(output)

        return scan_tokens(step, read, fresh, fresh if state is None else state, xs, reset, write)

    @per_head
    def ask(self, params, state, xs, reset, write):
        """What tokens are answered of which none is written: by the state, from the first reset on
        by the initial one."""
        dtype = accumulator_dtype(params, state, xs)
        params, output = promote(params, dtype), jax.tree.leaves(xs)[0].dtype

        def answers(state):
            read = jax.vmap(lambda x: self.read(params, state, promote(x, dtype)))
            return read(xs).astype(output)

        y = answers(state)
        if reset is not None:
            y = select(jnp.cumsum(reset) > 0, answers(self.fresh(params, dtype)), y)
        return y, state

    @property
    def folds(self) -> bool:
        """Whether `fold` and `compose` are there."""
        return type(self).fold is not MemoryCell.fold

    def fold(self, params, state, xs, reset, write):
        """What the tokens do to a state, as an element (through, state), leaves [B, H, ...].

        through: what passes of any state in front of them. state: as that of the forms, for the
        state that is given. Affine memories, S' = A S + B, have A and what they make of the state.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fold; run its tokens in order")

    def compose(self, later: PyTree, earlier: PyTree) -> PyTree:
        """The element of two spans of tokens of one memory, the later one folded from the initial
        state."""
        raise NotImplementedError(f"{type(self).__name__} has no fold; run its tokens in order")

    def apply(self, element: PyTree, state: PyTree) -> PyTree:
        """The state of one memory behind tokens that were folded from the initial state."""
        return self.compose(element, (element[0], state))[1]

    def chunked(self, params, state, xs, reset, write):
        """Parallel over chunks of tokens, in plain JAX."""
        raise NotImplementedError(f"{type(self).__name__} has no chunked form; use 'scan'")

    def pallas(self, params, state, xs, reset, write):
        """A kernel for the accelerator at hand; `run` gives each device its own rows or heads."""
        raise NotImplementedError(f"{type(self).__name__} has no Pallas kernel; use 'chunked'")


def contains(cell: MemoryCell, kind: type) -> bool:
    """Whether a cell, or one that it wraps, is of this class."""
    return type(cell) is kind or (hasattr(cell, "inner") and contains(cell.inner, kind))


def run(
    cell: MemoryCell,
    params: PyTree,
    xs: PyTree,
    *,
    state: PyTree | None = None,
    reset: Bool[Array, "B T"] | None = None,
    write: Bool[Array, "B T"] | Bool[Array, "B T h"] | None = None,
    implementation: str | tuple[str, ...] | None = None,
    differentiate: bool = True,
) -> tuple[Array, PyTree]:
    """Runs a memory over a batch of sequences, or over one token of each when decoding.

    Args:
      cell: the memory.
      params: its own weights, every leaf [H, ...]; {} when it has none.
      xs: its inputs, leaves [B, T, h, ...]. H counts memories; each h divides the next larger
        one and the largest is H, so a leaf that several heads share is not repeated.
      state: the state carried in, leaves [B, H, ...]; None for the initial state.
      reset: True where a token is the first of a document: the memory is emptied before the
        token is written.
      write: False where a token only reads; the memory stays bit-identical.
      implementation: "scan", "chunked" or "pallas"; a tuple of them is tried in order, with a
        warning that gives the reason where a form does not serve; None chooses. Every form gives
        the same result. On several devices "pallas" runs on each of them, for its own rows or
        heads (see `memjax.axes.per_device`).
      differentiate: whether gradients will be taken; only guides the choice of the form.

    Returns:
      y [B, T, H, ...] in the dtype of the first leaf of xs, and the state after the last token.

    Raises:
      ValueError: shapes, dtypes or trees that do not fit, or an unknown implementation.
      NotImplementedError: no form that was asked for serves this cell; all reasons are given.
    """
    length = _check(cell, params, xs, state, reset, write)
    # Custom gradients refuse numpy's arrays under `jax.checkpoint`.
    given = jax.tree.map(jnp.asarray, (params, state, xs, reset, write))
    serve = functools.partial(_serve, cell, implementation, differentiate)
    mesh = spans.sharing(given)
    if mesh is None or length == 1:
        return serve(*given)
    _check_shared(cell, length, mesh.shape[spans.AXIS])
    compose = jax.vmap(jax.vmap(cell.compose))  # sequences, heads
    dtype, heads = accumulator_dtype(params, state, xs), memories(params, state, xs)
    fresh = initial_state(cell, params, jax.tree.leaves(xs)[0].shape[0], heads, dtype)
    params, state, *tokens = given
    shared = spans.split(serve, cell.fold, compose, mesh)
    return shared(params, fresh if state is None else state, fresh, *tokens)


def _serve(cell, implementation, differentiate, params, state, xs, reset, write):
    """`run` of one device, of arguments that are checked."""
    given, length = (params, state, xs, reset, write), jax.tree.leaves(xs)[0].shape[1]
    chosen = cell.preferred(length, differentiate) if implementation is None else implementation
    reasons: list[str] = []
    for form in (chosen,) if isinstance(chosen, str) else chosen:
        if form not in FORMS:
            raise ValueError(f"implementation {form!r}: allowed are {', '.join(FORMS)}, or None")
        try:
            serve = getattr(cell, form)
            found = per_device(serve)(*given) if form == "pallas" else serve(*given)
        except NotImplementedError as reason:
            reasons.append(f"{form}: {reason}")
            continue
        if reasons and implementation is not None:
            warnings.warn(f"'{form}' runs instead of {'; '.join(reasons)}", stacklevel=2)
        return found
    raise NotImplementedError("; ".join(reasons))


def _check_shared(cell: MemoryCell, length: int, devices: int) -> None:
    """ValueError for a memory or a length with which devices cannot share a sequence."""
    shown = f"{type(cell).__name__} with config.mesh.context={devices}"
    if not cell.folds:
        able = [name for name in names() if get(name).cell().folds]
        raise ValueError(
            f"{shown}: devices share sequences of memories alone for which the tokens of a device "
            f"act on the state as one small element: {', '.join(able)}. Use one of these, or "
            "context=1 and split rows (data, fsdp) or heads (tensor)"
        )
    if length % devices:
        raise ValueError(
            f"{shown}: {length} tokens do not divide into {devices} equal parts; use a length "
            f"that is a multiple of {devices}, or another size of context"
        )


def initial_state(
    cell: MemoryCell, params: PyTree, batch: int, heads: int, dtype: DTypeLike = jnp.float32
) -> PyTree:
    """The state of `batch` x `heads` memories before their first token, leaves [B, H, ...]."""
    one = jax.vmap(lambda p: cell.fresh(p, dtype), axis_size=heads)(params)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), one)


def _check(cell, params, xs, state, reset, write) -> int:
    """Refuses inputs that do not fit together; returns T."""
    name = type(cell).__name__
    batch, length = _check_inputs(name, cell, xs)
    if length == 0:
        raise ValueError(f"{name}: the sequence is empty (T = 0); give at least one token")
    cell.check(length)
    heads = memories(params, state, xs)
    if any(heads % leaf.shape[2] for leaf in jax.tree.leaves(xs)):
        given = {leaf: getattr(xs, leaf).shape[2] for leaf in xs._fields}
        raise ValueError(f"{name}: {heads} memories; inputs must have divisors; given {given}")
    for label, mask in (("reset", reset), ("write", write)):
        if mask is None:
            continue
        ranks = (2, 3) if label == "write" else (2,)
        if mask.ndim not in ranks or mask.shape[:2] != (batch, length) or mask.dtype != bool:
            raise ValueError(
                f"{name}: {label} must be bool[{batch}, {length}]; given {mask.dtype}{mask.shape}"
            )
    weights = jax.eval_shape(lambda: cell.init_params(jax.random.key(0), heads))
    if _shapes(params) != _shapes(weights):
        raise ValueError(
            f"{name}: the memory's own weights do not fit; given {_leaves(params)}, expected "
            f"{_leaves(weights)}; make them with cell.init_params(key, {heads})"
        )
    if state is not None:
        heads = max(memories(params, None, xs), memories({}, state, xs))
        dtype = accumulator_dtype(params, state, xs)
        fresh = functools.partial(initial_state, cell, batch=batch, heads=heads, dtype=dtype)
        wanted = _leaves(jax.eval_shape(fresh, params))
        if _leaves(state) != wanted:
            raise ValueError(
                f"{name}: the state does not fit; given {_leaves(state)}, expected {wanted}"
            )
    return length


def _check_inputs(name: str, cell: MemoryCell, xs: PyTree) -> tuple[int, int]:
    """Refuses inputs that are not the cell's; returns B and T."""
    if not hasattr(cell, "inputs"):
        raise NotImplementedError(f"{name} must define inputs, the NamedTuple type of its inputs")
    wanted = {leaf: field.shape.split() for leaf, field in fields(cell.inputs).items()}
    if getattr(xs, "_fields", None) != tuple(wanted):
        raise ValueError(
            f"{name}: inputs must be {cell.inputs.__module__}.{cell.inputs.__qualname__}"
            f"({', '.join(wanted)}); given {type(xs).__name__}"
            f"({', '.join(getattr(xs, '_fields', ()))})"
        )
    given = {leaf: tuple(getattr(xs, leaf).shape) for leaf in wanted}
    for leaf, axes in wanted.items():
        sizes = [cell.axis(letter) for letter in axes]
        differ = any(n not in (None, m) for n, m in zip(sizes, given[leaf][3:], strict=False))
        if len(given[leaf]) != 3 + len(axes) or differ:
            named = [letter if n is None else n for letter, n in zip(axes, sizes, strict=True)]
            shape = ", ".join(map(str, ["B", "T", "h", *named]))
            raise ValueError(f"{name}: {leaf} must be [{shape}]; given {list(given[leaf])}")
    leading = {shape[:2] for shape in given.values()}
    if len(leading) > 1:
        raise ValueError(f"{name}: inputs differ in their axes [B, T]; given {given}")
    return leading.pop()


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Path -> shape, for comparing trees of any dtype."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): a.shape for path, a in leaves}


def _leaves(tree: PyTree) -> dict[str, str]:
    """Path -> dtype and shape, for comparing and showing trees."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{a.dtype}{list(a.shape)}" for path, a in leaves}
