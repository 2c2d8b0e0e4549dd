"""A model trains with the kernels as it does with the chunked form."""

import itertools

import numpy as np
import pytest
import tiny_runs as runs

from memjax import train_step
from pallas_kernels import interpreted

STEPS = 50


def losses(form: str) -> np.ndarray:
    """The losses of a tiny Gated DeltaNet on recall, one number for each step."""
    settings = runs.load(
        f"{runs.MQAR}:gated_delta_net",
        {
            **runs.TASK,
            "steps": STEPS,
            "data.length": 24,
            "model.dim": 64,
            "model.mixers.gated_delta_net.implementation": form,
        },
    )
    run = train_step.build(settings)
    state, found = run.init(), []
    for batch in itertools.islice(iter(run.data.train), STEPS):
        state, values = run.step(state, run.put(batch))
        found.append(float(values["loss"]))
    return np.array(found)


@pytest.mark.slow
def test_a_model_trains_as_with_the_chunked_form():
    wanted = losses("chunked")
    with interpreted():
        found = losses("pallas")
    assert wanted[-1] < wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
