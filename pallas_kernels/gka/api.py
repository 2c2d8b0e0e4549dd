"""Ridge regression over all past pairs by kernels: checks, padding, and the choice of blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common, decays
from pallas_kernels.chunk_linear.api import chunk_linear
from pallas_kernels.gka import tpu, tpu_vjp
from pallas_kernels.gka.reference import weights_of

NAME = "gka"
LONGEST = 64  # tokens of a chunk: longer ones take more products of pairs


def gka(
    q, k, v, beta, alpha, *, g=None, initial_state=None, reset=None, ridge=0.02, iterations=30,
    chunk=None, platform=None,
):  # fmt: skip
    """H_t = e^{g_t} H_{t-1} + beta_t^2 k_t k_t^T, U_t = e^{g_t} U_{t-1} + beta_t^2 k_t v_t^T,
    x_t = (H_t + a ||H_t|| I)^-1 q_t, o_t = K^-1/2 U_t^T (q_t + alpha_t (x_t - q_t)).

    Gated KalmaNet (Peng et al. 2025, arXiv 2511.21016): x_t by so many steps of Chebyshev's
    iteration, whose gradients are its own. Two kernels: one solves, its state H; `chunk_linear`
    reads, in float32, because x is large where U is small.

    Args:
      q, k: [B, T, h, K], h dividing H; head i of H takes head i h // H. K 64, 128 or 256.
      v: [B, T, H, V], V 64, 128 or 256. All three float32 or all bfloat16.
      beta, alpha: [B, T, H], 0 to 1, taken as float32. Where beta is 0 nothing is written.
      g: log decay <= 0, [B, T, H], taken as float32; None for no decay.
      initial_state: (H [B, H, K, K], symmetric, U [B, H, K, V]), finite; None for zero.
      reset: bool [B, T], True where the state is emptied before the token is written.
      ridge: a > 0. iterations: at least 1.
      chunk: tokens in a chunk, 16, 32 or 64; None chooses. Changes speed only.
      platform: "tpu", or with its generation, such as "tpu v5e"; None for the default backend.

    Returns:
      o [B, T, H, V] in the dtype of v, and the last (H, U), float32. Both, and the gradients, are
      those of `reference.sequential`, exact to float32 for float32. Under `jax.checkpoint` the
      names "memory_out" (what is returned) and "memory_state" (what the backward pass needs) can be
      saved, so that the forward kernels run once. There is no forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype, shape or chunk.
      ValueError: shapes that do not fit together; ridge or iterations out of range.
    """
    held, linear = (None, None) if initial_state is None else initial_state
    _check(q, v, alpha, g, held, linear, ridge, iterations)
    if chunk is not None and chunk not in common.CHUNKS[1:]:
        raise NotImplementedError(f"{NAME} takes chunks of {common.CHUNKS[1:]}; given {chunk}")
    g = jnp.zeros(v.shape[:3], jnp.float32) if g is None else g
    call = common.call(
        *(NAME, {"q": q, "k": k}, v, g, linear, reset, None, chunk, platform),
        size_of=functools.partial(_bytes, width=q.shape[-1], like=v, iterations=iterations),
        beta=beta,
        platforms=("tpu",),
    )
    rows_q, rows_k, _, padded_g, padded_reset, linear = call.arrays
    beta, alpha = (a.astype(jnp.float32) for a in (beta, alpha))
    if held is None:
        held = jnp.zeros((*linear.shape[:3], q.shape[-1]), jnp.float32)
    rates = common.padded(beta * beta, call.static.chunk)
    how = call.static, q.dtype, ridge, iterations
    # Both kernels' gradients of q and of k are added before they are rounded.
    rows_q, rows_k, held = (a.astype(jnp.float32) for a in (rows_q, rows_k, held))
    solved, held = _solve(how, rows_q, rows_k, rates, padded_g, padded_reset, held)
    solved = checkpoint_name(solved, "memory_state")
    keys, asked, solved = (a[:, : v.shape[1]] for a in (rows_k, rows_q, solved))
    asked = asked + alpha[..., None] * (solved - asked)
    o, linear = chunk_linear(
        *(asked, beta[..., None] * keys, beta[..., None] * v.astype(jnp.float32)),
        g=g,
        initial_state=linear,
        reset=reset,
        platform=platform,
    )
    return checkpoint_name((o.astype(v.dtype), (held, linear)), "memory_out")


def _check(q, v, alpha, g, held, linear, ridge, iterations):
    """ValueError for what `common.call` does not look at."""
    if q.ndim == v.ndim == 4:
        batch, length, heads, size = v.shape
        width = q.shape[-1]
        wanted = {
            "alpha": (alpha, (batch, length, heads)),
            "g": (g, (batch, length, heads)),
            "initial_state[0]": (held, (batch, heads, width, width)),
            "initial_state[1]": (linear, (batch, heads, width, size)),
        }
        for name, (array, shape) in wanted.items():
            if array is not None and array.shape != shape:
                raise ValueError(f"{NAME}: {name} must be {list(shape)}; given {list(array.shape)}")
    if ridge <= 0 or iterations < 1:
        raise ValueError(
            f"{NAME}: ridge must be above 0 and iterations at least 1; given {ridge} and "
            f"{iterations}"
        )


def _bytes(tokens: int, heads: int, width: int, like, iterations: int) -> float:
    """Of VMEM, of the backward kernel: iterates, sums over them, factors, states, and tokens."""
    if tokens > LONGEST:
        return float("inf")
    lanes, size = max(width, 128), like.dtype.itemsize
    of_tokens = (iterations + 8) * 4 + 3 * (4 * size + 2 * 4)
    of_factors = 6 if size == 2 else 4
    of_states = of_factors + 4 * 5
    pairs = 4 * max(tokens, 128) * 12
    return heads * (tokens * (of_tokens * lanes + pairs) + of_states * lanes * width)


# ---------------------------------------------------------------- what solves


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(how, q, k, rates, g, reset, initial):
    """(x, last H) of float32 q and k that the dtype in `how` holds."""
    return _forward(how, q, k, rates, g, reset, initial, keep=False)


def _arrays(how, q, k, rates, g, reset):
    """(q, k, rates as rows and as columns, decays, weights of the iterations), options."""
    static, dtype, ridge, iterations = how
    columns = common.by_chunk(rates, static)
    options = static.options() | {"ridge": ridge}
    del options["scale"]
    weights = jnp.asarray(weights_of(ridge, iterations), jnp.float32)
    rows, decaying = jnp.swapaxes(columns, -1, -2), decays.arrays(g, reset, static)
    return (q.astype(dtype), k.astype(dtype), rows, columns, decaying, weights), options


def _forward(how, q, k, rates, g, reset, initial, keep):
    arrays, options = _arrays(how, q, k, rates, g, reset)
    return tpu.forward(*(*arrays, initial), keep=keep, **options)


def _solve_forward(how, q, k, rates, g, reset, initial):
    x, final, kept = _forward(how, q, k, rates, g, reset, initial, keep=True)
    return (x, final), (q, k, rates, g, reset, checkpoint_name(kept, "memory_state"))


def _solve_backward(how, saved, cotangents):
    q, k, rates, g, reset, kept = saved
    arrays, options = _arrays(how, q, k, rates, g, reset)
    found = tpu_vjp.backward(*(*arrays, kept, *cotangents), **options)
    dq, dk, drows, dcolumns, dg, dinitial = found
    drates = common.by_token(jnp.swapaxes(drows, -1, -2) + dcolumns)
    return dq, dk, drates, decays.clipped(dg, g), None, dinitial


_solve.defvjp(_solve_forward, _solve_backward)
