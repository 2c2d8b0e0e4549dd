"""Closed forms of what untrained memories recall, for random pairs.

N pairs are written, keys and values independent and uniform on the unit spheres of R^d and R^V, and
asked for by their own keys, the read-out not scaled. An error is E ||answer - value||^2; the age a
of a pair counts the writes behind it, 0 for the last. Signals and crosstalk add in squares because
values are independent of mean 0; E (k . k')^2 = 1 / d and E (k . k')^4 = 3 / (d (d + 2)).

Where no source is named the line is derived here, in the docstring. All functions take and return
numbers or numpy arrays.
"""

import numpy as np

Number = float | np.ndarray


def hebbian_error(pairs: Number, dim: int) -> Number:
    """(N - 1) / d: each of the other pairs adds (k . k') v'. Of a sum of outer products.

    The inverse of the signal-to-noise ratio of Zhong et al. 2025, arXiv 2505.19488. With S
    independent memories, each holding N / S of the pairs: `hebbian_error(N / S, d)`.
    """
    return (pairs - 1) / dim


def hebbian_cosine(pairs: Number, dim: int) -> Number:
    """(1 + N / d)^-1/2, of answer and value, where both d and V are large: a signal of length 1 at
    a right angle to crosstalk of squared length N / d."""
    return (1 + pairs / dim) ** -0.5


def hebbian_half(key_dim: int, value_dim: int, candidates: int) -> float:
    """d V / (2 ln candidates): of so many pairs half are named right among the candidates.

    Crosstalk is normal with variance N / (d V) along each candidate, and the largest of n such
    numbers lies near their deviation times sqrt(2 ln n); it reaches the signal, 1, at this N.
    """
    return key_dim * value_dim / (2 * np.log(candidates))


def decay_error(keep: float, pairs: Number, age: Number, dim: int) -> Number:
    """(1 - c^a)^2 + [(1 - c^2N) / (1 - c^2) - c^2a] / d with c = keep < 1, the factor of the state
    at each write: the pair has faded to c^a, and the others at age b to c^2b in power."""
    power = (1 - keep ** (2 * pairs)) / (1 - keep**2)
    return (1 - keep**age) ** 2 + (power - keep ** (2 * age)) / dim


def delta_error(beta: float, pairs: Number, age: Number, dim: int) -> Number:
    """Of the delta rule S += beta k (v - S^T k)^T, one pass, 0 < beta <= 1, the pair at age a:

        1 - 2 b (1 - b/d)^a + b/(2-b) (1 - m^(N-1)) + b^2 m^(N-a-1) ((1 - 1/d) p^a + m^a / d)
        m = 1 - b (2 - b) / d,   p = 1 - 2 b / d + 2 b^2 / (d (d + 2))

    Let M be the product of the I - b k' k'^T behind the pair. Its own part of the answer is
    b k^T M k v: E k^T M k = (1 - b/d)^a, and E M A M^T for A = I and k k^T are linear in both, with
    the eigenvalues m and p. Pairs written later add b^2 m^c / d at their age c. (Misadjustment of
    the least-mean-squares filter has the same form.)
    """
    shrink = 1 - beta * (2 - beta) / dim
    along = 1 - 2 * beta / dim + 2 * beta**2 / (dim * (dim + 2))
    own = beta**2 * shrink ** (pairs - age - 1)
    own = own * ((1 - 1 / dim) * along**age + shrink**age / dim)
    others = beta / (2 - beta) * (1 - shrink ** (pairs - 1))
    return 1 - 2 * delta_signal(beta, age, dim) + others + own


def delta_signal(beta: float, age: Number, dim: int) -> Number:
    """beta (1 - beta / d)^a, the mean of v . answer: each later write takes the share
    beta (k . k')^2 of it."""
    return beta * (1 - beta / dim) ** age


def delta_square(beta: float, pairs: Number, dim: int) -> Number:
    """E ||S||_F^2 = d b / (2 - b) (1 - m^N), m as in `delta_error`: a write keeps the share m of
    the squares and adds b^2."""
    return dim * beta / (2 - beta) * (1 - (1 - beta * (2 - beta) / dim) ** pairs)


def rescaled_error(error: Number, signal: Number, gain: float) -> Number:
    """E ||answer / gain - value||^2, of the error and the signal v . answer of the answer itself:
    ||answer||^2 is error - 1 + 2 signal."""
    return 1 - 2 * signal / gain + (error - 1 + 2 * signal) / gain**2


def delta_half(key_dim: int, value_dim: int, candidates: int) -> float:
    """(d / 2) ln(1 + V / (2 ln candidates)): with beta = 1 only so many of the last pairs are named
    right more often than not. At age a the signal is e^(-a/d), and the crosstalk of a memory that
    is at its limit has squared length 1 - e^(-2a/d), spread over V directions."""
    return key_dim / 2 * np.log1p(value_dim / (2 * np.log(candidates)))


def ridge_error(pairs: Number, dim: int) -> Number:
    """max(0, 1 - d / N), of least squares over all pairs: N values lie in d dimensions."""
    return np.maximum(0.0, 1 - dim / pairs)


def square_error(pairs: Number, dim: int) -> Number:
    """3 (N - 1) / (d (d + 2)), of a sum of pairs under the kernel (k . k')^2."""
    return 3 * (pairs - 1) / (dim * (dim + 2))


def overwritten_hebbian_error(keys: Number, dim: int) -> Number:
    """1 + 2 (N - 1) / d: N keys bound, then bound again in the same order to new values, which are
    asked for. A sum still answers the old value in full."""
    return 1 + 2 * hebbian_error(keys, dim)


def overwritten_decay_error(keep: float, keys: Number, age: Number, dim: int) -> Number:
    """The same with a decay per write: the old value has faded to c^(a+N)."""
    old = keep ** (2 * (age + keys))
    power = (1 - keep ** (4 * keys)) / (1 - keep**2)
    crosstalk = (power - keep ** (2 * age) - old) / dim
    return (1 - keep**age) ** 2 + old + crosstalk


OVERWRITTEN_RIDGE_ERROR = 0.5  # N <= d: least squares answers the mean of both values
