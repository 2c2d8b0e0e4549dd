"""Cases that kernels are tested with: shapes and hard inputs."""

import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shapes and hard inputs of one case.

    beta: the range of the delta rule's rates, None without one. removal: that of the rates r of
    each channel with b = -r a, a of norm 1, which shares with its fellows what keys share, and is
    -k / |k| where those are alike; None without a and b. decay: "none", "head" (one for
    each head), "channel" (one for each of its K). gate: what the log decays of softplus size are
    multiplied by. strong: a further factor of one in twenty, up to infinity. lowest: what they are
    raised to, and what `chunk_dplr` is told; None for any. keys: "random",
    "equal", "cosine" (.9 with each other), of this norm. resets: tokens of the first row where a
    document begins. tags: "fast" (part of `make test`), "race" (also run by the interpreter that
    detects races).
    """

    name: str
    B: int = 1
    T: int
    H: int = 2
    key_heads: int | None = None
    K: int = 64
    V: int = 64
    chunk: int | None = None
    dtype: str = "float32"
    beta: tuple[float, float] | None = None
    removal: tuple[float, float] | None = None
    decay: str = "head"
    gate: float = 1.0
    strong: float = 1.0
    lowest: float | None = None
    keys: str = "random"
    norm: float = 1.0
    resets: tuple[int, ...] = ()
    state: bool = True
    tags: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray | None]:
        """q, k, v, beta, a and b if there are, g, reset and initial_state as numpy arrays; q, k, v,
        a and b are float32 that `dtype` holds exactly."""
        rng = np.random.default_rng(seed)
        heads = self.key_heads or self.H
        q, k = (rng.standard_normal((self.B, self.T, heads, self.K)) for _ in range(2))
        if self.keys == "equal":
            k = np.broadcast_to(k[:, :1], k.shape)
        elif self.keys == "cosine":
            common = rng.standard_normal((self.B, 1, heads, self.K))
            k = np.sqrt(0.9) * common + np.sqrt(0.1) * k
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        k = self.norm * k
        v = rng.standard_normal((self.B, self.T, self.H, self.V))
        g = reset = state = None
        if self.decay != "none":
            shape = (self.B, self.T, self.H, *((self.K,) if self.decay == "channel" else ()))
            g = -np.logaddexp(0, rng.standard_normal(shape) - 2)
            g = self.gate * g * np.where(rng.random(g.shape) < 0.05, self.strong, 1)
            g = np.maximum(g, -np.inf if self.lowest is None else self.lowest).astype(np.float32)
        if self.resets:
            reset = np.zeros((self.B, self.T), bool)
            reset[0, list(self.resets)] = True
        if self.state:
            shape = (self.B, self.H, self.K, self.V)
            state = rng.standard_normal(shape).astype(np.float32)
        arrays = {"q": q, "k": k, "v": v}
        arrays = {name: held(array, self.dtype) for name, array in arrays.items()}
        if self.beta is not None:
            rates = rng.uniform(*self.beta, (self.B, self.T, self.H))
            arrays["beta"] = rates.astype(np.float32)
        if self.removal is not None:
            a = k if self.keys != "random" else rng.standard_normal(k.shape)
            a = held(-a / np.linalg.norm(a, axis=-1, keepdims=True), self.dtype)
            arrays |= {"a": a, "b": held(-rng.uniform(*self.removal, a.shape) * a, self.dtype)}
        return arrays | {"g": g, "reset": reset, "initial_state": state}


def held(array, dtype: str) -> np.ndarray:
    """The float32 array whose values `dtype` holds exactly, nearest to this one."""
    array = np.asarray(array, np.float32)
    if dtype == "float32":
        return array
    bits = array.view(np.uint32)  # bfloat16 is the upper half, rounded to nearest even
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


HALF: dict[str, Any] = {"T": 96, "chunk": 32, "dtype": "bfloat16"}


def shared(**more) -> tuple[Spec, ...]:
    """The cases of every op; more: what they have besides."""
    case = partial(Spec, **more)
    channel: dict[str, Any] = {"T": 48, "chunk": 16, "decay": "channel"}
    resets: dict[str, Any] = {"T": 53, "B": 2, "resets": (0, 7, 16, 20, 52)}
    return (
        case(name="one_chunk", T=32, chunk=32, tags=("race",)),
        case(name="ragged", B=2, T=41, H=1, chunk=16, tags=("race",)),
        case(name="one_token", B=2, T=1),
        case(name="a_token_less", T=15, chunk=16),
        case(name="a_token_more", T=17, chunk=16),
        case(name="chunk_chosen", T=150, H=1),
        case(name="no_state", T=48, chunk=16, state=False),
        case(name="no_decay", T=48, chunk=16, decay="none", tags=("fast", "race")),
        case(name="no_decay_resets", T=48, chunk=16, decay="none", resets=(0, 20, 47)),
        case(name="resets", **resets, chunk=16, tags=("fast", "race")),
        case(name="all_resets", T=20, chunk=16, resets=tuple(range(20))),
        case(name="gate_exactly_1", T=48, chunk=16, gate=0.0),
        case(name="gate_extreme", T=64, chunk=32, gate=60.0, resets=(9,)),
        case(name="gate_mixed", T=128, chunk=64, gate=0.1, strong=1e4),
        case(name="gate_infinite", T=64, chunk=32, strong=math.inf),
        case(name="groups", B=2, T=41, H=16, key_heads=8, chunk=16, resets=(3, 20)),
        case(name="shared_key", T=40, H=4, key_heads=1, chunk=16),
        case(name="twelve_heads", T=20, H=12, chunk=16),
        case(name="wide_v", T=40, V=128, chunk=16),
        case(name="wide_k", T=40, K=256, V=64, chunk=16),
        case(name="bf16", **HALF, resets=(40,), tags=("fast", "race")),
        case(name="bf16_no_decay", **HALF, decay="none"),
        case(name="bf16_extreme", **HALF, gate=60.0),
        case(name="bf16_groups", **HALF, H=8, key_heads=2, gate=0.1),
        case(name="channel", **channel, tags=("fast", "race")),
        case(name="channel_resets", **channel, B=2, resets=(0, 7, 16, 20, 47), tags=("race",)),
        case(name="channel_all_resets", **channel, resets=tuple(range(48))),
        case(name="channel_extreme", **{**channel, "T": 128, "chunk": 64}, gate=60.0, resets=(9,)),
        case(name="channel_mixed", **{**channel, "T": 83, "chunk": 64}, gate=0.1, strong=1e4),
        case(name="channel_infinite", **channel, strong=math.inf),
        case(name="channel_gate_1", **channel, gate=0.0),
        case(name="channel_groups", **channel, B=2, H=8, key_heads=2, resets=(3, 20)),
        case(name="channel_wide", **channel, K=128, V=256),
        case(name="channel_bf16", **HALF, decay="channel", resets=(40,), tags=("race",)),
        case(name="channel_bf16_extreme", **HALF, decay="channel", gate=60.0),
        case(name="channel_bf16_slow", **HALF, decay="channel", gate=0.01),
    )


CHANNELS = """ragged one_token no_state resets all_resets gate_exactly_1 gate_extreme gate_mixed
gate_infinite shared_key wide wide_v wide_k equal_keys alike_keys"""


def shared_on_gpu(**more) -> tuple[Spec, ...]:
    """The cases on GPUs: bfloat16 in chunks of 64. What rounding a state does to dg depends on how
    much of <S, dS> cancels, which is one number for each head and chunk: it takes 8 heads to
    compare the distance with what is expected of rounding. With a decay for each channel there are
    K numbers."""
    case = partial(Spec, dtype="bfloat16", **more)
    eight = partial(case, H=8)
    cases = (
        eight(name="one_chunk", T=64),
        eight(name="ragged", B=2, T=100),
        eight(name="one_token", B=2, T=1),
        eight(name="a_token_less", T=63),
        eight(name="a_token_more", T=65),
        case(name="many_chunks", T=600, H=1),
        eight(name="no_state", T=128, state=False),
        case(name="no_decay", T=100, H=1, decay="none", tags=("fast",)),
        case(name="no_decay_resets", T=100, decay="none", resets=(0, 20, 64, 99)),
        eight(name="resets", B=2, T=150, resets=(0, 7, 64, 70, 149)),
        eight(name="all_resets", T=70, resets=tuple(range(70))),
        eight(name="gate_exactly_1", T=100, gate=0.0),
        eight(name="gate_extreme", T=100, gate=60.0, resets=(9,)),
        eight(name="gate_mixed", T=128, gate=0.1, strong=1e4),
        eight(name="gate_infinite", T=100, strong=math.inf),
        eight(name="groups", B=2, T=41, key_heads=4, resets=(3, 20)),
        eight(name="shared_key", T=80, key_heads=1),
        case(name="wide", T=100, H=8, K=128, V=128),
        case(name="wide_v", T=100, H=4, V=256),
        case(name="wide_k", T=100, H=4, K=256),
        eight(name="equal_keys", T=128, keys="equal", gate=0.1),
        eight(name="alike_keys", T=128, keys="cosine", gate=0.1),
    )
    return (
        *cases,
        *(
            dataclasses.replace(case, name=f"channels_{case.name}", decay="channel", H=2)
            for case in cases
            if case.name in CHANNELS.split()
        ),
    )
