"""The cases of chunk_dplr: those of all ops that have a decay for each channel, and others with
one, of one head where several are not the point."""

import dataclasses
from typing import Any

from pallas_kernels.specs import Spec, shared

ALSO = "ragged one_token a_token_less no_state resets".split()
SEVERAL = "channel channel_resets".split()  # which are also looked at for races
CHANNEL: dict[str, Any] = {"decay": "channel", "H": 1, "T": 64, "chunk": 32}
HALF: dict[str, Any] = {**CHANNEL, "dtype": "bfloat16"}
LONG: dict[str, Any] = {**HALF, "T": 128, "chunk": 64}


def with_channels(case: Spec) -> Spec:
    more: dict[str, Any] = {"decay": "channel", "chunk": case.chunk and min(32, case.chunk)}
    if case.key_heads is None and case.name not in SEVERAL:
        more |= {"H": 1, "tags": ()}
    return dataclasses.replace(case, **more)


SPECS = (
    *(
        with_channels(case)
        for case in shared(removal=(0.0, 1.0))
        if case.decay == "channel" or case.name in ALSO
    ),
    Spec(name="equal_keys", **CHANNEL, keys="equal", gate=0.01, removal=(1.0, 1.0)),
    Spec(name="long_keys", **CHANNEL, norm=3.0, removal=(0.0, 1.0)),
    Spec(name="nothing_removed", **CHANNEL, removal=(0.0, 0.0)),
    Spec(name="bf16_equal_keys", **LONG, keys="equal", gate=0.01, removal=(0.0, 1.0)),
    Spec(name="bf16_alike_keys", **LONG, keys="cosine", gate=0.1, removal=(1.5, 2.0)),
    Spec(name="bf16_slow", **LONG, K=128, V=128, gate=0.01, removal=(0.0, 2.0)),
)
GPU: dict[str, Any] = {"decay": "channel", "dtype": "bfloat16", "lowest": -0.607, "T": 100}
ONE: dict[str, Any] = {**GPU, "H": 1, "removal": (0.0, 1.0)}
RESETS = 0, 7, 63, 64, 65, 99
GPU_SPECS = (
    Spec(name="ragged", **ONE, tags=("fast",)),
    Spec(name="resets", **{**ONE, "B": 2, "H": 2}, key_heads=1, gate=0.05, resets=RESETS),
    Spec(name="fast_decays", **{**ONE, "lowest": -1.125, "T": 63}, K=128, gate=60.0, resets=(9,)),
    Spec(
        name="equal_keys",
        **{**ONE, "removal": (1.0, 1.0)},
        V=128,
        keys="equal",
        gate=0.01,
        state=False,
    ),
    Spec(name="alike_keys", **{**ONE, "removal": (1.5, 2.0)}, K=256, keys="cosine", gate=0.1),
)
