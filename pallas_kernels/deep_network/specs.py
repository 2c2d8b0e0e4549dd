"""The cases of deep_network."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.deep_memory import specs as matrix
from pallas_kernels.deep_memory.reference import State

LAYERS = ("weights", "momentum", "base")  # of a state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(matrix.Spec):
    """As of `deep_memory`, with the widths of the hidden layers. Steps are a further 8 / hidden
    width of what they are there: the gradient of a layer grows with the squares of what enters
    it."""

    hidden: tuple[int, ...] = (128,)

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Layer n of start, weights, momentum and base is named start_n and so on."""
        arrays = super().inputs(seed)
        rng = np.random.default_rng(seed + 10)
        arrays["rates"] = arrays["rates"] * np.float32(8 / max(self.hidden))

        def layers(name, scale, *front):
            pairs = itertools.pairwise((self.K, *self.hidden, self.V))
            shapes = [(*front, m, n) for m, n in pairs]
            made = (scale * axes[-2] ** -0.5 * rng.standard_normal(axes) for axes in shapes)
            return {f"{name}_{n}": a.astype(np.float32) for n, a in enumerate(made)}

        found = layers("start", 1.0, self.H)
        for name in LAYERS:
            if arrays.get(name) is not None:
                found |= layers(name, 0.1 if name == "momentum" else 1.0, self.B, self.H)
        return {k: a for k, a in arrays.items() if k not in (*LAYERS, "start")} | found


def flat(op, spec: Spec, **options):
    """An op, or its reference, of the arrays of `Spec.inputs`; its state a dict of the floating
    leaves."""
    counts, depth = spec.counts(), len(spec.hidden) + 1

    def run(q, k, v, *, reset, **given):
        def layers(name):
            found = [given.get(f"{name}_{n}") for n in range(depth)]
            return None if found[0] is None else tuple(found)

        state = None
        if spec.state:
            place, number = (
                jnp.asarray(a) if a is not None else None
                for a in (counts["place"], counts["number"])
            )
            weights, momentum, base = map(layers, LAYERS)
            past_k, past_v = given.get("past_k"), given.get("past_v")
            state = State(weights, momentum, base, place, past_k, past_v, number)
        scalars = {name: given[name] for name in ("g", "rates", "m") if name in given}
        o, state = op(
            *(q, k, v),
            **scalars,
            start=layers("start"),
            state=state,
            reset=reset,
            write=counts["write"],
            frozen_chunk=spec.frozen,
            loss=spec.loss,
            **options,
        )
        found = {"past_k": state.k, "past_v": state.v}
        for name in LAYERS:
            found |= {f"{name}_{n}": a for n, a in enumerate(getattr(state, name) or ())}
        return o, {name: a for name, a in found.items() if a is not None}

    return run


DOTS: dict[str, Any] = {"momentum": False, "context": 3, "loss": "dot"}
HARD: dict[str, Any] = {"keys": "cosine", "gate": 0.1, "rate": 2.0}
SPECS = (
    Spec(name="initial", T=32, H=1, state=False),
    Spec(name="blocks", B=2, T=20, H=8, frozen=2, resets=(5,), tags=("race",)),
    Spec(name="resets", T=29, B=2, resets=(0, 7, 16, 20, 28), writes=0.7, tags=("fast",)),
    Spec(name="long_frozen", T=150, H=1, frozen=140, gate=60.0, resets=(30,)),
    Spec(name="dla", T=30, H=1, V=128, **DOTS, frozen=5, hidden=(128, 128), resets=(4, 20)),
    Spec(name="bf16_atlas", T=40, context=4, writes=0.8, dtype="bfloat16", **HARD),
)
