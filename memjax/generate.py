"""Streams text from a checkpoint through the memories' decode states.

    python -m memjax.generate --workdir=runs/quickstart --prompt='def main' --length=400

The prompt is read in one pass, then each token costs one step on a state of fixed size. The same
seed gives the same text.
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
from memjax.typing import PyTree

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
) -> Iterator[int]:
    """Yields `length` tokens that continue `prompt` (at least one token).

    temperature: >= 0; 0 takes the most likely token. top_k: draw from the k most likely tokens
    only; 0 for all. Only tokens of text are drawn.

    Raises:
      ValueError: an empty prompt, a setting out of range, or more tokens than the model's
        attention layers can hold.
    """
    limit, total = capacity(model.config), len(prompt) + length
    if not len(prompt) or length < 0 or temperature < 0 or top_k < 0:
        raise ValueError(
            "expected a prompt of at least one token, and length, temperature, top_k >= 0; given "
            f"{len(prompt)} tokens, {length}, {temperature}, {top_k}"
        )
    if limit is not None and total > limit:
        raise ValueError(
            f"{total} tokens (prompt {len(prompt)} + length {length}) do not fit the attention's "
            f"capacity of {limit}; ask for at most {max(0, limit - len(prompt))}"
        )
    advance = jax.jit(functools.partial(_advance, model, temperature, top_k), donate_argnums=2)
    return _draw(advance, params, prompt, length, jax.random.key(seed))


def _draw(advance, params, prompt, length, key):
    state = None
    inputs = np.asarray(prompt, np.int32)[None]
    for i in range(length):
        token, state = advance(params, inputs, state, jax.random.fold_in(key, i))
        yield int(token)
        inputs = token.reshape(1, 1)


def _advance(model, temperature, top_k, params, inputs, state, key):
    last = jnp.full((1, 1), inputs.shape[1] - 1)
    logits, state = model.apply({"params": params}, inputs, state, select=last, differentiate=False)
    logits = logits[0, 0].at[: text_tokens.OFFSET].set(-jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits), state
    if 0 < top_k < logits.shape[0]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature), state


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
    flags.DEFINE_string("prompt", "", "text to continue; empty begins a document")
    flags.DEFINE_integer("length", 500, "tokens to generate", lower_bound=0)
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token", lower_bound=0)
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: all", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the draw")


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
    prompt = [text_tokens.BOS, *tokeniser.encode(given.prompt)]
    with config.user_errors("generate"):
        continuation = sample(
            model,
            params,
            prompt,
            given.length,
            temperature=given.temperature,
            top_k=given.top_k,
            seed=given.seed,
        )
    print(given.prompt, end="", flush=True)
    for piece in stream_text(continuation, tokeniser):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(config.parse_flags, config=False))
