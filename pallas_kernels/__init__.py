"""Kernels for recurrent memories, with a reference beside each. Needs jax alone.

    from pallas_kernels import chunk_delta, chunk_linear, deep_memory, lattice, linear_scan, wkv4
    o, state = chunk_linear(q, k, v, g=log_decay)

An op raises NotImplementedError with the reason where no kernel serves; window_attention has a
plain form for platforms without one. See README.md.
"""

from pallas_kernels.chunk_delta.api import chunk_delta
from pallas_kernels.chunk_dplr.api import chunk_dplr
from pallas_kernels.chunk_linear.api import chunk_linear
from pallas_kernels.common import interpreted
from pallas_kernels.deep_memory.api import deep_memory
from pallas_kernels.deep_network.api import deep_network
from pallas_kernels.gka.api import gka
from pallas_kernels.lattice.api import lattice
from pallas_kernels.linear_scan.api import linear_scan
from pallas_kernels.window_attention.api import window_attention
from pallas_kernels.wkv4.api import wkv4

__all__ = [
    "chunk_delta",
    "chunk_dplr",
    "chunk_linear",
    "deep_memory",
    "deep_network",
    "gka",
    "interpreted",
    "lattice",
    "linear_scan",
    "window_attention",
    "wkv4",
]
