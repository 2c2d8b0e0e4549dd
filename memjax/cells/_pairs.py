"""The last pairs of a document, and those that a window of its tokens learns from."""

from typing import NamedTuple

import jax.numpy as jnp

from memjax.recurrence import Phases, dot
from memjax.typing import Array, Bool, Float, Int


class Pairs(NamedTuple):
    """The last c - 1 pairs of the document, newest last, zero where it has fewer; `number` of them
    are there."""

    k: Float[Array, "n K"]
    v: Float[Array, "n V"]
    number: Int[Array, ""]


class Window(NamedTuple):
    """The tokens of a window, [C], behind the n = c - 1 pairs that its first ones learn from.

    k, v: of all pairs, [n + C, ...]. document: 0 for the one that runs on, then counted. rank:
    written tokens in front of each. there: whether a pair is one to learn from, [n + C].
    """

    k: Float[Array, "P K"]
    v: Float[Array, "P V"]
    document: Int[Array, " C"]
    rank: Int[Array, " C"]
    there: Bool[Array, " P"]

    @classmethod
    def of(
        cls, past: Pairs, k: Float[Array, "C K"], v: Float[Array, "C V"], phases: Phases
    ) -> "Window":
        """`past`: the pairs in front."""
        k, v = jnp.concatenate([past.k, k]), jnp.concatenate([past.v, v])
        front = jnp.arange(-len(past.k), 0) >= -past.number
        there = jnp.concatenate([front, phases.written])
        return cls(k, v, phases.document, phases.rank, there)

    @property
    def front(self) -> int:
        """n, the pairs in front of the window."""
        return len(self.k) - len(self.rank)

    @property
    def live(self) -> Bool[Array, " C"]:
        """Whether a token is of the document that runs on."""
        return self.document == 0

    def document_of_pairs(self) -> Int[Array, " P"]:
        """Of each pair."""
        return jnp.concatenate([jnp.zeros(self.front, self.document.dtype), self.document])

    def age(self, rank: Int[Array, " m"], document: Int[Array, " m"]) -> Int[Array, "m P"]:
        """How many tokens behind each pair of its document a token of this rank is; -1: none."""
        ranks = jnp.concatenate([jnp.arange(-self.front, 0), self.rank])
        seen = self.there & (document[:, None] == self.document_of_pairs())
        return jnp.where(seen, jnp.maximum(rank[:, None] - ranks, -1), -1)

    def rates(self, r: Float[Array, "C c"], use: Bool[Array, " C"]) -> Float[Array, "C *P"]:
        """R of the module's docstring, zero for tokens that do not learn; its diagonal if c = 1."""
        context = r.shape[1]
        if context == 1:
            return jnp.where(use, r[:, 0], 0)
        age = self.age(self.rank, self.document)
        chosen = jnp.take_along_axis(r, jnp.clip(age, 0, context - 1), axis=1)
        return jnp.where((age >= 0) & (age < context) & use[:, None], chosen, 0)

    def kept(self, past: Pairs) -> Pairs:
        """The pairs behind the window."""
        last, written = self.document[-1:], self.there[self.front :]
        number = jnp.sum(written & (self.document == last), dtype=jnp.int32)
        number = number + jnp.where(last[0] == 0, past.number, 0)
        age = self.age(self.rank[-1:] + written[-1:], last)[0]  # of the token that comes next
        pick = (age == jnp.arange(self.front, 0, -1)[:, None]).astype(self.k.dtype)
        k, v = (dot("sp,pn->sn", pick, pair) for pair in (self.k, self.v))
        return Pairs(k, v, jnp.minimum(number, self.front))
