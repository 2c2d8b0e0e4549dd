"""The cases of lattice."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.lattice.reference import State
from pallas_kernels.specs import held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shapes and hard inputs of one case.

    frozen: tokens of a frozen chunk. gate: what log decays of softplus size are multiplied by.
    rate: the largest step. keys: "random" or "equal", of unit norm. resets: tokens of the first
    row where a document begins. writes: the share of tokens that are written, of each head. state:
    whether one is carried in, at any place of a frozen chunk. tags: as of
    `pallas_kernels.specs.Spec`.
    """

    name: str
    B: int = 1
    T: int
    H: int = 2
    K: int = 16
    V: int = 16
    chunk: int | None = None
    dtype: str = "float32"
    frozen: int = 1
    objective: str = "decoding"
    gate: float = 1.0
    rate: float = 0.5
    keys: str = "random"
    resets: tuple[int, ...] = ()
    writes: float | None = None
    state: bool = True
    tags: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """What an op can be differentiated by, and reset, as numpy arrays by name; those of a state
        are slots and base. q, k and v are float32 that `dtype` holds exactly."""
        rng = np.random.default_rng(seed)
        heads = (self.B, self.T, self.H)

        def directions(*shape):
            x = rng.standard_normal(shape)
            return x / np.linalg.norm(x, axis=-1, keepdims=True)

        q, k, v = directions(*heads, self.K), directions(*heads, self.K), directions(*heads, self.V)
        if self.keys == "equal":
            k = np.broadcast_to(k[:, :1], k.shape)
        arrays: dict[str, Any] = {
            name: held(a, self.dtype) for name, a in {"q": q, "k": k, "v": v}.items()
        }
        beta = -self.gate * np.logaddexp(0, rng.standard_normal(heads) - 3)
        arrays |= {"beta": beta, "gamma": self.rate * rng.random(heads)}
        arrays["start"] = directions(self.H, self.K, self.V)
        if self.state:
            axes = (self.B, self.H, self.K, self.V)
            arrays["slots"] = directions(*axes)
            if self.frozen > 1:
                arrays["base"] = directions(*axes)
        arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
        reset = None
        if self.resets:
            reset = np.zeros((self.B, self.T), bool)
            reset[0, list(self.resets)] = True
        return arrays | {"reset": reset}

    def counts(self) -> dict[str, Any]:
        """place of a state, and write, which are not numbers to differentiate by."""
        rng = np.random.default_rng(2)
        place = rng.integers(0, self.frozen, (self.B, self.H)).astype(np.int32)
        written = rng.random((self.B, self.T, self.H))
        return {"place": place, "write": None if self.writes is None else written < self.writes}


def flat(op, spec: Spec, **options):
    """An op, or its reference, of the arrays of `Spec.inputs`; its state a dict of the floating
    leaves."""
    counts = spec.counts()

    def run(q, k, v, *, reset, beta, gamma, start, slots=None, base=None):
        state = None if slots is None else State(slots, base, jnp.asarray(counts["place"]))
        more = dict(frozen_chunk=spec.frozen, objective=spec.objective, **options)
        given = dict(state=state, reset=reset, write=counts["write"])
        o, found = op(q, k, v, beta, gamma, start, **given, **more)
        floats = {"slots": found.slots, "base": found.base}
        return o, {name: a for name, a in floats.items() if a is not None}

    return run


BEGUN: dict[str, Any] = {"B": 2, "resets": (0, 5, 9), "writes": 0.7}
HARD: dict[str, Any] = {"keys": "equal", "gate": 60.0, "rate": 2.0}
LANES: dict[str, Any] = {"H": 8, "K": 70, "V": 128}
SMALL: dict[str, Any] = {"H": 3, "K": 5, "V": 40, "dtype": "bfloat16", "state": False}
SPECS = (
    Spec(name="exact", T=11, chunk=4, **BEGUN, **HARD, tags=("fast",)),
    Spec(name="frozen", T=21, chunk=8, frozen=3, **BEGUN, tags=("race",)),
    Spec(name="all_lanes", T=6, chunk=4, **LANES, objective="similarity"),
    Spec(name="groups", B=2, T=6, H=16, K=128, V=128, chunk=4, frozen=3, resets=(4,)),
    Spec(name="bf16", T=8, chunk=4, frozen=4, **SMALL, objective="encoding"),
)
