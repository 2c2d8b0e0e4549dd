"""The cases of window_attention."""

import dataclasses

import numpy as np

from pallas_kernels.specs import held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shapes and hard inputs of one case.

    kv_heads: of k and v, None for H. front: tokens in front of the first query. norm: what keys of
    variance 1 are multiplied by. equal: all keys are one. resets: tokens of the first row, those in
    front counted, where a document begins.
    """

    name: str
    B: int = 1
    T: int
    window: int
    H: int = 2
    kv_heads: int | None = None
    K: int = 64
    V: int = 64
    front: int = 0
    block: int | None = 128
    dtype: str = "float32"
    norm: float = 1.0
    equal: bool = False
    resets: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray | None]:
        """q, k, v and reset as numpy arrays; float32 that `dtype` holds exactly."""
        rng = np.random.default_rng(seed)
        heads, total = self.kv_heads or self.H, self.front + self.T
        q = rng.standard_normal((self.B, self.T, self.H, self.K))
        k = self.norm * rng.standard_normal((self.B, total, heads, self.K))
        v = rng.standard_normal((self.B, total, heads, self.V))
        if self.equal:
            k = np.broadcast_to(k[:, :1], k.shape)
        reset = None
        if self.resets:
            reset = np.zeros((self.B, total), bool)
            reset[0, list(self.resets)] = True
        return {name: held(a, self.dtype) for name, a in dict(q=q, k=k, v=v).items()} | {
            "reset": reset
        }


SPECS = (
    Spec(name="window_in_a_block", T=300, window=50),
    Spec(name="window_over_blocks", T=500, window=200, H=1, tags=("fast",)),
    Spec(name="window_of_whole_blocks", T=512, window=256, H=1),
    Spec(name="window_and_one", T=400, window=129, H=1),
    Spec(name="all_tokens", T=300, window=300),
    Spec(name="longer_than_all", T=200, window=4096),
    Spec(name="two_tokens", T=150, window=2),
    Spec(name="one_token", T=150, window=1, tags=("fast",)),
    Spec(name="one_token_at_all", B=2, T=1, window=8),
    Spec(name="whole_blocks", B=2, T=256, window=64),
    Spec(name="block_chosen", T=140, window=60, block=None),
    Spec(name="block_of_256", T=300, window=150, block=256),
    Spec(name="resets", B=2, T=290, window=70, resets=(0, 1, 40, 128, 200, 289), tags=("fast",)),
    Spec(name="all_resets", T=40, window=9, resets=tuple(range(40))),
    Spec(name="groups", B=2, T=150, window=60, H=6, kv_heads=2, resets=(3, 100), tags=("fast",)),
    Spec(name="shared_key", T=150, window=60, H=3, kv_heads=1),
    Spec(name="wide_v", T=150, window=60, V=128),
    Spec(name="wide_k", T=150, window=60, K=256, V=64),
    Spec(name="front", T=140, window=100, front=99, resets=(30,), tags=("fast",)),
    Spec(name="front_not_seen", T=140, window=40, front=300, resets=(290, 310)),
    Spec(name="short_front", B=2, T=20, window=300, front=130),
    Spec(name="one_query", T=1, window=300, front=299, resets=(10,)),
    Spec(name="equal_keys", T=200, window=80, equal=True),
    Spec(name="long_keys", T=200, window=80, norm=20.0),
    Spec(name="bf16", T=300, window=100, K=128, V=128, dtype="bfloat16", tags=("fast",)),
    Spec(name="bf16_one_token", T=150, window=1, dtype="bfloat16"),
    Spec(name="bf16_resets", T=300, window=200, resets=(0, 150, 299), dtype="bfloat16"),
    Spec(name="bf16_groups", T=200, window=60, H=4, kv_heads=2, dtype="bfloat16"),
    Spec(name="bf16_front", T=140, window=100, front=99, K=256, V=256, dtype="bfloat16"),
    Spec(name="bf16_long_keys", T=200, window=80, norm=20.0, dtype="bfloat16"),
)
