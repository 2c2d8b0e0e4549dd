"""What holds for both wrappers: shared heads, every layer inside of them, nesting."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance
from wrapped import DELTA, FORMS, LINEAR, B, D, T, answers, given_for

from memjax import cells, train_step
from memjax.nn.lm import LanguageModel, ModelConfig
from memjax.wrappers.memory_caching import MemoryCaching
from memjax.wrappers.mixture_of_memories import MixtureOfMemories


@pytest.mark.parametrize(
    "cell",
    [
        MemoryCaching(LINEAR, segment=4, start="independent"),
        MemoryCaching(LINEAR, segment=4),
        MixtureOfMemories(LINEAR, 2),
    ],
)
def test_heads_may_be_counted_by_the_wrappers_own_leaf(cell):
    """Keys and values of one head, gates of two; and a write mask of two heads of four."""
    for heads, masked in ((2, False), (4, True)):
        given = given_for(cell, heads=heads)
        few = [a[:, :, :1] for a in given.xs[:-1]]
        write = np.random.default_rng(0).random((contract.BATCH, T, 2)) < 0.7 if masked else None
        given = given._replace(xs=[*few, given.xs[-1]], write=write)
        expected = answers(cell, "scan", given)
        assert expected.shape[2] == heads
        assert distance(answers(cell, "chunked", given), expected) < 1e-6


NAMES = [
    n if n in ("rwkv4", "mamba2", "titans") else pytest.param(n, marks=pytest.mark.slow)
    for n in cells.names()
]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_can_be_wrapped(name):
    """Shapes alone: parameters, and a token after others."""
    wrappers = ("memory_caching", "mixture_of_memories")
    texts = [f"{wrapper}({name})" for wrapper in wrappers if wrapper not in name]
    if name not in wrappers:
        texts += [f"memory_caching({texts[1]})", f"mixture_of_memories({texts[0]})"]
    for text in texts:
        model = LanguageModel(ModelConfig(11, D, (((text,), 1),), mlp=0.0))
        params = train_step.abstract_params(model)

        def run(params, tokens, model=model):
            _, state = model.apply({"params": params}, tokens)
            return model.apply({"params": params}, tokens[:, :1], state)

        logits, _ = jax.eval_shape(run, params, jax.ShapeDtypeStruct((B, 5), jnp.int32))
        assert logits.shape == (B, 1, 11)


def test_wrappers_wrap_each_other():
    cell = MemoryCaching(MixtureOfMemories(DELTA, 3), segment=4)
    given = given_for(cell, state=True, masks=True, heads=2)
    scan, chunked = (contract.values(cell, form, given) for form in FORMS)
    for name, leaf in contract.named(scan).items():
        assert distance(contract.named(chunked)[name], leaf) < 1e-5, name
