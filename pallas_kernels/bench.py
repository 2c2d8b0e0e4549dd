"""Times the kernels on the GPU at hand, beside the plain chunked forms and flash-linear-attention.

    python -m pallas_kernels.bench                                  # the six standard shapes
    python -m pallas_kernels.bench --ops chunk_delta --repeats 50

The shapes are those that flash-linear-attention times its own kernels with, in bfloat16. Its Triton
kernels are timed too where `pip install flash-linear-attention` has put them beside a torch with
CUDA. Before anything is timed, outputs and gradients are compared with the token loop in float32.
"""

import argparse
import functools
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tables
from pallas_kernels.chunk_delta import reference as delta
from pallas_kernels.chunk_dplr import reference as dplr
from pallas_kernels.chunk_linear import reference as linear
from pallas_kernels.ops import ON_GPU, SLOW, arguments, function
from pallas_kernels.specs import held

SHAPES = (  # B, T, H, D
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
)
TRIED = (1, 256, 2)  # B, T, H of what is compared before timing, for each D
CHUNKS = {"none": 64, "head": 64, "channel": 16}  # of the plain forms, for what fits
HALVES = set("qkvab")  # arrays in bfloat16
DIRECTIONS = ("forward", "both")
FORMS = ("ours", "fla", "plain")
ALLOWED = 0.01  # relative RMS; the tests of the kernels have the exact bounds
LEAST = 0.02  # seconds of one measurement
LOOPS = {
    "chunk_linear": linear.sequential,
    "chunk_delta": delta.sequential,
    "chunk_dplr": dplr.sequential,
}
PEERS = {
    ("chunk_linear", "none"): ("fla.ops.simple_gla", "chunk_simple_gla"),
    ("chunk_linear", "head"): ("fla.ops.simple_gla", "chunk_simple_gla"),
    ("chunk_linear", "channel"): ("fla.ops.gla", "chunk_gla"),
    ("chunk_delta", "none"): ("fla.ops.delta_rule", "chunk_delta_rule"),
    ("chunk_delta", "head"): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ("chunk_delta", "channel"): ("fla.ops.kda", "chunk_kda"),
    ("chunk_dplr", "channel"): ("fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule"),
}
# Of fla's functions: arrays that have other names there, and what they are told besides.
RENAMED = {"chunk_dplr": {"g": "gk"}}
TOLD = {"chunk_dplr": {"safe_gate": True}}  # that no decay is fast, as ours is told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted({op for op, _ in PEERS})
    parser.add_argument("--ops", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=20, help="measurements of each median")
    given = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    if jax.default_backend() != "gpu":
        sys.exit(f"bench times kernels on a GPU; the platform here is {jax.default_backend()}")
    rows = []
    for op, decay in [case for case in PEERS if case[0] in given.ops]:
        known = forms(op, decay)
        for name, form in known.items():
            for width in sorted({shape[-1] for shape in SHAPES}):
                if error := wrong(op, decay, form, (*TRIED, width)):
                    sys.exit(f"{op}, decay {decay}, {name}, D {width}: {error}; nothing is timed")
        for shape in SHAPES:
            arrays = drawn(op, decay, shape)
            for direction in DIRECTIONS:
                row: dict = {"op": op, "decay": decay, "shape": shape, "direction": direction}
                for name, form in known.items():
                    try:
                        call, wait = form(*arrays, direction)
                        row[name] = timed(call, wait, given.repeats)
                    except RuntimeError as reason:  # out of memory
                        print(f"{name}: {reason}", file=sys.stderr)
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    written = tables.when(tables.made("jax"))
    print(f"{jax.devices()[0].device_kind}, {written}; ms, medians of {given.repeats}.\n")
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Milliseconds by form; last, how often ours runs in the time of fla's."""
    head = ["op", "decay", "B, T, H, D", "direction", *FORMS, "fla / ours"]
    lines = []
    for row in rows:
        times = [f"{1e3 * row[form]:.3f}" if form in row else "" for form in FORMS]
        ratio = f"{row['fla'] / row['ours']:.2f}" if {"fla", "ours"} <= row.keys() else ""
        shape = ", ".join(map(str, row["shape"]))
        lines.append([row["op"], row["decay"], shape, row["direction"], *times, ratio])
    return tables.markdown(head, lines)


def timed(call: Callable, wait: Callable, repeats: int) -> float:
    """Seconds of a call, the median of `repeats` measurements. One starts as many calls as last for
    LEAST and waits for the last, so that starting them takes no time of its own."""

    def lasts(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            found = call()
        wait(found)
        return time.perf_counter() - start

    lasts(2)  # compiles, and tunes what tunes itself
    count = max(1, math.ceil(LEAST / lasts(1)))
    return statistics.median(lasts(count) for _ in range(repeats)) / count


def wrong(op: str, decay: str, form: Callable, shape) -> str:
    """What is off in a form's outputs and gradients, or ""."""
    given, do = drawn(op, decay, shape)

    def results(form):
        call, _ = form(given, do, "both")
        o, state, (gradients,) = call()
        found = {"o": o, "state": state} | {f"d{name}": a for name, a in gradients.items()}
        return {name: in_numpy(a) for name, a in found.items()}

    exact, found = results(in_jax(LOOPS[op], dtype=jnp.float32)), results(form)
    for name, wanted in exact.items():
        error = np.sqrt(np.mean((found[name] - wanted) ** 2) / np.mean(wanted**2))
        if not error <= ALLOWED:
            return f"{name} is {error:.1e} off, at most {ALLOWED}"
    return ""


def drawn(op: str, decay: str, shape) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs by name and the cotangent of o, float32; q, k, v, a, b and that as bfloat16 holds
    them."""
    rng = np.random.default_rng(0)
    names = arguments(op, decay, shape, jnp.bfloat16).items()
    given = {name: rng.standard_normal(a.shape, np.float32) for name, a in names}
    for name in "qk":
        given[name] /= np.linalg.norm(given[name], axis=-1, keepdims=True)
    if "g" in given:
        given["g"] = -np.logaddexp(0, given["g"] - 2)
    if "beta" in given:
        given["beta"] = sigmoid(given["beta"])
    if op == "chunk_dplr":  # as in RWKV-7
        given["a"] /= -np.linalg.norm(given["a"], axis=-1, keepdims=True)
        given["b"] = -sigmoid(given["b"]) * given["a"]
        given["g"] = np.maximum(given["g"], SLOW)
    for name in HALVES & given.keys():
        given[name] = held(given[name], "bfloat16")
    return given, held(rng.standard_normal(shape, np.float32), "bfloat16")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------- forms


def forms(op: str, decay: str) -> dict[str, Callable]:
    """By name, (inputs, cotangent of o, direction) -> what `timed` takes: what starts a call, and
    what waits for its results. fla's are there where they can run."""
    ours, plain = ON_GPU[op, decay]
    found = {"ours": in_jax(ours), "plain": in_jax(plain, chunk=CHUNKS[decay])}
    module, name = PEERS[op, decay]
    try:
        torch = importlib.import_module("torch")
        peer = getattr(importlib.import_module(module), name)
    except ImportError as reason:
        print(f"without flash-linear-attention: {reason}", file=sys.stderr)
        return found
    if not torch.cuda.is_available():
        print("without flash-linear-attention: torch sees no GPU", file=sys.stderr)
        return found
    peer = functools.partial(peer, **TOLD.get(op, {}))
    return found | {"fla": in_torch(torch, peer, RENAMED.get(op, {}))}


def in_jax(run, dtype=jnp.bfloat16, **options) -> Callable:
    def form(given, do, direction):
        arrays = {
            name: jnp.asarray(a, dtype if name in HALVES else jnp.float32)
            for name, a in given.items()
        }
        do = jnp.asarray(do, dtype)
        call = jax.jit(function(run, direction, **options))
        arguments = (arrays,) if direction == "forward" else (arrays, do)
        return functools.partial(call, *arguments), jax.block_until_ready

    return form


def in_torch(torch, run, renamed: dict[str, str]) -> Callable:
    def form(given, do, direction):
        both = direction == "both"

        def tensor(a, dtype):
            return torch.tensor(a, device="cuda", dtype=dtype)

        tensors = {
            name: tensor(a, torch.bfloat16 if name in HALVES else torch.float32)
            for name, a in given.items()
        }
        for a in tensors.values():
            a.requires_grad_(both)
        named = {renamed.get(name, name): a for name, a in tensors.items()}
        do = tensor(do, torch.bfloat16)

        def call():
            o, state = run(**named, output_final_state=True)
            if not both:
                return o, state
            gradients = torch.autograd.grad(o, list(tensors.values()), do)
            return o, state, (dict(zip(tensors, gradients, strict=True)),)

        return call, lambda found: torch.cuda.synchronize()

    return form


def in_numpy(array) -> np.ndarray:
    """float64, from jax or torch."""
    if isinstance(array, jax.Array):
        return np.asarray(array.astype(jnp.float32), np.float64)
    return array.detach().float().cpu().numpy().astype(np.float64)


if __name__ == "__main__":
    main()
