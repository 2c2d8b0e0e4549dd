"""Random draws that stay the same for good: each one is a function of (seed, stream, index, field).

The words come from numpy's counter-based Philox bit generator. numpy promises the words of a bit
generator across releases, but not the results of `Generator` methods, so that every draw below is
built from raw words. Key: (seed, hash of the stream's name). Counter: (0, 0, index, field), with
one field per named draw of a task (keys, values, ...), so that a new draw never shifts the others.

A uniform number is u = (word >> 11) * 2**-53, in [0, 1); where a logarithm follows it is
(word >> 11 + 1/2) * 2**-53, which is never 0.
"""

import functools
import hashlib

import numpy as np


@functools.cache
def _stream_hash(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


def bits(seed: int, stream: str, index: int, field: int) -> np.random.Philox:
    """The source of words for one draw.

    Args:
      seed: 0 to 2**64 - 1.
      stream: any text, such as "mqar/train"; other texts give independent words.
      index: number of the example, 0 to 2**64 - 1.
      field: number of the named draw within the example, 0 to 2**64 - 1.
    """
    key = np.array([seed, _stream_hash(stream)], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, index, field], np.uint64))


def uniforms(source: np.random.Philox, size: int | tuple[int, ...]) -> np.ndarray:
    """Independent numbers, uniform over [0, 1). float64[size]."""
    return (source.random_raw(size) >> np.uint64(11)) * 2.0**-53


def uniform_ints(source: np.random.Philox, n: int, size: int | tuple[int, ...]) -> np.ndarray:
    """Independent integers, uniform over 0..n-1: floor(n * u). int64[size], n < 2**53."""
    return (n * uniforms(source, size)).astype(np.int64)


def exponentials(source: np.random.Philox, size: int | tuple[int, ...]) -> np.ndarray:
    """Independent numbers of mean 1: -log u. float64[size], at least 0.

    Divided by their sum they have the law Dirichlet(1, .., 1).
    """
    return -np.log(((source.random_raw(size) >> np.uint64(11)) + 0.5) * 2.0**-53)


def normals(source: np.random.Philox, size: tuple[int, ...]) -> np.ndarray:
    """Independent standard normal numbers by Box and Muller. float64[size]."""
    radius = np.sqrt(2 * exponentials(source, size))
    return radius * np.cos(2 * np.pi * uniforms(source, size))


def permutations(source: np.random.Philox, size: int | tuple[int, ...]) -> np.ndarray:
    """Independent permutations of 0..n-1, n the last of `size`, all equally likely. int64[size]."""
    return np.argsort(uniforms(source, size), axis=-1, kind="stable")


def categorical(source: np.random.Philox, probabilities: np.ndarray) -> np.ndarray:
    """One draw from each row of probabilities [N, K], which sum to 1. int64[N], below K."""
    bounds = np.cumsum(probabilities[:, :-1], axis=1)
    return (uniforms(source, len(bounds))[:, None] >= bounds).sum(axis=1)


def half_dirichlet(source: np.random.Philox, size: tuple[int, int]) -> np.ndarray:
    """Independent draws of Dirichlet(1/2, .., 1/2), Jeffreys' prior of K symbols. float64[N, K].

    Two symbols are Beta(1/2, 1/2), the law of sin**2(pi u / 2); more are squares of normals,
    normalised. size: (N, K).
    """
    if size[1] == 2:
        second = np.sin(np.pi / 2 * uniforms(source, size[0])) ** 2
        return np.stack([1 - second, second], axis=1)
    squares = normals(source, size) ** 2
    return squares / squares.sum(axis=1, keepdims=True)


def subset(source: np.random.Philox, n: int, k: int) -> np.ndarray:
    """An ordered k-subset of 0..n-1, all of them equally likely. int64[k].

    Integers below n are drawn one after another and their first occurrences kept. ValueError when
    k > n, which could never end.
    """
    if k > n:
        raise ValueError(f"cannot take {k} different items out of {n}")
    drawn = np.empty(0, np.int64)
    while True:
        drawn = np.concatenate([drawn, uniform_ints(source, n, k + k // 8 + 4)])
        first = np.sort(np.unique(drawn, return_index=True)[1])
        if len(first) >= k:
            return drawn[first[:k]]


def tuples(source: np.random.Philox, n: int, size: tuple[int, int]) -> np.ndarray:
    """Independent ordered k-subsets of 0..n-1, all equally likely, for small k. int64[N, k].

    The j-th member is drawn among the n - j integers that are left. size: (N, k); ValueError when
    k > n.
    """
    k = size[1]
    if k > n:
        raise ValueError(f"cannot take {k} different items out of {n}")
    members = (np.arange(n, n - k, -1) * uniforms(source, size)).astype(np.int64)
    for j in range(1, k):
        for taken in np.sort(members[:, :j], axis=1).T:  # ascending: each shifts what is above it
            members[:, j] += members[:, j] >= taken
    return members


def weighted_subset(source: np.random.Philox, log_weights: np.ndarray, k: int) -> np.ndarray:
    """k items drawn one after another without replacement by weight. int64[k], in drawn order.

    The Gumbel top-k trick: the k largest of log weight - log(-log u), largest first, have the law
    of successive draws, order included.

    Args:
      log_weights: float64[n], the logarithms of weights that need not sum to 1.
      k: 0 to n; ValueError above.
    """
    if k > len(log_weights):
        raise ValueError(f"cannot take {k} different items out of {len(log_weights)}")
    with np.errstate(divide="ignore"):  # the largest word rounds to u = 1, which comes first
        scores = log_weights - np.log(exponentials(source, len(log_weights)))
    return np.argsort(-scores, kind="stable")[:k]
