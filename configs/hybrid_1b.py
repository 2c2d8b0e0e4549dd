"""Gated DeltaNet-H1 with 1.3 billion parameters on text: Gated DeltaNet and a window, in turn.

    python -m memjax.aot --config=configs/hybrid_1b.py:8k --topology=v5e:4x4
    python -m memjax.train --config='configs/hybrid_1b.py:8k,glob=~/corpus/**/*.jsonl' \\
        --workdir=runs/hybrid_1b

Yang et al. 2024, arXiv 2412.06464, with the sizes of the authors' released configuration: 18
layers of width 2304, the first, third, .. Gated DeltaNet with 9 heads of 192 x 384, the others
windows of 2048 tokens with 18 heads; SwiGLU of 6144 channels; 32,000 tokens. Its recipe: AdamW
with a peak rate of 4e-4 after 1B tokens, 100B tokens in all, half a million in a step. One
embedding for both ends is our choice, with which the model has 1.317 billion parameters, and so is
a byte-pair encoding of the text at hand; rows are 8k or 128k tokens (theirs are 4k). Activations of
two layers at a time are computed again in the backward pass.

At 128k a step has 16 rows, one for each of 16 chips, 2 million tokens; `accumulate` handles the 64
rows of 8k one for each chip at a time. The text has to have enough to merge for 32,000 tokens.
Nothing was trained with it: experiments/ahead says which slices it fits.
"""

from memjax import defaults
from memjax.config import parse_arg

CONTEXTS = {"8k": (2**13, 64, 4), "128k": (2**17, 16, 1)}  # length, rows, accumulate
TOKENS = 100e9


def get_config(arg=None):
    given = {name: defaults.TEXT[name] for name in ("glob", "dataset", "field", "seed")}
    arg = parse_arg(arg, context=("8k", tuple(CONTEXTS)), **given)
    length, rows, pieces = CONTEXTS[arg.context]
    arg.update(bpe=32_000, dim=2304, length=length, steps=round(TOKENS / (rows * length)))
    config = defaults.language_model(
        arg,
        layers=((("gated_delta_net", "sliding_window"), 9),),
        mixers={
            "gated_delta_net": {"heads": 9, "key_dim": 192, "value_dim": 384},
            "sliding_window": {"heads": 18, "window": 2048},
        },
        dtype="bfloat16",
        remat="full",
    )
    config.batch, config.accumulate = rows, pieces
    config.optim.update(lr=4e-4, warmup=config.steps // 100)
    return config
