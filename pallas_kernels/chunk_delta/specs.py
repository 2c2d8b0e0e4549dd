"""The cases of chunk_delta."""

from typing import Any

from pallas_kernels.specs import HALF, Spec, shared, shared_on_gpu

LONG: dict[str, Any] = {"T": 128, "chunk": 64}
FULL: dict[str, Any] = {"T": 384, "chunk": 128, "H": 1, "K": 128, "V": 128, "dtype": "bfloat16"}
CHANNEL: dict[str, Any] = {**FULL, "T": 256, "chunk": 64, "decay": "channel"}
SPECS = (
    *shared(beta=(0.0, 2.0)),
    Spec(name="equal_keys", **LONG, keys="equal", decay="none", beta=(1.0, 1.0)),
    Spec(name="equal_keys_beta_2", **LONG, keys="equal", decay="none", beta=(2.0, 2.0)),
    Spec(name="alike_keys", **LONG, keys="cosine", gate=0.1, beta=(0.95, 0.95)),
    Spec(name="long_keys", T=48, chunk=16, norm=3.0, gate=0.1, beta=(0.0, 0.2)),
    Spec(name="beta_0", T=48, chunk=16, beta=(0.0, 0.0)),
    Spec(name="bf16_alike_keys", **HALF, keys="cosine", gate=0.1, beta=(0.95, 0.95)),
    Spec(name="bf16_equal_keys", **HALF, keys="equal", gate=0.1, beta=(1.0, 1.0)),
    Spec(name="bf16_full_alike_keys", **FULL, keys="cosine", gate=0.1, beta=(1.5, 2.0)),
    Spec(name="bf16_full_equal_keys", **FULL, keys="equal", decay="none", beta=(1.0, 1.0)),
    Spec(name="bf16_full_slow", **FULL, gate=0.01, beta=(0.0, 2.0)),
    Spec(name="channel_bf16_alike_keys", **CHANNEL, keys="cosine", gate=0.1, beta=(1.5, 2.0)),
    Spec(name="channel_bf16_equal_keys", **CHANNEL, keys="equal", gate=0.01, beta=(1.0, 1.0)),
    Spec(name="channel_bf16_full_slow", **CHANNEL, gate=0.01, beta=(0.0, 2.0)),
)
GPU: dict[str, Any] = {"T": 192, "H": 8, "dtype": "bfloat16"}
CHANNELS: dict[str, Any] = {**GPU, "H": 2, "decay": "channel"}
GPU_SPECS = (
    *shared_on_gpu(beta=(0.0, 2.0)),
    Spec(name="equal_keys_beta_1", **GPU, keys="equal", decay="none", beta=(1.0, 1.0)),
    Spec(name="equal_keys_beta_2", **GPU, keys="equal", gate=0.1, beta=(2.0, 2.0)),
    Spec(name="alike_keys_beta_95", **GPU, keys="cosine", gate=0.1, beta=(0.95, 0.95)),
    Spec(name="alike_keys_wide", **GPU, K=128, keys="cosine", decay="none", beta=(0.95, 0.95)),
    Spec(name="alike_keys_widest", **GPU, K=256, keys="cosine", gate=0.1, beta=(0.95, 0.95)),
    Spec(name="long_keys", **GPU, norm=3.0, gate=0.1, beta=(0.0, 0.2)),
    Spec(name="beta_0", **GPU, beta=(0.0, 0.0)),
    Spec(name="channels_groups", **{**CHANNELS, "H": 4}, key_heads=2, beta=(0.0, 2.0)),
    Spec(name="channels_equal_keys_slow", **CHANNELS, keys="equal", gate=0.01, beta=(1.0, 1.0)),
    Spec(name="channels_equal_keys_beta_2", **CHANNELS, keys="equal", gate=0.1, beta=(2.0, 2.0)),
    Spec(
        name="channels_alike_keys_wide", **CHANNELS, K=128, keys="cosine", gate=0.0, beta=(1.5, 2.0)
    ),
    Spec(name="channels_alike_keys_widest", **CHANNELS, K=256, keys="cosine", beta=(0.95, 0.95)),
    Spec(name="channels_slow", **CHANNELS, V=128, gate=0.01, beta=(0.0, 2.0)),
    Spec(name="channels_beta_0", **CHANNELS, beta=(0.0, 0.0)),
)
