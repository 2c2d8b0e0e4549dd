"""A model trains with the kernels as it does with the chunked form."""

import itertools

import numpy as np
import pytest
import tiny_runs as runs

from memjax import train_step
from pallas_kernels import interpreted

STEPS = 50
# Of what takes long in the interpreter, and of a network, whose training makes rounding grow: after
# 38 steps its plain forms are 2.7e-4 from each other.
FEWER = {"lattice": 10, "titans with a network": 30}
MIXERS = {
    "gated_delta_net": {},
    "gated_kalmanet": {"heads": 1, "iterations": 4},
    "lattice": {"heads": 1},
    "rg_lru": {},
    "rwkv4": {},
    "rwkv7": {"heads": 1},
    "titans": {"heads": 1, "depth": 1},
    "titans with a network": {"heads": 1, "depth": 2, "expansion": 2},
    "sliding_window": {"head_dim": 64, "heads": 2, "kv_heads": 1, "window": 9},
}


def losses(case: str, form: str) -> np.ndarray:
    """The losses of a tiny model on recall, one number for each step."""
    options, steps = MIXERS[case] | {"implementation": form}, FEWER.get(case, STEPS)
    mixer = case.split()[0]
    settings = runs.load(
        f"{runs.MQAR}:{mixer}",
        {
            **runs.TASK,
            "steps": steps,
            "data.length": 24,
            "model.dim": 64,
            **{f"model.mixers.{mixer}.{name}": value for name, value in options.items()},
        },
    )
    run = train_step.build(settings)
    state, found = run.init(), []
    for batch in itertools.islice(iter(run.data.train), steps):
        state, values = run.step(state, run.put(batch))
        found.append(float(values["loss"]))
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXERS)
def test_a_model_trains_as_with_the_chunked_form(case):
    wanted = losses(case, "chunked")
    with interpreted():
        found = losses(case, "pallas")
    assert wanted[-1] < wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
