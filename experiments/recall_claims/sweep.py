"""Four claims about recall, each a memory beside its rival at a state of the same size.

    python -m memjax.sweep --sweep=experiments/recall_claims/sweep.py --jobs=2

slots     Lattice's slots of unit norm against DeltaNet's matrix, 16 pairs
window    OmegaNet that learns from the last c pairs at each token against c = 1, 16 pairs
features  products of key channels against the channels alone, on compositional MQAR
solve     Gated KalmaNet, which solves for the memory, against Gated DeltaNet, 16 pairs, with decays
          that are drawn and with the same half-life before training
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

SEEDS = (0, 1, 2)
STEPS = {"slots": 2000, "window": 600, "features": 1500, "solve": 600}
TAYLOR = {"feature_map": "taylor", "normalise": True, "key_dim": 8, "norm": "none"}
# Question -> name of the model -> mixer and its options.
MODELS = {
    "slots": {
        f"{mixer}, {n} x 64": (mixer, {"key_dim": n} | more)
        for n in (8, 16, 32)
        for mixer, more in (("delta_net", {}), ("lattice", {"frozen_chunk": 1}))
    },
    "window": {
        f"omega_net, c = {c}": ("omega_net", {"key_dim": 16, "context": c}) for c in (1, 2, 4, 8)
    },
    # 8 channels and their 36 products: 44 numbers (45 with Taylor's constant)
    "features": {
        "linear_attention, 8 channels": ("linear_attention", {"key_dim": 8}),
        "linear_attention, 44 channels": ("linear_attention", {"key_dim": 44}),
        "linear_attention, Taylor of 8": ("linear_attention", TAYLOR),
        "delta_net, 44 channels": ("delta_net", {"key_dim": 44}),
        "omega_net, 8 channels": ("omega_net", {"key_dim": 8, "degree": 1}),
        "omega_net, 44 channels": ("omega_net", {"key_dim": 44, "degree": 1}),
        "omega_net, products of 8": ("omega_net", {"key_dim": 8, "degree": 2}),
    },
    "solve": {
        f"{mixer}, {n} x 64{name}": (mixer, {"key_dim": n} | first)
        for n in (8, 16)
        for name, first in {"": {}, ", half-life 256": {"half_life": 256.0}}.items()
        for mixer in ("gated_delta_net", "gated_kalmanet")
    },
}


def trials():
    return [
        trial(question, model, seed)
        for seed in SEEDS
        for question, models in MODELS.items()
        for model in models
    ]


def trial(question, model, seed):
    mixer, options = MODELS[question][model]
    config = f"configs/recall.py:{mixer},seed={seed},steps={STEPS[question]}"
    if question == "features":
        config += ",task=compositional_mqar,convolution=4"
        changes = {}
    else:
        config += ",task=mqar"
        changes = {"data.pairs": 16}
    changes |= {f"model.mixers.{mixer}.{name}": value for name, value in options.items()}
    return Trial({"question": question, "model": model, "seed": seed}, config, changes)


def tables(rows):
    head = ["model", "accuracy, mean of seeds (sd)", "seeds in order", "state bytes", "seconds"]
    return {
        question: (
            head,
            [line(results.select(rows, question=question, model=m), m) for m in models],
        )
        for question, models in MODELS.items()
    }


def line(group, model):
    if not group:
        return [model, "-", "-", "-", "-"]
    each = ", ".join(f"{row['query_accuracy']:.3f}" for row in group)
    seconds = ", ".join(f"{row['seconds']:.0f}" for row in group)
    spread = results.spread(group, "query_accuracy")
    return [model, spread, each, group[0]["state_bytes"], seconds]


def draw(rows):
    """A panel for each question: a point a seed."""
    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    for axes, question in zip(figure.subplots(2, 2).flat, MODELS, strict=True):
        groups = results.grouped(results.select(rows, question=question), "model")
        results.draw_points(axes, groups, "query_accuracy")
        axes.set(title=question, xlim=(-0.02, 1.02))
    figure.supxlabel("query accuracy at the last step, a point a seed", fontsize=10)
    return figure
