"""The cases of chunk_linear."""

import dataclasses

from pallas_kernels.specs import HALF, Spec, shared, shared_on_gpu

SPECS = (
    *shared(),
    Spec(name="equal_keys", T=48, chunk=16, keys="equal", gate=0.1),
    Spec(name="alike_keys", T=48, chunk=16, keys="cosine", gate=0.1),
    Spec(name="bf16_equal_keys", **HALF, keys="equal", gate=0.1),
)
CHANNELS = "ragged one_token no_state resets gate_extreme gate_mixed groups wide wide_k equal_keys"
GPU_SPECS = (
    *shared_on_gpu(),
    *(
        dataclasses.replace(spec, name=f"channels_{spec.name}", decay="channel")
        for spec in shared_on_gpu()
        if spec.name in CHANNELS.split()
    ),
)
