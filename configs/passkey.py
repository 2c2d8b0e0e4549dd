"""Find a number of 7 digits in a long text and repeat it, small enough for a CPU.

    python -m memjax.train --config=configs/passkey.py:gated_delta_net --workdir=runs/passkey
    python -m memjax.evaluate --workdir=runs/passkey --length=8192 --rows=40

The first argument is a mixer as in configs/text.py, with windows of 64 tokens; `layers`, `dim`,
`length`, `steps` and `seed` may follow. `query_accuracy` is the share of digits, by chance 0.1,
`sequence_accuracy` that of whole numbers. A step of 8 x 512 bytes scores every byte of the text, of
which the digits of the answer are 7; the evaluation scores them alone. experiments/length.py trains
it and evaluates it on longer texts.
"""

from memjax import defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        mixer="hybrid(sliding_window, gated_delta_net)",
        layers=2,
        dim=128,
        length=512,
        steps=1500,
        seed=0,
    )
    config = defaults.config(
        data={
            "name": "passkey",
            "length": arg.length,
            "template": "short",  # or "ruler"
            "distractors": 0,  # further needles with other keys
            "every_byte": True,  # scored in training, or the digits alone
            "eval_examples": 400,
        },
        # One pattern: on CPU a loop in Python runs faster than a scan over layers.
        layers=(((arg.mixer,) * arg.layers, 1),),
        mixers={"sliding_window": {"window": 64}},
        dim=arg.dim,
    )
    config.batch = 8
    config.optim.lr = 3e-3
    config.seed, config.steps = arg.seed, arg.steps
    config.eval.every = config.checkpoint.every = 250
    return config
