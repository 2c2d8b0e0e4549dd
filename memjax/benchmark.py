"""Speed and memory of the cells' forms, each checked before it is timed.

    python -m memjax.benchmark --cells=delta_net --length=64,4096 --out=benchmark.json

For every cell, length and form: milliseconds of the forward pass and of forward and backward
(medians; the forms take turns, so that a busy machine slows all of them), microseconds of one
decoding step per token of a batch row, seconds of compilation, peak temporary memory and
floating-point operations (see `memjax.cost`) of forward and backward, and bytes of one sequence's
state. A form whose values or gradients are further from `scan` than max(1e-5, 3 x scan's own
distance from float64) is refused (on at most 256 tokens, see `memjax.workload`).

`--out` holds the figures of each cell as soon as it is measured, and draws the times against the
length at the end. `--peers` runs the same work in other libraries
(`pip install -e '.[peers]'`), whole layers of theirs beside ours among it. `--record` keeps the
order of the forms for `implementation=None`.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import memjax
from memjax import cells, cost, forms, peers
from memjax.cell import FORMS, MemoryCell
from memjax.config import UserError, exit_on_user_error, parse_flags, user_errors, write_text
from memjax.nn.layers import Context
from memjax.nn.stack import make_mixer
from memjax.registry import CellSpec
from memjax.typing import PyTree
from memjax.workload import (
    SHOWN,
    STEPS,
    Shape,
    backward,
    check,
    distances,
    forms_of,
    forward,
    problem,
)

COLORS = [matplotlib.colormaps["tab20"](i) for i in range(20)]
STYLES = ("v--", "o-", "s:", "^-.")


# ---------------------------------------------------------------- timing


def check_peer(peer: peers.Peer, cell: MemoryCell, params: PyTree, xs: PyTree) -> float:
    """Distance of a peer's answers from `scan`; UserError when it does other work."""
    answers = jax.device_get(jax.jit(functools.partial(forward, cell, "scan"))(params, xs)[0])
    (far,) = distances([peer.answers(jax.device_get(xs))], [answers])
    if far > 1e-4:
        raise UserError(f"{peer.name}: relative distance {far:.1e} from scan; it is not timed")
    return far


def compile_(function: Callable, *arguments) -> tuple[Callable, float, int | None, int | None]:
    """(compiled function, seconds of compilation, bytes of temporary memory, operations)."""
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    memory = getattr(analysis, "temp_size_in_bytes", None)
    try:
        operations = cost.flops(function, *arguments)
    except ValueError:
        operations = None
    return compiled, seconds, memory, operations


def time_in_turns(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of each call, after one call that is not counted; they take turns."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def measure(
    spec: CellSpec,
    shape: Shape,
    forms: Sequence[str] = FORMS,
    repeats: int = 5,
    limit: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
    others: bool = False,
) -> list[dict[str, Any]]:
    """One record for each form of one cell, `scan` first, then for each peer.

    limit: bytes of temporary memory; what needs more is not timed (None in the record).
    others: whether peers take part.

    Raises:
      UserError: a form is wrong; see `check`.
    """
    cell, params, xs = problem(spec, shape)
    serving = forms_of(cell, params, xs, forms)
    distance = check(spec, shape, serving)
    params, xs = jax.device_put((params, xs))
    state = jax.eval_shape(lambda: memjax.initial_state(cell, params, 1, shape.heads))
    records: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for form in serving:
        compiled, sizes = compile_both(cell, form, params, xs)
        ready = {key: f for key, f in compiled.items() if (sizes[key][1] or 0) <= limit}
        calls |= {(form, key): function for key, function in ready.items()}
        records[form] = {"cell": spec.name, "class": type(cell).__name__, "form": form}
        records[form] |= dataclasses.asdict(shape)
        records[form] |= dict.fromkeys(("forward_ms", "both_ms", "decode_us"))
        records[form] |= {
            "distance_from_scan": distance[form],
            "compile_s": sizes["both_ms"][0],
            "peak_bytes": sizes["both_ms"][1],
            "forward_peak_bytes": sizes["forward_ms"][1],
            "flops": sizes["both_ms"][2],
            "forward_flops": sizes["forward_ms"][2],
            "state_bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)),
        }
        skipped = "" if len(ready) == len(compiled) else "; too large to time, see --max_gib"
        say(f"{spec.name:<17} {form:<8} compiled in {sizes['both_ms'][0]:.1f} s{skipped}")
    calls |= decode_calls(cell, params, xs, serving)
    for name, work, far in other_work(cell, params, xs, spec, shape) if others and records else ():
        records[name] = dict.fromkeys(next(iter(records.values())))
        records[name] |= {"cell": spec.name, "form": name, "distance_from_scan": far}
        records[name] |= dataclasses.asdict(shape)
        calls |= {(name, "forward_ms"): work[0], (name, "both_ms"): work[1]}
    for (form, key), seconds in time_in_turns(calls, repeats).items():
        records[form][key] = seconds * (1e6 / STEPS / shape.batch if key == "decode_us" else 1e3)
    return with_ratios(list(records.values()))


def other_work(
    cell: MemoryCell, params: PyTree, xs: PyTree, spec: CellSpec, shape: Shape
) -> Iterator[tuple[str, Sequence[Callable[[], Any]], float | None]]:
    """(name, calls of the forward pass and of both passes, distance from `scan`) of each peer of a
    cell; of each layer of theirs, and of ours beside it, without a distance."""
    for peer in peers.of(spec.name):
        given = peer.prepare(xs)
        yield peer.name, peer.calls(given), check_peer(peer, cell, params, given)
    for layer in peers.layers_of(spec.name):
        width = shape.heads * shape.dim
        rng = np.random.default_rng(0)
        x = rng.normal(size=(shape.batch, shape.length, width)).astype(np.float32)
        options = {layer.cell: {"heads": shape.heads, **layer.options}}
        module = make_mixer(layer.cell, options, dim=width, std=0.02)()
        yield "memjax layer", layer_calls(module, x), None
        yield layer.name, layer.calls(x, shape.heads), None


def layer_calls(module: nn.Module, x: np.ndarray) -> Sequence[Callable[[], Any]]:
    """The forward pass of a mixer, and forward and backward with gradients of the weights too."""
    ctx = Context(None, None, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, None, ctx))
    ahead = jax.jit(lambda params, x: module.apply(params, x, None, ctx)[0])
    both = jax.jit(jax.grad(lambda params, x: jnp.sum(ahead(params, x)), (0, 1)))
    given = jax.device_put((params, x))
    return [functools.partial(function, *given) for function in (ahead, both)]


def compile_both(cell: MemoryCell, form: str, params: PyTree, xs: PyTree) -> tuple[dict, dict]:
    """Calls of the forward pass and of both passes, and (seconds, bytes, operations) of each."""
    ahead = functools.partial(forward, cell, form)
    cotangent = jnp.ones_like(jax.eval_shape(ahead, params, xs)[0])
    calls, sizes = {}, {}
    for key, function, given in (
        ("forward_ms", ahead, (params, xs)),
        ("both_ms", functools.partial(backward, cell, form), (params, xs, cotangent)),
    ):
        compiled, *sizes[key] = compile_(function, *given)
        calls[key] = functools.partial(compiled, *given)
    return calls, sizes


def decode_calls(cell: MemoryCell, params: PyTree, xs: PyTree, forms: Sequence[str]) -> dict:
    """One timed call for each form: `STEPS` tokens one by one through the jitted step."""
    batch, heads = jax.tree.leaves(xs)[0].shape[0], memjax.recurrence.memories(params, None, xs)
    token = jax.tree.map(lambda a: a[:, :1], xs)
    state = memjax.initial_state(cell, params, batch, heads)

    def steps(step):
        carried = state
        for _ in range(STEPS):
            y, carried = step(params, token, carried)
        return y, carried

    return {
        (form, "decode_us"): functools.partial(
            steps, compile_(functools.partial(forward, cell, form), params, token, state)[0]
        )
        for form in forms
    }


def with_ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds how many times faster and smaller than `scan` each form is, where `scan` was run and
    does the same work."""
    base = next((record for record in records if record["form"] == "scan"), None)
    for record in records:
        for ratio, key in RATIOS.items():
            record[ratio] = None
            if base is not None and record["distance_from_scan"] is not None:
                known = base[key] and record[key]
                record[ratio] = base[key] / record[key] if known else None
    return records


RATIOS = {"forward_x": "forward_ms", "both_x": "both_ms", "peak_x": "peak_bytes"}


# ---------------------------------------------------------------- the table and the command

# heading, key, how to show it, unit
COLUMNS = (
    ("cell", "cell", "{}", 1),
    ("form", "form", "{}", 1),
    ("tokens", "length", "{}", 1),
    ("forward ms", "forward_ms", "{:.2f}", 1),
    ("x scan", "forward_x", "{:.2f}", 1),
    ("fwd+bwd ms", "both_ms", "{:.2f}", 1),
    ("x scan", "both_x", "{:.2f}", 1),
    ("peak MiB", "peak_bytes", "{:.2f}", 2**20),
    ("x scan", "peak_x", "{:.2f}", 1),
    ("GFLOP", "flops", "{:.3f}", 1e9),
    ("decode us", "decode_us", "{:.1f}", 1),
    ("compile s", "compile_s", "{:.2f}", 1),
    ("state KiB", "state_bytes", "{:.1f}", 2**10),
)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Aligned columns, text left and numbers right; `x scan` is scan's figure over this one's."""
    rows = [[heading for heading, *_ in COLUMNS]]
    for record in records:
        values = [(record[key], show, unit) for _, key, show, unit in COLUMNS]
        rows.append(
            [
                "-" if value is None else show.format(value if unit == 1 else value / unit)
                for value, show, unit in values
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; made when it runs, so that other programs may import this module."""
    shape, common = Shape(), dict[str, Any](flag_values=values)
    flags.DEFINE_list("cells", [], "names; one of each class of cells when not given", **common)
    flags.DEFINE_list("forms", list(SHOWN), "forms to measure", **common)
    flags.DEFINE_list("length", [str(shape.length)], "tokens in a sequence, one or more", **common)
    flags.DEFINE_integer("chunk", 0, "of the chunked forms; 0: the library's", 0, **common)
    for field, text in (
        ("batch", "sequences"),
        ("heads", "memories of a layer"),
        ("dim", "key and value dimension of one memory"),
        ("window", "tokens that sliding_window sees"),
    ):
        flags.DEFINE_integer(field, getattr(shape, field), text, lower_bound=1, **common)
    flags.DEFINE_integer("repeats", 5, "timed calls, median shown", lower_bound=1, **common)
    flags.DEFINE_float("max_gib", 4, "temporary memory that may be timed", 0, **common)
    flags.DEFINE_string("out", "", "file for the figures, *.json; a PNG beside it", **common)
    flags.DEFINE_bool("peers", False, "also run other libraries' forms", **common)
    flags.DEFINE_bool(
        "record", False, "keep the order of the forms for implementation=None", **common
    )


def distinct(names: Sequence[str]) -> list[str]:
    """One name for each class of cells, that of its own file where there is one."""
    found: dict[type, str] = {}
    for name in names:
        spec = cells.get(name)
        kind = type(spec.cell())
        if kind not in found or kind.__module__ == spec.mixer.__module__:
            found[kind] = name
    return sorted(found.values())


def chosen(
    given: flags.FlagValues, rest: Sequence[str]
) -> tuple[list[Shape], list[str], list[str]]:
    """(shapes, names of cells, forms) of the flags; UserError for what does not exist."""
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; see python -m memjax.benchmark --help")
    with user_errors("--cells"):
        names = [cells.get(name).name for name in given.cells] or distinct(cells.names())
    for form in given.forms:
        if form not in FORMS:
            raise UserError(f"--forms: no form {form!r}; allowed: {', '.join(SHOWN)}")
    if given.chunk & (given.chunk - 1):
        raise UserError(f"--chunk={given.chunk}: expected a power of two, or 0")
    if not all(text.isdigit() and int(text) for text in given.length):
        shown = ",".join(given.length)
        raise UserError(f"--length={shown}: expected numbers of tokens, such as 64,4096")
    same = {f.name: getattr(given, f.name) for f in dataclasses.fields(Shape) if f.name != "length"}
    return [Shape(length=int(text), **same) for text in given.length], names, given.forms


def draw(records: Sequence[dict[str, Any]], path: str) -> None:
    """A PNG of microseconds per token by length: a colour for each cell, a style for each form."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(dict.fromkeys(r["cell"] for r in records), itertools.cycle(COLORS)))
    styles = dict(zip(dict.fromkeys(r["form"] for r in records), itertools.cycle(STYLES)))
    titles = {"forward_ms": "forward", "both_ms": "forward and backward"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for cell, form in dict.fromkeys((r["cell"], r["form"]) for r in records):
            points = [
                (r["length"], 1e3 * r[key] / r["batch"] / r["length"])
                for r in records
                if (r["cell"], r["form"]) == (cell, form) and r[key]
            ]
            if not points:  # too large at every length
                continue
            ax.plot(*zip(*points, strict=True), styles[form], color=colors[cell])
        ax.set(title=title, xlabel="tokens", xscale="log", yscale="log")
    axes[0].set_ylabel("microseconds per token")
    keys = [Line2D([], [], color=colors[cell], label=cell) for cell in colors]
    for form, style in styles.items():
        keys += axes[0].plot([], [], style, color="black", label=form)
    figure.legend(handles=keys, loc="outside right center", fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    shapes, names, wanted = chosen(given, argv)
    about = {
        "memjax": memjax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "machine": platform.machine(),
        "repeats": given.repeats,
    }
    picture = os.path.splitext(given.out)[0] + ".png"
    if given.out and (given.out == picture or not os.path.isdir(os.path.dirname(given.out) or ".")):
        raise UserError(f"--out={given.out}: expected a file *.json in a folder that exists")
    sizes = dataclasses.asdict(shapes[0]).items()
    told = ", ".join(f"{name} {size}" for name, size in sizes if name != "length" and size)
    print(f"{told}, float32, {about['device']}, jax {jax.__version__}")
    say, limit = functools.partial(print, file=sys.stderr, flush=True), given.max_gib * 2**30
    records: list[dict[str, Any]] = []
    refused = []
    for name, shape in itertools.product(names, shapes):
        try:
            records += measure(
                cells.get(name), shape, wanted, given.repeats, limit, say, given.peers
            )
        except UserError as err:  # the others' figures are kept
            say(f"refused: {err}")
            refused.append(str(err))
        if given.out and records:  # at once: an interrupted run keeps them too
            with user_errors(f"--out={given.out}", OSError):
                text = json.dumps({**about, "records": records}, indent=2) + "\n"
                write_text(given.out, text)
    if not records:
        raise UserError(
            "\n".join(dict.fromkeys(refused))
            or f"--forms={','.join(wanted)}: none of these cells has such a form here: "
            f"{', '.join(names)}; leave --forms out to see those they have"
        )
    print(table(records))
    if given.record:
        ours = [record for record in records if record["form"] in FORMS]
        kept = forms.updated(forms.table(), about["platform"], ours)
        write_text(str(forms.PATH), json.dumps(kept, indent=1) + "\n")
    if given.out:
        with user_errors(f"--out={given.out}", OSError):
            draw(records, picture)
    if refused:
        raise UserError("\n".join(dict.fromkeys(refused)))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(parse_flags, config=False))
