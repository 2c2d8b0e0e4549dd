"""The cases of chunk_linear."""

import dataclasses

from pallas_kernels.specs import HALF, Spec, shared, shared_on_gpu

SPECS = (
    *shared(),
    Spec(name="equal_keys", T=48, chunk=16, keys="equal", gate=0.1),
    Spec(name="alike_keys", T=48, chunk=16, keys="cosine", gate=0.1),
    Spec(name="bf16_equal_keys", **HALF, keys="equal", gate=0.1),
)
CHANNELS = (
    "one_chunk ragged one_token a_token_more no_state resets all_resets gate_exactly_1 "
    "gate_extreme gate_mixed gate_infinite groups wide wide_v wide_k equal_keys alike_keys"
)
GPU_SPECS = (
    *shared_on_gpu(),
    *(
        dataclasses.replace(spec, name=f"channels_{spec.name}", decay="channel")
        for spec in shared_on_gpu()
        if spec.name in CHANNELS.split()
    ),
)
