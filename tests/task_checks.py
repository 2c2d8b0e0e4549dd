"""What tests of several tasks use."""

import numpy as np
import pytest

from memjax import tasks


def refuses(name, settings, message):
    """Whether the task refuses these settings, in one line that matches."""
    with pytest.raises(ValueError, match=message) as caught:
        tasks.make(name, **settings)
    assert "\n" not in str(caught.value)


def chi_square(counts, law=None):
    """Of counts against the shares of a law, all equal when left out."""
    counts = np.ravel(counts)
    expected = counts.sum() * (1 / counts.size if law is None else np.ravel(law))
    return ((counts - expected) ** 2 / expected).sum()


def close_to(count, trials, p):
    """Whether a binomial count is within 4.5 standard errors (7e-6 by chance; seeds are fixed)."""
    return abs(count - trials * p) <= 4.5 * np.sqrt(trials * p * (1 - p))
