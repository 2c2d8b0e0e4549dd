"""Find a number of 7 digits in a long text and repeat it, small enough for a CPU.

    python -m memjax.train --config=configs/passkey.py:gated_delta_net --workdir=runs/passkey-180
    python -m memjax.train --config=configs/passkey.py:gated_delta_net,length=512,steps=600 \\
        --config.init_from=runs/passkey-180 --config.batch=16 --config.optim.lr=5e-3 \\
        --workdir=runs/passkey
    python -m memjax.evaluate --workdir=runs/passkey --length=8192 --rows=40

[BaseConv, mixer], width 64, one head; windows see 64 tokens. It learns on texts of 180 bytes, then
on 512, about two minutes each on one CPU core; from the start on 512 it stays at chance for as
long. The argument is a mixer as in configs/text.py. `query_accuracy` is the share of digits that
are right, by chance 0.1, `sequence_accuracy` that of whole numbers. experiments/length has the
results of several models on longer texts.
"""

from memjax import defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, mixer="gated_delta_net", length=180, seed=0, steps=800, lr=1e-2)
    config = defaults.tiny_recall(
        {
            "name": "passkey",
            "length": arg.length,
            "template": "short",  # or "ruler"
            "distractors": 0,  # further needles with other keys
            "every_byte": False,  # scored in training, or the digits alone
            "eval_examples": 400,
        },
        *arg.mixer.split("+"),
        vocab=259,
    )
    if "sliding_window" in config.model.mixers:
        config.model.mixers.sliding_window.window = 64
    config.eval.sample = 0
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
