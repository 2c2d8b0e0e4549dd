"""The contract can fail: each law is shown a cell with a mistake that it must catch."""

import contract
import contract_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.cells import _matrix
from memjax.cells.gated_delta_net import GatedDeltaNet


class ResetsAfterTheWrite(GatedDeltaNet):
    """Empties the memory behind the first token of a document instead of in front of it."""

    def chunked(self, params, state, xs, reset, write):
        reset = None if reset is None else jnp.roll(reset, 1, axis=1).at[:, 0].set(False)
        return super().chunked(params, state, xs, reset, write)


class LeaksTheLastGate(GatedDeltaNet):
    """Adds something of the chunk's last decay to every answer."""

    def chunked(self, params, state, xs, reset, write):
        y, state = super().chunked(params, state, xs, reset, write)
        return y + 1e-6 * jnp.maximum(xs.g[:, -1:, :, None], -1), state


class SeesTheNextKey(GatedDeltaNet):
    """Writes each value under the next token's key."""

    def chunked(self, params, state, xs, reset, write):
        xs = xs._replace(k=xs.k.at[:, :-1].set(xs.k[:, 1:]))
        return super().chunked(params, state, xs, reset, write)


class LosesTheState(GatedDeltaNet):
    """Starts from zero whatever it is given."""

    def chunked(self, params, state, xs, reset, write):
        return super().chunked(params, None, xs, reset, write)


class DecaysUnwritten(GatedDeltaNet):
    """Unwritten tokens write nothing and decay the state all the same."""

    def chunked(self, params, state, xs, reset, write):
        if write is not None:
            write = write if write.ndim == 3 else write[..., None]
            xs = xs._replace(beta=jnp.where(write, xs.beta, 0))
        return super().chunked(params, state, xs, reset, None)


class MixesHeads(GatedDeltaNet):
    """The decay of a head is the mean over the heads."""

    def chunked(self, params, state, xs, reset, write):
        g = jnp.broadcast_to(jnp.mean(xs.g, axis=2, keepdims=True), xs.g.shape)
        return super().chunked(params, state, xs._replace(g=g), reset, write)


class StopsAGradient(GatedDeltaNet):
    """Right values; the decay has no gradient."""

    def chunked(self, params, state, xs, reset, write):
        xs = xs._replace(g=jax.lax.stop_gradient(xs.g))
        return super().chunked(params, state, xs, reset, write)


class ComputesNarrow(GatedDeltaNet):
    """Rounds the carried state to bfloat16 when the inputs are."""

    def chunked(self, params, state, xs, reset, write):
        y, state = super().chunked(params, state, xs, reset, write)
        return y, state.astype(xs.q.dtype).astype(state.dtype)


class KeepsTheInputDtype(GatedDeltaNet):
    """Returns the state in the dtype of the inputs."""

    def chunked(self, params, state, xs, reset, write):
        y, state = super().chunked(params, state, xs, reset, write)
        return y, state.astype(xs.q.dtype)


PLANTED = {
    ResetsAfterTheWrite: checks.check_resets,
    LeaksTheLastGate: checks.check_causality,
    SeesTheNextKey: checks.check_causality,
    LosesTheState: lambda case, form: checks.check_split(case, form, form, 8, (3,)),
    DecaysUnwritten: checks.check_unwritten,
    MixesHeads: checks.check_causality,
    StopsAGradient: lambda case, form: checks.check_forms(case, form, plain(case)),
    ComputesNarrow: checks.check_bfloat16,
    KeepsTheInputDtype: lambda case, form: checks.check_layout(case),
}
FAST = (LeaksTheLastGate, LosesTheState, StopsAGradient)


def gated(cell=GatedDeltaNet, chunk=8):
    case = next(case for case in contract.cases() if isinstance(case.cell, GatedDeltaNet))
    return case._replace(cell=cell(8, 6, chunk=chunk))


def plain(case, scenario="random", length=29):
    return contract.problem(case, 0, length, scenario, masks=False)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=() if cell in FAST else pytest.mark.slow, id=cell.__name__)
        for cell in PLANTED
    ],
)
def test_planted_mistake_is_caught(cell):
    check = PLANTED[cell]
    check(gated(), "chunked")
    with pytest.raises(AssertionError):
        check(gated(cell), "chunked")


def test_state_lost_at_decode_is_caught():
    class Forgets(GatedDeltaNet):
        def scan(self, params, state, xs, reset, write):
            state = None if xs.q.shape[1] == 1 else state
            return super().scan(params, state, xs, reset, write)

    checks.check_decode(gated(), "chunked", 8, 5)
    with pytest.raises(AssertionError):
        checks.check_decode(gated(Forgets), "chunked", 8, 5)


def test_inverse_by_powers_is_caught(monkeypatch):
    """(I + L)^-1 as a product of I + (-L)^(2^i): exact on paper, lost in float32."""

    def powers(lower):
        size = lower.shape[-1]
        power, inverse = -lower, jnp.eye(size, dtype=lower.dtype) - lower
        for _ in range(size.bit_length() - 2):
            power = power @ power
            inverse = inverse + inverse @ power
        return inverse

    class ByPowers(GatedDeltaNet):
        pass

    case = gated(ByPowers, chunk=64)
    given = plain(case, "equal", 64)
    ones = np.ones_like(given.xs.g)  # beta = 2 is ill-conditioned in the right form too
    given = given._replace(xs=given.xs._replace(g=0 * ones, beta=ones))
    right = case._replace(cell=GatedDeltaNet(8, 6, chunk=64))
    checks.check_forms(right, "chunked", given)
    monkeypatch.setattr(_matrix, "unit_lower_inverse", powers)
    with pytest.raises(AssertionError):
        checks.check_forms(case, "chunked", given)


def test_exp_before_the_mask_is_caught(monkeypatch):
    """exp of a positive sum overflows above the diagonal; its gradient is inf * 0."""

    def exp_then_mask(g, reset, like):
        total = jnp.cumsum(g, axis=1)
        lower = jnp.tril(jnp.ones((like.shape[1],) * 2, bool))
        between = jnp.where(lower, jnp.exp(total - total.mT), 0)
        return _matrix.Decay(lambda x, y: (x @ y.mT) * between, jnp.exp(total))

    class ExpFirst(GatedDeltaNet):
        pass

    given = plain(gated())
    given = given._replace(xs=given.xs._replace(g=np.full_like(given.xs.g, -50)))
    checks.check_forms(gated(), "chunked", given)
    monkeypatch.setattr(_matrix, "decays", exp_then_mask)
    with pytest.raises(AssertionError, match="not finite"):
        checks.check_forms(gated(ExpFirst), "chunked", given)


def test_not_a_number_is_caught():
    value = np.ones((2, 256, 64), np.float32)
    value[0, 0, 0] = np.nan
    with pytest.raises(AssertionError, match="not finite"):
        contract.distance(value, np.ones_like(value))
