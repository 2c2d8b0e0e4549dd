"""The cases of chunk_dplr: those of all ops that have a decay for each channel, and others with
one."""

import dataclasses
from typing import Any

from pallas_kernels.specs import Spec, shared

ALSO = "ragged one_token a_token_less a_token_more no_state resets shared_key wide_k".split()
CHANNEL: dict[str, Any] = {"decay": "channel", "H": 1, "T": 64, "chunk": 32}
HALF: dict[str, Any] = {**CHANNEL, "dtype": "bfloat16"}
LONG: dict[str, Any] = {**HALF, "T": 128, "chunk": 64, "K": 128, "V": 128}
SPECS = (
    *(
        dataclasses.replace(case, decay="channel", chunk=case.chunk and min(32, case.chunk))
        for case in shared(removal=(0.0, 1.0))
        if case.decay == "channel" or case.name in ALSO
    ),
    Spec(name="equal_keys", **CHANNEL, keys="equal", gate=0.01, removal=(1.0, 1.0)),
    Spec(name="alike_keys", **CHANNEL, keys="cosine", gate=0.1, removal=(0.9, 1.0)),
    Spec(name="long_keys", **CHANNEL, norm=3.0, removal=(0.0, 1.0)),
    Spec(name="nothing_removed", **CHANNEL, removal=(0.0, 0.0)),
    Spec(name="bf16_equal_keys", **LONG, keys="equal", gate=0.01, removal=(1.0, 1.0)),
    Spec(name="bf16_alike_keys", **LONG, keys="cosine", gate=0.1, removal=(1.5, 2.0)),
    Spec(name="bf16_slow", **LONG, gate=0.01, removal=(0.0, 2.0)),
)
