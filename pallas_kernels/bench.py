"""Times the kernels on the GPU at hand, beside the plain chunked forms and flash-linear-attention.

    python -m pallas_kernels.bench                                  # the six standard shapes
    python -m pallas_kernels.bench --ops chunk_delta --shapes 4,2048,16,128 --repeats 50

The shapes are those that flash-linear-attention times its own kernels with, in bfloat16. Its Triton
kernels are timed too where `pip install flash-linear-attention` has put them beside a torch with
CUDA. Before anything is timed, outputs and gradients are compared with the token loop in float32; a
form that refuses is left out. Programs compile for minutes, the plain forms longest (`--forms ours
fla`). Recurrences of channels have H D of them, and attention sees a window of 512 tokens.
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
from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tables
from pallas_kernels.chunk_delta import reference as delta
from pallas_kernels.chunk_dplr import reference as dplr
from pallas_kernels.chunk_linear import reference as linear
from pallas_kernels.linear_scan import reference as scan
from pallas_kernels.ops import ON_GPU, OPS, SLOW, WALKS, answered, arguments, function, windowed
from pallas_kernels.window_attention import reference as window
from pallas_kernels.wkv4 import reference as rwkv4

SHAPES = (  # B, T, H, D
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
)
TRIED = (1, 256, 2)  # B, T, H of what is compared before timing, for each D
DIRECTIONS = ("forward", "both")
FORMS = ("ours", "fla", "plain")
ALLOWED = 0.01  # relative RMS; the tests of the kernels have the exact bounds
LEAST = 0.02  # seconds of one measurement
LOOPS = {
    "chunk_linear": linear.sequential,
    "chunk_delta": delta.sequential,
    "chunk_dplr": dplr.sequential,
    "window_attention": windowed(window.definition),
    "linear_scan": scan.sequential,
    "wkv4": rwkv4.sequential,
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
CASES = (*ON_GPU, ("window_attention", "none"))
# Of fla's functions: arrays that have other names there, and what they are told besides.
RENAMED = {"chunk_dplr": {"g": "gk"}}
TOLD = {"chunk_dplr": {"safe_gate": True}}  # that no decay is fast, as ours is told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted({op for op, _ in CASES})
    parser.add_argument("--ops", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--shapes", nargs="+", type=shape_of, default=SHAPES, help="each B,T,H,D with D 64 to 256"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--repeats", type=int, default=20, help="measurements of each median")
    given = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    if jax.default_backend() != "gpu":
        sys.exit(f"bench times kernels on a GPU; the platform here is {jax.default_backend()}")
    rows = []
    for op, decay in [case for case in CASES if case[0] in given.ops]:
        widths = sorted({shape[-1] for shape in given.shapes})
        known = right(op, decay, given.forms, widths)
        for shape in given.shapes:
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


def shape_of(text: str) -> tuple[int, ...]:
    """The four numbers of a shape, separated by commas."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(map(str.isdecimal, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,H,D, such as 4,2048,16,128")
    return tuple(map(int, numbers))


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


def right(op: str, decay: str, names: Container[str], widths: list[int]) -> dict[str, Callable]:
    """The forms of these names that run; ends the program where one is wrong."""
    found = {}
    for name, form in forms(op, decay).items():
        if name in names:
            try:
                errors = {width: wrong(op, decay, form, (*TRIED, width)) for width in widths}
            except RuntimeError as reason:  # what fla knows to be wrong on this GPU, too
                print(f"{op}, decay {decay}, without {name}: {reason}", file=sys.stderr)
                continue
            for width in filter(errors.get, errors):
                sys.exit(f"{op}, decay {decay}, {name}, D {width}: {errors[width]}; stopped")
            found[name] = form
    return found


def wrong(op: str, decay: str, form: Callable, shape) -> str:
    """What is off in a form's outputs and gradients, or ""."""
    given, do = drawn(op, decay, shape)

    def results(form):
        call, _ = form(given, do, "both")
        o, state, (gradients,) = call()
        named = {"o": o, "state": state} | {f"d{name}": a for name, a in gradients.items()}
        leaves = jax.tree_util.tree_leaves_with_path(named)
        return {
            jax.tree_util.keystr(path, simple=True, separator=" "): in_numpy(a)
            for path, a in leaves
        }

    loop = functools.partial(LOOPS[op], **({"weighted": True} if decay == "weighted" else {}))
    exact, found = results(in_jax(loop, dtype=jnp.float32)), results(form)
    for name, wanted in exact.items():
        error = np.sqrt(np.mean((found[name] - wanted) ** 2) / np.mean(wanted**2))
        if not error <= ALLOWED:
            return f"{name} is {error:.1e} off, at most {ALLOWED}"
    return ""


def drawn(op: str, decay: str, shape) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs by name and the cotangent of o, in bfloat16 where the op takes that, others in
    float32."""
    rng = np.random.default_rng(0)
    wanted = arguments(op, decay, shape, jnp.bfloat16)
    given = {name: rng.standard_normal(a.shape, np.float32) for name, a in wanted.items()}
    if op not in WALKS:
        for name in "qk":
            given[name] /= np.linalg.norm(given[name], axis=-1, keepdims=True)
    for name in {"g", "w"} & given.keys():
        given[name] = -np.logaddexp(0, given[name] - 2)
    if "beta" in given:
        given["beta"] = sigmoid(given["beta"])
    if op == "chunk_dplr":  # as in RWKV-7
        given["a"] /= -np.linalg.norm(given["a"], axis=-1, keepdims=True)
        given["b"] = -sigmoid(given["b"]) * given["a"]
        given["g"] = np.maximum(given["g"], SLOW)
    given = {name: a.astype(wanted[name].dtype) for name, a in given.items()}
    like = answered(wanted)
    return given, rng.standard_normal(like.shape, np.float32).astype(like.dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------- forms


def forms(op: str, decay: str) -> dict[str, Callable]:
    """By name, (inputs, cotangent of o, direction) -> what `timed` takes: what starts a call, and
    what waits for its results. fla's are there where they can run."""
    ours, plain = (OPS | ON_GPU)[op, decay]
    found = {"ours": in_jax(ours), "plain": in_jax(plain)}
    if (op, decay) not in PEERS:
        return found
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


def in_jax(run, dtype=None) -> Callable:
    """dtype: that all arrays are converted to; None leaves each its own."""

    def form(given, do, direction):
        arrays = {name: jnp.asarray(a, dtype) for name, a in given.items()}
        call = jax.jit(function(run, direction))
        arguments = (arrays,) if direction == "forward" else (arrays, jnp.asarray(do, dtype))
        return functools.partial(call, *arguments), jax.block_until_ready

    return form


def in_torch(torch, run, renamed: dict[str, str]) -> Callable:
    def tensor(a):
        dtype = torch.float32 if a.dtype == np.float32 else torch.bfloat16
        return torch.tensor(a.astype(np.float32), device="cuda", dtype=dtype)

    def form(given, do, direction):
        both = direction == "both"
        tensors = {name: tensor(a) for name, a in given.items()}
        for a in tensors.values():
            a.requires_grad_(both)
        named = {renamed.get(name, name): a for name, a in tensors.items()}
        do = tensor(do)

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
