"""The cases of gka."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from pallas_kernels import specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(specs.Spec):
    """`pallas_kernels.specs.Spec` with rates below 1; iterations, ridge: of the op. faded: tokens
    that write nothing and keep e^-40 of the state."""

    iterations: int = 4
    faded: tuple[int, ...] = ()
    ridge: float = 0.02
    beta: tuple[float, float] | None = (0.0, 1.0)

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Those of q, k, v, beta, g and reset, with alpha, and H and U of a state."""
        rng = np.random.default_rng(seed + 10)
        given: dict[str, Any] = super().inputs(seed)
        u = given.pop("initial_state")
        for token in self.faded:
            given["beta"][:, token], given["g"][:, token] = 0, -40
        alpha = rng.random((self.B, self.T, self.H)).astype(np.float32)
        if u is None:
            return given | {"alpha": alpha}
        k = rng.standard_normal((self.B, self.H, self.K, 2 * self.K))
        h = np.einsum("bhij,bhkj->bhik", k, k) / (4 * self.K)
        return given | {"alpha": alpha, "held": h.astype(np.float32), "linear": u}


def flat(op, spec: Spec, **options):
    """An op, or its reference, of the arrays of `Spec.inputs`; its state a dict."""

    def run(q, k, v, held=None, linear=None, **given):
        state = None if held is None else (held, linear)
        more = {"iterations": spec.iterations, "ridge": spec.ridge, **options}
        o, (held, linear) = op(q=q, k=k, v=v, initial_state=state, **given, **more)
        return o, {"held": held, "linear": linear}

    return run


HALF: dict[str, Any] = {"T": 96, "chunk": 32, "dtype": "bfloat16"}
RESETS: dict[str, Any] = {"T": 53, "B": 2, "resets": (0, 7, 16, 20, 52)}
half = partial(Spec, **HALF)
SPECS = (
    Spec(name="ragged", B=2, T=41, H=1, chunk=16, tags=("race",)),
    Spec(name="no_state", T=20, chunk=16, state=False),
    Spec(name="one_token", B=2, T=1),
    Spec(name="no_decay", T=33, chunk=16, decay="none"),
    Spec(name="resets", **RESETS, chunk=16, tags=("fast",)),
    Spec(name="all_resets", T=20, chunk=16, resets=tuple(range(20))),
    Spec(name="gate_extreme", T=48, chunk=16, gate=60.0, resets=(9,)),
    Spec(name="gate_infinite", T=48, chunk=16, strong=float("inf")),
    Spec(name="nothing_written", T=20, chunk=16, state=False, beta=(0.0, 0.0)),
    Spec(name="faded", T=40, chunk=16, faded=(3, 20, 39)),
    Spec(name="equal_keys", T=64, chunk=32, keys="equal", gate=0.1),
    Spec(name="alike_keys", T=64, chunk=32, keys="cosine", gate=0.1, iterations=30),
    Spec(name="groups", B=2, T=20, H=8, key_heads=2, chunk=16, resets=(3,), iterations=2),
    Spec(name="wide", T=20, H=1, K=128, V=256, chunk=16, iterations=1),
    half(name="bf16", resets=(40,), iterations=30, tags=("race",)),
    half(name="bf16_equal_keys", keys="equal", gate=0.1, iterations=30),
    half(name="bf16_alike_keys", keys="cosine", gate=0.01, iterations=30),
    half(name="bf16_extreme", gate=60.0),
)
