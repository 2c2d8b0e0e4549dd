"""The schedule's values, what decays, and the message for every impossible setting."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import optim
from memjax.errors import UserError

GOOD = dict(lr=1e-2, warmup=4, final=0.1, weight_decay=0.1, clip=1.0, b1=0.9, b2=0.95)


def test_schedule():
    _, schedule = optim.make(GOOD, 12)
    got = np.array([schedule(n) for n in range(13)])
    np.testing.assert_allclose(got[:4], [0.0025, 0.005, 0.0075, 0.01], rtol=1e-6)
    along = np.arange(1, 9) / 8
    cosine = 0.001 + 0.009 * 0.5 * (1 + np.cos(np.pi * along))
    np.testing.assert_allclose(got[4:12], cosine, rtol=1e-5)
    np.testing.assert_allclose(got[11:], 0.001, rtol=1e-5)  # and it stays there
    flat = optim.make({**GOOD, "warmup": 0, "final": 1.0}, 3)[1]
    np.testing.assert_allclose([flat(n) for n in range(3)], 0.01, rtol=1e-6)
    only = optim.make({**GOOD, "warmup": 4}, 4)[1]
    np.testing.assert_allclose(only(3), 0.01, rtol=1e-6)


def params():
    return {
        "stack": {
            "q": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))},
            "A_log": jnp.ones((2, 4)),
            "norm": {"scale": jnp.ones((2, 3))},
        },
        "embed": {"embedding": jnp.ones((5, 3))},
    }


def test_mask():
    assert optim.decay_mask(params()) == {
        "stack": {"q": {"kernel": True, "bias": False}, "A_log": False, "norm": {"scale": False}},
        "embed": {"embedding": True},
    }


def test_step():
    """With zero gradients only what decays moves, by lr * weight_decay; clipping comes first."""
    transform, schedule = optim.make(GOOD, 12)
    zeros = jax.tree.map(jnp.zeros_like, params())
    updates, _ = transform.update(zeros, transform.init(params()), params())
    moved = jax.tree.map(lambda u: float(jnp.abs(u).sum() / u.size), updates)
    assert moved["stack"]["q"]["kernel"] == pytest.approx(0.0025 * 0.1)
    assert moved["embed"]["embedding"] == pytest.approx(0.0025 * 0.1)
    assert moved["stack"]["A_log"] == moved["stack"]["norm"]["scale"] == 0
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=optim.decay_mask(params())),
    )
    big = jax.tree.map(lambda p: 100 * p, params())
    ours, _ = transform.update(big, transform.init(params()), params())
    theirs, _ = reference.update(big, reference.init(params()), params())
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for none in (0, None):
        assert optim.make({**GOOD, "clip": none}, 12)[0].update(
            zeros, optim.make({**GOOD, "clip": none}, 12)[0].init(params()), params()
        )


@pytest.mark.parametrize(
    "change, steps, text",
    [
        (dict(lr=-1), 9, "config.optim.lr=-1: must be above 0."),
        (dict(lr=float("nan")), 9, "config.optim.lr=nan: must be above 0."),
        (dict(warmup=10), 9, "config.optim.warmup=10: must be 0 to config.steps (9)."),
        (dict(final=2), 9, "config.optim.final=2: must be 0 to 1 (a fraction of lr)."),
        (dict(weight_decay=-1), 9, "config.optim.weight_decay=-1: must be 0 or more."),
        (dict(clip=-1), 9, "config.optim.clip=-1: must be above 0, or 0 for no clipping."),
        (dict(b1=1), 9, "config.optim.b1=1: must be at least 0 and below 1."),
        (dict(b2=-0.1), 9, "config.optim.b2=-0.1: must be at least 0 and below 1."),
        ({}, 0, "config.steps=0: must be at least 1."),
        (
            dict(wramup=1),
            9,
            (
                "config.optim.wramup: no such field; fields: lr, warmup, final, "
                "weight_decay, clip, b1, b2. Did you mean 'warmup'?"
            ),
        ),
    ],
)
def test_impossible_settings(change, steps, text):
    with pytest.raises(UserError) as err:
        optim.make({**GOOD, **change}, steps)
    assert str(err.value) == text


def test_missing_field():
    with pytest.raises(UserError, match="config.optim lacks lr, warmup; fields: lr, "):
        optim.make({k: v for k, v in GOOD.items() if k not in ("lr", "warmup")}, 9)
