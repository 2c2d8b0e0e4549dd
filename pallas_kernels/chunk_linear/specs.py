"""The cases of chunk_linear."""

from pallas_kernels.specs import HALF, Spec, shared, shared_on_gpu

SPECS = (
    *shared(),
    Spec(name="equal_keys", T=48, chunk=16, keys="equal", gate=0.1),
    Spec(name="alike_keys", T=48, chunk=16, keys="cosine", gate=0.1),
    Spec(name="bf16_equal_keys", **HALF, keys="equal", gate=0.1),
)
GPU_SPECS = shared_on_gpu()
