"""Products with a stated precision, and the inverses of triangles that are made of them."""

import jax.numpy as jnp
from jax import lax


def dot(a, b, of_a: int, of_b: int):
    """a [m, n] times b, contracted over axis `of_a` of a and `of_b` of b; float32 sums."""
    exact = a.dtype == b.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((of_a,), (of_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def turned(x):
    """[C, heads, D] <-> [heads, C, D]."""
    return jnp.swapaxes(x, 0, 1)


def places(size: int):
    """Row and column of every place of [size, size]."""
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def parts(x, like):
    """What `dot_in_parts` makes products of: x itself, or for an op in bfloat16 a float32 x as a
    sum of two arrays that bfloat16 holds. Split what is used twice once.

    They stay float32 up to the product: v5e has no arithmetic of bfloat16, and turning what was
    rounded from the tiles of one into those of the other takes longer than rounding it twice.
    """
    if like == jnp.float32 or x.dtype == jnp.bfloat16:
        return (x,)
    main = x.astype(jnp.bfloat16).astype(jnp.float32)
    return main, x - main


def rounded(x, like):
    """x in the op's dtype, as the only one of its parts."""
    return (x.astype(like),)


def dot_in_parts(a, b, of_a: int, of_b: int):
    """`dot` of two `parts`, for where terms cancel: exact to float32, or in bfloat16 by 2 or 3
    products to 4e-6; they are one, over all terms side by side, where that moves nothing."""
    if len(a) == len(b) == 1:
        return dot(a[0], b[0], of_a, of_b)
    terms = [(a[0], y) for y in b] + [(x, b[0]) for x in a[1:]]
    if of_a == of_b == 0 or a[0].shape[of_a] % 128 == 0:
        sides = ([x.astype(jnp.float32) for x in side] for side in zip(*terms, strict=True))
        left, right = sides
        terms = [(jnp.concatenate(left, axis=of_a), jnp.concatenate(right, axis=of_b))]
    half = jnp.bfloat16
    return sum(dot(x.astype(half), y.astype(half), of_a, of_b) for x, y in terms)


def in_step(runs) -> list:
    """What generators return that are advanced in turn, one for each head: they yield where a
    product has to be waited for, and the compiler finds those of other heads next to it."""
    runs = list(runs)
    results, left = [None] * len(runs), list(range(len(runs)))
    while left:
        for n in tuple(left):
            try:
                next(runs[n])
            except StopIteration as end:
                results[n] = end.value
                left.remove(n)
    return results


def unit_lower_inverse(lower, like, apart: int = 1):
    """(I + L)^-1 of strictly lower L [C, C], C a power of two, as a generator for `in_step`. L is
    zero within blocks of `apart` places on the diagonal, a power of two below C.

    The inverse of blocks of b places on the diagonal becomes that of blocks of 2 b by
    X <- X - X L' X, L' what joins the two halves of each block. Exact for equal keys, and nothing
    on the way is larger than the inverse; powers of L grow without bound. In bfloat16 this X has
    all factors rounded, and X + X (E + E E) with its residual E = I - (I + L) X is as near as with
    factors in two parts: the terms left out are X E^3.
    """
    size = lower.shape[0]
    i, j = places(size)

    def joins(bits):
        return (i >> (bits + 1) == j >> (bits + 1)) & (i >> bits != j >> bits)

    unit = jnp.where(i == j, 1.0, 0.0)
    first = apart.bit_length() - 1
    found = unit if first else unit - jnp.where(joins(0), lower, 0)
    low = lower.astype(like)
    for bits in range(max(first, 1), size.bit_length() - 1):
        half = 1 << bits
        factor = found.astype(like)
        inner = dot(_second(jnp.where(joins(bits), low, 0), half), factor, 1, 0)
        yield
        change = dot(_second(factor, half), _spread(inner.astype(like), half), 1, 0)
        yield
        found = found - _spread(change, half)
    if like == jnp.float32:
        return found
    factor = found.astype(like)
    error = unit - factor.astype(jnp.float32) - dot_in_parts(parts(lower, like), (factor,), 1, 0)
    yield
    rest = error.astype(like)
    rest = (error + dot(rest, rest, 1, 0)).astype(like)
    yield
    return factor.astype(jnp.float32) + dot(factor, rest, 1, 0)


def _second(x, half: int):
    """The rows of the second halves of blocks of 2 half rows, which are those that change; all
    rows where half is no whole number of tiles."""
    if half < 16:
        return x
    return jnp.concatenate([x[n : n + half] for n in range(half, x.shape[0], 2 * half)])


def _spread(x, half: int):
    """Rows of `_second` in their places, zeros between them."""
    if half < 16:
        return x
    zero = jnp.zeros((half, x.shape[1]), x.dtype)
    rows = (x[n : n + half] for n in range(0, x.shape[0], half))
    return jnp.concatenate([part for row in rows for part in (zero, row)])
