"""Streams text from a checkpoint through the memories' decode states.

    python -m memjax.generate --workdir=runs/quickstart --prompt='def main' --length=400

The prompt is read in one pass, or with --prefill in pieces, then each token costs one step on a
state of fixed size. The same seed gives the same text. Several prompts (--prompt=... --prompt=...)
are decoded together, each to the text that it has alone.
"""

import codecs
import functools
import os
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from memjax import checkpoint, config, train_step
from memjax.data import tokens as text_tokens
from memjax.nn.lm import LanguageModel, capacity
from memjax.typing import Array, Bool, Int, PRNGKeyArray, PyTree

TOKENISER = "tokeniser.json"  # in the workdir of a run whose tokens are no bytes


def sample(
    model: LanguageModel,
    params: PyTree,
    prompt: Sequence[int],
    length: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    prefill: int = 0,
) -> Iterator[int]:
    """Yields `length` tokens that continue `prompt`: `sample_rows` of one row."""
    rows = sample_rows(
        model,
        params,
        [prompt],
        length,
        seeds=[seed],
        temperature=temperature,
        top_k=top_k,
        prefill=prefill,
    )
    return (int(drawn) for (drawn,) in rows)


def sample_rows(
    model: LanguageModel,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    seeds: Sequence[int],
    temperature: float = 0.8,
    top_k: int = 0,
    prefill: int = 0,
) -> Iterator[np.ndarray]:
    """Yields `length` times the next token of all B prompts (at least one token each), int32[B].

    Rows are independent: each gives what it gives alone, up to rounding. Shorter prompts are padded
    in front with tokens that are not written, which changes no state. seeds: one for each row.
    temperature: >= 0; 0 takes the most likely token. top_k: draw from the k most likely tokens
    only; 0 for all. Only tokens of text are drawn. prefill: tokens of the prompts that are read at
    once, which bounds the memory that they take; 0 for all.

    Raises:
      ValueError: no prompts, an empty prompt, another number of seeds, a setting out of range, or
        more tokens than the model's attention layers can hold.
    """
    sizes = [len(prompt) for prompt in prompts]
    if not sizes or not min(sizes) or min(length, temperature, top_k, prefill) < 0:
        raise ValueError(
            "expected prompts of at least one token, and length, temperature, top_k, prefill >= 0; "
            f"given {sizes} tokens, {length}, {temperature}, {top_k}, {prefill}"
        )
    if len(seeds) != len(prompts):
        raise ValueError(f"expected a seed for each of {len(prompts)} prompts; given {len(seeds)}")
    limit, longest = capacity(model.config), max(sizes)
    if limit is not None and longest + length - 1 > limit:  # the last one is drawn, not read
        raise ValueError(
            f"{longest + length - 1} tokens (prompt {longest} + length {length}, the last not "
            f"read) do not fit the attention's capacity of {limit}; ask for at most "
            f"{max(0, limit - longest + 1)}"
        )
    read = jax.jit(functools.partial(absorb, model), donate_argnums=2)
    step = jax.jit(functools.partial(advance, model, temperature, top_k), donate_argnums=2)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return _decode(read, step, params, *padded(prompts), pieces(longest, prefill), length, keys)


def _decode(read, step, params, tokens, write, parts, length, keys):
    state = None
    for part in parts[:-1]:
        state = read(params, tokens[:, part], state, None if write is None else write[:, part])
    inputs, mask = tokens[:, parts[-1]], None if write is None else write[:, parts[-1]]
    for count in range(length):
        drawn, state = step(params, inputs, state, mask, keys, count)
        yield np.asarray(drawn)
        inputs, mask = drawn[:, None], None


def padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts as rows int32[B, T] that end together, and which of their tokens are written,
    bool[B, T]; None where all are."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), text_tokens.PAD, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    first = longest - np.array([*map(len, prompts)])
    return tokens, np.arange(longest) >= first[:, None] if first.any() else None


def pieces(length: int, size: int) -> list[slice]:
    """`length` tokens in pieces of `size`, the first one shorter; one piece where size is 0."""
    ends = range(length, 0, -(size or length))
    return [slice(max(0, end - (size or length)), end) for end in ends][::-1]


def absorb(
    model: LanguageModel,
    params: PyTree,
    tokens: Int[Array, "B T"],
    state: PyTree | None = None,
    write: Bool[Array, "B T"] | None = None,
) -> PyTree:
    """The state behind `tokens`; state and write as in `LanguageModel`."""
    last = jnp.full((tokens.shape[0], 1), tokens.shape[1] - 1)
    given = dict(write=write, select=last, differentiate=False)
    return model.apply({"params": params}, tokens, state, **given)[1]


def advance(
    model: LanguageModel,
    temperature: float,
    top_k: int,
    params: PyTree,
    tokens: Int[Array, "B T"],
    state: PyTree | None,
    write: Bool[Array, "B T"] | None,
    keys: PRNGKeyArray,
    count: int,
) -> tuple[Int[Array, " B"], PyTree]:
    """The token that follows each row, drawn with keys [B] for the `count`-th time, and the state
    behind `tokens`."""
    last = jnp.full((tokens.shape[0], 1), tokens.shape[1] - 1)
    given = dict(write=write, select=last, differentiate=False)
    logits, state = model.apply({"params": params}, tokens, state, **given)
    draw = jax.vmap(functools.partial(_draw, temperature, top_k, count))
    return draw(logits[:, 0], keys), state


def _draw(temperature, top_k, count, logits, key):
    logits = logits.at[: text_tokens.OFFSET].set(-jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits)
    if 0 < top_k < logits.shape[0]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
    return jax.random.categorical(jax.random.fold_in(key, count), logits / temperature)


def stream_text(
    tokens: Iterator[int], tokeniser: text_tokens.Tokeniser = text_tokens.BYTES
) -> Iterator[str]:
    """Text of tokens as its characters become complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokeniser.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def load(workdir: str, step: int | None = None) -> tuple[int, LanguageModel, PyTree, dict]:
    """(step, model, params, meta) of a run's checkpoint, by default its latest."""
    step, meta = checkpoint.read_meta(workdir, step)
    with config.user_errors(f"{workdir}, whose config this version does not know"):
        settings = train_step.model_of(config.from_json(config.to_json(meta["config"])))
    model = LanguageModel(settings)
    step, params, meta = checkpoint.restore_params(
        workdir, train_step.abstract_params(model), step=step
    )
    return step, model, params, meta


def load_tokeniser(workdir: str, bpe: int) -> text_tokens.Tokeniser:
    """The tokeniser of a run on text: the one that it kept, or bytes where data.bpe is 0."""
    if not bpe:
        return text_tokens.BYTES
    path = os.path.join(workdir, TOKENISER)
    with config.user_errors(path, ValueError, OSError), open(path, encoding="utf-8") as file:
        return text_tokens.from_json(file.read())


def define_flags() -> None:
    """The command's flags; made when it runs, so that other programs may import this module."""
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_integer("step", None, "checkpoint to use; the latest when not given")
    flags.DEFINE_multi_string("prompt", "", "text to continue; empty begins a document")
    flags.DEFINE_integer("length", 500, "tokens to generate", lower_bound=0)
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token", lower_bound=0)
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: all", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the draw; the n-th prompt has seed + n, from 0")
    flags.DEFINE_integer("prefill", 0, "tokens of prompts read at once; 0: all", lower_bound=0)


@config.exit_on_user_error
def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise config.UserError(
            f"{argv[1]!r} is no flag; flags begin with --, and a text with spaces needs quotes, as "
            "in --prompt='def main'"
        )
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    given = flags.FLAGS
    step, model, params, meta = load(given.workdir, given.step)
    if meta["config"]["data"]["name"] not in ("text", "tfds"):
        raise config.UserError(
            f"{given.workdir} was trained on {meta['config']['data']['name']!r}, whose tokens are "
            "no text; generate needs a run on data.name='text' or 'tfds'"
        )
    tokeniser = load_tokeniser(given.workdir, meta["config"]["data"].get("bpe", 0))
    prompts = [[text_tokens.BOS, *tokeniser.encode(prompt)] for prompt in given.prompt]
    with config.user_errors("generate"):
        rows = sample_rows(
            model,
            params,
            prompts,
            given.length,
            seeds=range(given.seed, given.seed + len(prompts)),
            temperature=given.temperature,
            top_k=given.top_k,
            prefill=given.prefill,
        )
    if len(prompts) > 1:
        texts = zip(*rows, strict=True) if given.length else [()] * len(prompts)
        for prompt, drawn in zip(given.prompt, texts, strict=True):
            print(prompt + "".join(stream_text(iter(drawn), tokeniser)))
        return
    print(given.prompt[0], end="", flush=True)
    for piece in stream_text((int(drawn) for (drawn,) in rows), tokeniser):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(config.parse_flags, config=False))
