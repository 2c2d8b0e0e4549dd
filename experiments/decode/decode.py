"""State bytes and microseconds of decoding against the context, for layers of each kind.

    python experiments/decode/decode.py

Every model reads 1k, 4k, 16k and 64k tokens, in pieces of 1024, and at each of these contexts draws
tokens one by one; models with a state of fixed size take turns of 10 tokens, the others come one by
one, and the median of 12 turns is kept. The bytes of the state go on to 1M tokens, from shapes
alone. Results, table and picture are beside this file. Contexts that are measured are kept; --again
measures all of them.
"""

import argparse
import functools
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from memjax import generate, results
from memjax.benchmark import time_in_turns
from memjax.nn.lm import LanguageModel, ModelConfig, initial_state
from memjax.nn.stack import mixer_names, mixer_options
from memjax.train import state_bytes, versions
from memjax.train_step import abstract_params, init_params

FOLDER = pathlib.Path(__file__).parent
RESULTS = str(FOLDER / "results.jsonl")
CONTEXTS = [2**10, 2**12, 2**14, 2**16]
SIZES = [*CONTEXTS, 2**18, 2**20]
PIECE, TURN, TURNS = 1024, 10, 12
HYBRID = "hybrid(sliding_window, gated_delta_net)"
# name: (layer, the hybrid's option)
MODELS = {
    "attention": ("attention", None),
    "sliding_window": ("sliding_window", None),
    "gated_delta_net": ("gated_delta_net", None),
    **{
        f"hybrid, {combine}": (HYBRID, combine)
        for combine in ("gate", "parallel", "sequential", "window_exit")
    },
    "bmojo_f": ("bmojo_f(gated_delta_net)", None),
    "bmojo": ("bmojo(gated_delta_net)", None),
    "mac": ("mac(titans)", None),
    "mag": ("mag(sliding_window, titans)", None),
    "mal": ("mal(sliding_window, titans)", None),
    "memory_caching": ("memory_caching(gated_delta_net)", None),
}
GROW = ("attention", "memory_caching")  # they are made anew for each context, with room for it


def model_of(name, context):
    """One layer of width 128 with two heads, windows of 256, and room for the context."""
    layer, combine = MODELS[name]
    room = context + TURN * (TURNS + 1)  # the first turn is not counted
    window = room if name == "attention" else 256
    wanted = {"heads": 2, "window": window, "segment": 256, "slots": -(-room // 256)}
    wanted |= {"combine": combine} if combine else {}
    mixers = {
        mixer: {k: v for k, v in wanted.items() if k in mixer_options(mixer)}
        for mixer in mixer_names(layer)
    }
    return LanguageModel(ModelConfig(vocab=259, dim=128, layers=(((layer,), 1),), mixers=mixers))


class Decoder:
    """A model with random weights and its state behind a context that grows."""

    def __init__(self, name, context):
        model, self.at = model_of(name, context), 0
        make = functools.partial(init_params, model)
        self.params = nn.unbox(jax.jit(make)(jax.random.key(0)))
        self.bytes = state_bytes(model, self.params)
        self.state = jax.jit(lambda params: initial_state(model, params, 1))(self.params)
        self.read = jax.jit(functools.partial(generate.absorb, model), donate_argnums=2)
        step = functools.partial(generate.advance, model, 0.0, 0)
        self.step = jax.jit(step, donate_argnums=2)

    def prefill(self, tokens):
        """Reads tokens [T] up to their end; those that were read before are not read again."""
        for piece in generate.pieces(len(tokens) - self.at, PIECE):
            part = tokens[None, self.at + piece.start : self.at + piece.stop]
            self.state = self.read(self.params, part, self.state)
        self.at = len(tokens)
        jax.block_until_ready(self.state)

    def turn(self):
        """A function that draws the tokens of one turn at each call; the state here is kept."""
        token, state = jnp.full((1,), 3), jax.tree.map(jnp.copy, self.state)
        keys = jax.random.key(0)[None]

        def call():
            nonlocal token, state
            for _ in range(TURN):
                token, state = self.step(self.params, token[:, None], state, None, keys, 0)
            return token

        return call


def measure(decoders, context):
    """Rows of one context: all models read up to it, then decode in turns."""
    tokens = np.random.default_rng(0).integers(3, 259, max(CONTEXTS)).astype(np.int32)
    for name in MODELS:
        if name in GROW or name not in decoders:
            decoders[name] = Decoder(name, context)
        decoders[name].prefill(tokens[:context])
        print(f"{name}: {context} tokens read", flush=True)
    load = os.getloadavg()[0]
    # apart: a state of many megabytes would push those of the others out of the caches
    groups = [[name for name in MODELS if name not in GROW], *([name] for name in GROW)]
    seconds = {}
    for group in groups:
        seconds |= time_in_turns({name: decoders[name].turn() for name in group}, TURNS)
    return [
        {
            "model": name,
            "context": context,
            "state_bytes": decoders[name].bytes,
            "decode_us": round(1e6 * seconds[name] / TURN, 1),
            "load": round(load, 2),
            "versions": versions(),
        }
        for name in MODELS
    ]


def sized(name, context):
    """The row of a context that is too long to be measured."""
    model = model_of(name, context)
    size = state_bytes(model, abstract_params(model))
    return {"model": name, "context": context, "state_bytes": size, "decode_us": None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure all contexts again")
    known = [] if parser.parse_args().again else results.read(RESULTS)
    rows = {key(row): row for row in known}
    decoders: dict[str, Decoder] = {}
    for context in CONTEXTS:
        if not all((name, context) in rows for name in MODELS):
            rows |= {key(row): row for row in measure(decoders, context)}
            results.write(RESULTS, rows.values())
    for name in MODELS:
        rows |= {(name, context): sized(name, context) for context in SIZES[len(CONTEXTS) :]}
    results.write(RESULTS, rows.values())
    results.write_tables(str(FOLDER / "README.md"), tables(rows.values()))
    draw(rows.values()).savefig(FOLDER / "decode.png")


def key(row):
    return row["model"], row["context"]


def figures(rows, name, figure, contexts):
    """A figure of a model at each context."""
    found = {row["context"]: row[figure] for row in results.select(rows, model=name)}
    return [found[context] for context in contexts]


def human(size):
    """Bytes in KiB or MiB."""
    return f"{size / 2**10:.0f} KiB" if size < 2**20 else f"{size / 2**20:.1f} MiB"


def short(context):
    return f"{context // 2**10}k" if context < 2**20 else f"{context // 2**20}M"


def tables(rows):
    """State bytes at all contexts, microseconds at those that were measured."""
    head = ["model", *(f"state, {short(n)}" for n in SIZES), *(f"us, {short(n)}" for n in CONTEXTS)]
    lines = [
        [
            f"`{name}`",
            *(human(size) for size in figures(rows, name, "state_bytes", SIZES)),
            *(f"{time:.0f}" for time in figures(rows, name, "decode_us", CONTEXTS)),
        ]
        for name in MODELS
    ]
    return {"decode": (head, lines)}


def draw(rows):
    """State bytes on the left, microseconds a token on the right; a line for each model."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(MODELS):
        color = "black" if name == "attention" else f"C{i - 1}"
        style = dict(color=color, marker="os"[i > 10], linestyle="-:"[name in GROW])
        left.plot(SIZES, figures(rows, name, "state_bytes", SIZES), label=name, **style)
        right.plot(CONTEXTS, figures(rows, name, "decode_us", CONTEXTS), **style)
    left.set_ylabel("bytes of one sequence's state")
    right.set_ylabel("microseconds a token")
    for axes, contexts in ((left, SIZES), (right, CONTEXTS)):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [short(n) for n in contexts])
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
