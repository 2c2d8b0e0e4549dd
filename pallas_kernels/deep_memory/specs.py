"""The cases of deep_memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deep_memory.reference import State
from pallas_kernels.specs import held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shapes and hard inputs of one case.

    frozen: written tokens of a frozen chunk. context: c. momentum, loss: of the op. gate: what the
    log decays of softplus size are multiplied by. strong: a further factor of one in twenty. keys:
    "random", "equal" or "cosine" (.9 with each other), of unit norm. resets: tokens of the first
    row where a document begins. writes: the share of tokens that are written, of each head. state:
    whether one is carried in, at any place of a frozen chunk. rate: steps are at most this much of
    1 / (c frozen), with momentum at its least of half of (1 - e^m) of it, where one constant key is
    stable. tags: as of `pallas_kernels.specs.Spec`.
    """

    name: str
    B: int = 1
    T: int
    H: int = 2
    K: int = 64
    V: int = 64
    chunk: int | None = None
    dtype: str = "float32"
    frozen: int = 8
    context: int = 1
    momentum: bool = True
    loss: str = "l2"
    gate: float = 1.0
    strong: float = 1.0
    keys: str = "random"
    resets: tuple[int, ...] = ()
    writes: float | None = None
    state: bool = True
    rate: float = 1.0
    tags: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """What an op can be differentiated by, and reset, as numpy arrays by name; those of a state
        are weights, momentum, base, past_k and past_v. q, k, v and past pairs are float32 that
        `dtype` holds exactly."""
        rng = np.random.default_rng(seed)
        heads = (self.B, self.T, self.H)
        q, k = (rng.standard_normal((*heads, self.K)) for _ in range(2))
        if self.keys == "equal":
            k = np.broadcast_to(k[:, :1], k.shape)
        elif self.keys == "cosine":
            common = rng.standard_normal((self.B, 1, self.H, self.K))
            k = np.sqrt(0.9) * common + np.sqrt(0.1) * k
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        v = rng.standard_normal((*heads, self.V))

        def logs(middle):
            log = -np.logaddexp(0, rng.standard_normal(heads) + middle)
            strong = np.where(rng.random(heads) < 0.05, self.strong, 1)
            return (self.gate * log * strong).astype(np.float32)

        g, m = logs(-3.0), logs(-1.0) if self.momentum else None
        most = self.rate / (self.context * self.frozen)
        if m is not None:  # their mean, for gates near 1 too
            most *= min(1.0, float(np.mean(-np.expm1(m))) + 0.1) / 2
        rates = most * rng.random((*heads, self.context))
        reset = None
        if self.resets:
            reset = np.zeros((self.B, self.T), bool)
            reset[0, list(self.resets)] = True
        arrays: dict[str, Any] = {
            name: held(a, self.dtype) for name, a in {"q": q, "k": k, "v": v}.items()
        }
        start = (0.5 * rng.standard_normal((self.H, self.K, self.V))).astype(np.float32)
        arrays |= {"g": g, "m": m, "rates": rates.astype(np.float32), "start": start}
        return arrays | self._state(rng) | {"reset": reset}

    def _state(self, rng) -> dict[str, Any]:
        """The matrices and pairs of a state."""
        if not self.state:
            return {}
        heads, older = (self.B, self.H), self.context - 1

        def matrix(*axes):
            return rng.standard_normal((*heads, *axes)).astype(np.float32)

        found: dict[str, Any] = {
            "weights": matrix(self.K, self.V),
            "momentum": 0.1 * matrix(self.K, self.V) if self.momentum else None,
            "base": matrix(self.K, self.V),
        }
        if older:
            there = np.arange(older)[:, None] >= older - self.counts()["number"][..., None, None]
            k, v = matrix(older, self.K) / self.K**0.5, matrix(older, self.V)
            found |= {"past_k": held(k, self.dtype) * there, "past_v": held(v, self.dtype) * there}
        return found

    def counts(self) -> dict[str, Any]:
        """place and number of a state, and write, which are not numbers to differentiate by."""
        rng = np.random.default_rng(2)
        heads, older = (self.B, self.H), self.context - 1
        place = rng.integers(0, self.frozen, heads).astype(np.int32)
        number = rng.integers(0, older + 1, heads).astype(np.int32) if older else None
        written = rng.random((self.B, self.T, self.H))
        write = None if self.writes is None else written < self.writes
        return {"place": place, "number": number, "write": write}


def flat(op, spec: Spec, **options):
    """An op, or its reference, of the arrays of `Spec.inputs`; its state a dict of the floating
    leaves."""
    counts = spec.counts()
    names = {"k": "past_k", "v": "past_v"}  # of a state's leaves

    def run(q, k, v, *, reset, **given):
        write = counts["write"]
        own = {"g", "rates", "start", "m"} & given.keys()
        state = None
        if spec.state:
            leaves = {name: given.get(names.get(name, name)) for name in State._fields}
            leaves |= {name: counts[name] for name in ("place", "number")}
            state = State(**jax.tree.map(jnp.asarray, leaves))
        arrays = {name: given[name] for name in own}
        more = dict(frozen_chunk=spec.frozen, loss=spec.loss, **options)
        o, state = op(q, k, v, **arrays, state=state, reset=reset, write=write, **more)
        found = state._asdict().items()
        floats = {
            names.get(name, name): a
            for name, a in found
            if a is not None and name not in ("place", "number")
        }
        return o, floats

    return run


HALF: dict[str, Any] = {"T": 96, "chunk": 32, "dtype": "bfloat16"}
RESETS: dict[str, Any] = {"T": 53, "B": 2, "resets": (0, 7, 16, 20, 52)}
OMEGA: dict[str, Any] = {"momentum": False, "context": 3}
SPECS = (
    Spec(name="initial", T=48, chunk=16, state=False, tags=("fast",)),
    Spec(name="ragged", B=2, T=41, H=1, chunk=16, frozen=5, tags=("race",)),
    Spec(name="one_token", B=2, T=1, context=2),
    Spec(name="every_token", T=40, chunk=16, frozen=1, momentum=False),
    Spec(name="long_frozen", T=70, chunk=16, frozen=40, resets=(30,)),
    Spec(name="resets", **RESETS, chunk=16, tags=("fast",)),
    Spec(name="few_writes", **RESETS, chunk=16, frozen=3, writes=0.3),
    Spec(name="gate_extreme", T=64, chunk=32, gate=60.0, resets=(9,)),
    Spec(name="gate_mixed", T=128, chunk=64, H=1, gate=0.1, strong=1e4),
    Spec(name="alike_keys", T=96, chunk=32, keys="cosine", gate=0.0),
    Spec(name="wide", T=20, H=1, K=256, V=128, chunk=16),
    Spec(name="omega", T=60, chunk=32, **OMEGA, resets=(20,), tags=("fast", "race")),
    Spec(name="omega_writes", B=2, T=70, chunk=32, **OMEGA, writes=0.6, resets=(3, 4, 30)),
    Spec(name="swla", T=60, chunk=32, **{**OMEGA, "context": 7}, loss="dot", frozen=4, writes=0.9),
    Spec(name="atlas", T=60, chunk=32, context=4, writes=0.8, resets=(20, 50)),
    Spec(name="bf16", **HALF, resets=(40,), tags=("fast", "race")),
    Spec(name="bf16_extreme", **HALF, B=4, gate=60.0),
    Spec(name="bf16_equal_keys", **HALF, keys="equal", gate=0.1, rate=2.0, state=False),
    Spec(name="bf16_alike_keys", **HALF, keys="cosine", gate=0.1, rate=2.0),
    Spec(name="bf16_atlas", **HALF, context=4),
)
