"""The cases of wkv4."""

import numpy as np

from pallas_kernels import walks_specs
from pallas_kernels.wkv4.rule import EMPTY


class Spec(walks_specs.Spec):
    def inputs(self, seed: int = 0) -> dict:
        """v, k, w, u, reset and initial_state; arrays in numpy."""
        rng = np.random.default_rng(seed)
        v, k, u = (self.numbers(rng) for _ in range(3))
        k = np.where(rng.random(k.shape) < self.only_read, EMPTY, self.exponent * k)
        v, k, w, u = self.arrays(v, k, self.logs(rng), u)
        state = None
        if self.state:
            p, q, o = rng.standard_normal((3, self.B, self.D)).astype(np.float32)
            state = p, np.exp(q), o
        given = {"v": v, "k": k, "w": w, "u": u}
        return given | {"initial_state": state, "reset": self.reset()}


SPECS = (
    Spec(name="one_block", T=64, tags=("fast",)),
    Spec(name="blocks", B=2, T=300, D=256),
    Spec(name="ragged", B=3, T=41, D=72),
    Spec(name="one_token", B=2, T=1),
    Spec(name="wide", T=40, D=1280),
    Spec(name="resets", B=2, T=300, resets=(0, 7, 31, 32, 256, 299), tags=("race",)),
    Spec(name="all_resets", T=20, resets=tuple(range(20))),
    Spec(name="only_read", B=2, T=70, only_read=0.7, resets=(0, 1, 9, 30), tags=("fast",)),
    Spec(name="never_written", T=20, only_read=1.0, resets=(9,)),
    Spec(name="nothing_at_all", T=20, only_read=1.0, state=False),
    Spec(name="gate_exactly_1", T=40, gate=0.0),
    Spec(name="gate_extreme", T=64, gate=60.0, resets=(9,)),
    Spec(name="equal_exponents", T=40, gate=0.0, exponent=0.0),
    Spec(name="large_exponents", T=64, exponent=100.0),
    Spec(name="bf16", B=2, T=96, dtype="bfloat16", resets=(40,), tags=("fast", "race")),
    Spec(name="bf16_slow", T=300, dtype="bfloat16", gate=1e-3, exponent=5.0),
    Spec(name="bf16_only_read", T=96, dtype="bfloat16", only_read=0.5, resets=(8,)),
    Spec(name="bf16_narrow", T=96, dtype="bfloat16", narrow=True),
)
