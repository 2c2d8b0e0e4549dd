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
    sum of two arrays of bfloat16. Split what is used twice once."""
    if like == jnp.float32 or x.dtype == jnp.bfloat16:
        return (x,)
    main = x.astype(jnp.bfloat16)
    return main, (x - main.astype(jnp.float32)).astype(jnp.bfloat16)


def rounded(x, like):
    """x in the op's dtype, as the only one of its parts."""
    return (x.astype(like),)


def dot_in_parts(a, b, of_a: int, of_b: int):
    """`dot` of two `parts`, for where terms cancel: exact to float32, or in bfloat16 by 2 or 3
    products to 4e-6."""
    total = dot(a[0], b[0], of_a, of_b)
    for rest in b[1:]:
        total = total + dot(a[0], rest, of_a, of_b)
    for rest in a[1:]:
        total = total + dot(rest, b[0], of_a, of_b)
    return total


def unit_lower_inverses(lowers, like):
    """(I + L)^-1 of strictly lower L [C, C], C a power of two: those of all heads side by side, so
    that a product need not wait for the one before it.

    The inverse of blocks of b places on the diagonal becomes that of blocks of 2 b by
    X <- X - X L' X, L' what joins the two halves of each block. Exact for equal keys, and nothing
    on the way is larger than the inverse; powers of L grow without bound. In bfloat16 this X has
    all factors rounded, and X + X (E + E E) with its residual E = I - (I + L) X is as near as with
    factors in two parts: the terms left out are X E^3.
    """
    size = lowers[0].shape[0]
    i, j = places(size)

    def joins(bits):
        return (i >> (bits + 1) == j >> (bits + 1)) & (i >> bits != j >> bits)

    unit = jnp.where(i == j, 1.0, 0.0)
    found = [unit - jnp.where(joins(0), x, 0) for x in lowers]
    rounded = [x.astype(like) for x in lowers]
    for bits in range(1, size.bit_length() - 1):
        half = 1 << bits
        factors = [x.astype(like) for x in found]
        joined = [_second(jnp.where(joins(bits), x, 0), half) for x in rounded]
        inner = [dot(x, y, 1, 0) for x, y in zip(joined, factors, strict=True)]
        inner = [_spread(x.astype(like), half) for x in inner]
        changes = [dot(_second(x, half), y, 1, 0) for x, y in zip(factors, inner, strict=True)]
        found = [x - _spread(y, half) for x, y in zip(found, changes, strict=True)]
    if like == jnp.float32:
        return found
    factors = [x.astype(like) for x in found]
    errors = [
        unit - x.astype(jnp.float32) - dot_in_parts(parts(y, like), (x,), 1, 0)
        for x, y in zip(factors, lowers, strict=True)
    ]
    rests = [x.astype(like) for x in errors]
    rests = [(x + dot(y, y, 1, 0)).astype(like) for x, y in zip(errors, rests, strict=True)]
    return [x.astype(jnp.float32) + dot(x, y, 1, 0) for x, y in zip(factors, rests, strict=True)]


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
