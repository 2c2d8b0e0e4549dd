"""What a chunk's steps do to its rows, from the scalars of the rows.

With G the sums of the log decays g since the chunk's start, M those of m, A[t, j] = e^{G_t - G_j}
for tokens j <= t that are written, B[j, i] = e^{M_j - M_i} for i <= j and R[t, i] = r_t[age]:

    W_t = alpha_t W + f_t Z + phi_t W_f - sum_i P[t, i] k_i e_i^T        P = A B R
    Z_t = mu_t Z - sum_i H[t, i] k_i e_i^T                               H = B R
    alpha = e^G, mu = e^M, f = A mu, phi = A rho

W, Z: in front of the chunk; W_f: where documents begin; rho: e^g at a document's first token, 0
elsewhere. The bases have the same: alpha, f, phi and P of the row behind which a base stands, as
products with a matrix of ones S, and 1 for what a base is itself. Decays over a document's border
are zero. Without momentum B = 1 and there is no Z.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.deep_memory.layout import CARRIED, FRESH, OPENED
from pallas_kernels.products import dot_in_parts, parts, places, rounded


def names(momentum: bool, context: int, fresh: bool) -> tuple[str, ...]:
    """The columns that a chunk has of each head. Sums have two parts, see `decays`."""
    return (
        *("whole", "part", "base", "use"),
        *(("whole_m", "part_m") if momentum else ()),
        *(("rho",) if fresh else ()),
        *(("asking", "paired") if context > 1 else ()),
        *(f"rate{age}" for age in range(context)),
    )


def gradient_names(momentum: bool, context: int) -> tuple[str, ...]:
    """The columns of gradients."""
    return ("g", *(("m",) if momentum else ()), *(f"rate{age}" for age in range(context)))


class Columns(NamedTuple):
    """columns [C, n heads], of each name those of all heads; rows: its transpose; head: of whom."""

    columns: Any
    rows: Any
    names: tuple[str, ...]
    heads: int
    head: int

    def __contains__(self, name):
        return name in self.names

    def column(self, name):
        """[C, 1]."""
        at = self.names.index(name) * self.heads + self.head
        return self.columns[:, at : at + 1]

    def row(self, name):
        """[1, C]."""
        at = self.names.index(name) * self.heads + self.head
        return self.rows[at : at + 1]


def column_of(row):
    """[1, C] -> [C, 1]."""
    return jnp.swapaxes(jnp.broadcast_to(row, (8, row.shape[1])), 0, 1)[:, :1]


def row_of(column):
    """[C, 1] -> [1, C]."""
    return jnp.swapaxes(jnp.broadcast_to(column, (column.shape[0], 8)), 0, 1)[:1]


class Own(NamedTuple):
    """R where a step learns from its own pair: a diagonal."""

    rates: Any  # [1, C]

    def times(self, x):
        """x R."""
        return x * self.rates

    def back(self, x, d):
        """dx and the columns of dr from those of x R."""
        return d * self.rates, [column_of(jnp.sum(d * x, axis=0, keepdims=True))]


class Older(NamedTuple):
    """R where it learns from older ones too, and the age of pairs, [C, C]."""

    rates: Any
    age: Any
    context: int
    like: Any

    def times(self, x):
        return dot_in_parts(parts(x, self.like), parts(self.rates, self.like), 1, 0)

    def back(self, x, d):
        split = parts(d, self.like)
        drates = dot_in_parts(parts(x, self.like), split, 0, 0)
        dx = dot_in_parts(split, parts(self.rates, self.like), 1, 1)
        return dx, self.gradients(drates)

    def gradients(self, drates) -> list:
        """The columns of dr from dR."""
        ages = (jnp.where(self.age == n, drates, 0) for n in range(self.context))
        return [jnp.sum(x, axis=1, keepdims=True) for x in ages]


def rates_of(of: Columns, context: int, like):
    """R of a head."""
    if context == 1:
        return Own(of.row("rate0"))
    age = of.column("asking") - of.row("paired")
    rates = sum(jnp.where(age == n, of.column(f"rate{n}"), 0) for n in range(context))
    return Older(rates, age, context, like)


def between(of: Columns, whole: str, part: str, mask):
    """The decays from token j to token i where the mask is, which has to leave j <= i alone."""
    exponent = of.column(whole) - of.row(whole) + (of.column(part) - of.row(part))
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


class Factors(NamedTuple):
    """Of one head in one chunk, in the letters of the module; None for what is not there.

    coefficients [C, n]: columns of alpha and, where they are, f and phi; of_bases: those of the
    bases; carried [C, 1]: 1 where the base was carried into the chunk; paths, paths_of_bases: P.
    last: the last rows [1, C] of P, H and P of the bases, which W, Z and W_b take.
    """

    of: Columns
    rates: Any
    a: Any
    b: Any
    h: Any
    mu: Any
    rho: Any
    select: Any
    coefficients: Any
    of_bases: Any
    carried: Any
    paths: Any
    paths_of_bases: Any
    last: list


def factors(of: Columns, context: int, like) -> Generator[None, None, Factors]:
    """Of one head, a generator for `products.in_step`; like: the dtype of the op."""
    size = of.rows.shape[1]
    i, j = places(size)
    rates = rates_of(of, context, like)
    a = between(of, "whole", "part", (i >= j) & (of.row("use") > 0))
    base = of.column("base")
    select = jnp.where(j == base.astype(jnp.int32), 1.0, 0.0).astype(like)
    coefficients, itself = [jnp.exp(of.column("whole") + of.column("part"))], [base == OPENED]
    b = mu = rho = None
    if "whole_m" in of:
        b = between(of, "whole_m", "part_m", i >= j)
        mu = jnp.exp(of.row("whole_m") + of.row("part_m"))
        h = rates.times(b)
        coefficients.append(jnp.sum(a * mu, axis=1, keepdims=True))
        itself.append(jnp.zeros_like(itself[0]))
        yield
    else:
        h = None
    if "rho" in of:
        rho = of.row("rho")
        coefficients.append(jnp.sum(a * rho, axis=1, keepdims=True))
        itself.append(base == FRESH)
    if h is None:
        paths = rates.times(a)
    else:
        paths = dot_in_parts(parts(a, like), parts(h, like), 1, 0)
    yield
    both = jnp.concatenate(coefficients, axis=1)
    of_bases = dot_in_parts((select,), parts(both, like), 1, 0)
    flags = jnp.concatenate([jnp.where(x, 1.0, 0.0) for x in itself], axis=1)
    paths_of_bases = dot_in_parts((select,), parts(paths, like), 1, 0)
    yield
    last = [x[size - 1 :] for x in (paths, h, paths_of_bases) if x is not None]
    return Factors(
        of,
        rates,
        a,
        b,
        h,
        mu,
        rho,
        select,
        both,
        of_bases + flags,
        jnp.where(base == CARRIED, 1.0, 0.0),
        paths,
        paths_of_bases,
        last,
    )


def factors_back(
    x: Factors, dcoefficients, dof_bases, dpaths, dpaths_of_bases, dh, dlast, like
) -> Generator[None, None, list]:
    """The columns of `gradient_names` from the gradients of what `Factors` has of its name; dh: of
    the last row of H, [1, C]; dlast: of mu behind the chunk, [1, 1]; both None without momentum."""
    size = x.a.shape[0]
    i, j = places(size)
    onwards = jnp.where(j >= i, 1.0, 0.0).astype(like)
    dcoefficients = dcoefficients + dot_in_parts((x.select,), rounded(dof_bases, like), 0, 0)
    dpaths = dpaths + dot_in_parts((x.select,), parts(dpaths_of_bases, like), 0, 0)
    yield
    columns = [dcoefficients[:, n : n + 1] for n in range(dcoefficients.shape[1])]
    dalpha, *columns = columns
    if x.h is None:
        da, drates = x.rates.back(x.a, dpaths)
        yield
        dm = []
    else:
        df, *columns = columns
        split = parts(dpaths, like)
        da = dot_in_parts(split, rounded(x.h, like), 1, 1) + df * x.mu
        dh = jnp.where(i == size - 1, dh, 0) + dot_in_parts(rounded(x.a, like), split, 0, 0)
        yield
        dmu = jnp.sum(x.a * df, axis=0, keepdims=True)
        dmu = dmu + jnp.where(j[:1] == size - 1, dlast, 0)
        db, drates = x.rates.back(x.b, dh)
        yield
        crossing = dot_in_parts((onwards,), parts(db * x.b, like), 1, 0)
        yield
        dm = [summed(jnp.where(j < i, crossing, 0) + jnp.where(j >= i, x.mu * dmu, 0))]
    own = dalpha * x.coefficients[:, :1]
    if x.rho is not None:
        (dphi,) = columns
        da = da + dphi * x.rho
    crossing = dot_in_parts((onwards,), rounded(da * x.a, like), 1, 0)
    since = dot_in_parts((onwards,), parts(own, like), 1, 0)
    yield
    dg = summed(jnp.where(j < i, crossing, 0)) + since
    if x.rho is not None:
        drho = jnp.sum(x.a * dphi, axis=0, keepdims=True)
        dg = dg + x.of.column("rho") * column_of(drho)
    return [dg, *dm, *drates]


def summed(x):
    """[C, n] -> [C, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)
