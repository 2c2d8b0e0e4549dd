"""The cases of chunk_delta."""

import math
from functools import partial

from pallas_kernels.specs import Spec as AnySpec

Spec = partial(AnySpec, beta=(0.0, 2.0))
Half = partial(Spec, T=96, chunk=32, dtype="bfloat16")
SPECS = (
    Spec(name="one_chunk", T=32, chunk=32, tags=("race",)),
    Spec(name="ragged", B=2, T=41, H=1, chunk=16, tags=("race",)),
    Spec(name="one_token", B=2, T=1),
    Spec(name="a_token_less", T=15, chunk=16),
    Spec(name="a_token_more", T=17, chunk=16),
    Spec(name="no_state", T=48, chunk=16, state=False),
    Spec(name="no_decay", T=48, chunk=16, decay="none", tags=("fast",)),
    Spec(name="no_decay_resets", T=48, chunk=16, decay="none", resets=(0, 20, 47), tags=("race",)),
    Spec(name="resets", B=2, T=53, chunk=16, resets=(0, 7, 16, 20, 52), tags=("fast", "race")),
    Spec(name="gate_exactly_1", T=48, chunk=16, gate=0.0),
    Spec(name="gate_extreme", T=64, chunk=32, gate=60.0, resets=(9,)),
    Spec(name="gate_mixed", T=128, chunk=64, gate=0.1, strong=1e4),
    Spec(name="gate_infinite", T=64, chunk=32, strong=math.inf),
    Spec(name="equal_keys", T=128, chunk=64, keys="equal", decay="none", beta=(1.0, 1.0)),
    Spec(name="equal_keys_beta_2", T=128, chunk=64, keys="equal", decay="none", beta=(2.0, 2.0)),
    Spec(name="alike_keys", T=128, chunk=64, keys="cosine", gate=0.1, beta=(0.95, 0.95)),
    Spec(name="long_keys", T=48, chunk=16, norm=3.0, gate=0.1, beta=(0.0, 0.2)),
    Spec(name="beta_0", T=48, chunk=16, beta=(0.0, 0.0)),
    Spec(name="groups", B=2, T=41, H=16, key_heads=8, chunk=16, resets=(3, 20)),
    Spec(name="all_resets", T=20, chunk=16, resets=tuple(range(20))),
    Spec(name="twelve_heads", T=20, H=12, chunk=16),
    Spec(name="chunk_chosen", T=150, H=1),
    Spec(name="shared_key", T=40, H=4, key_heads=1, chunk=16),
    Spec(name="wide_v", T=40, V=128, chunk=16),
    Spec(name="wide_k", T=40, K=256, V=64, chunk=16),
    Half(name="bf16", resets=(40,), tags=("fast", "race")),
    Half(name="bf16_no_decay", decay="none"),
    Half(name="bf16_extreme", gate=60.0),
    Half(name="bf16_alike_keys", keys="cosine", gate=0.1, beta=(0.95, 0.95)),
    Half(name="bf16_equal_keys", keys="equal", gate=0.1, beta=(1.0, 1.0)),
    Half(name="bf16_groups", H=8, key_heads=2, gate=0.1),
)
