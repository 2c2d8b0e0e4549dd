"""A language model of any mixer on text: your own files, a dataset, or Python's sources.

    python -m memjax.train --config='configs/text.py:gated_delta_net,glob=~/books/**/*.txt' \\
        --workdir=runs/books

    python -m memjax.train --config=configs/text.py:delta_net,dataset=lm1b,bpe=8192 \\
        --workdir=runs/lm1b

The first argument is a cell or a block as it reads, such as `hybrid(sliding_window, delta_net)`,
or several that take turns, such as `delta_net+sliding_window`, of which `layers` counts the turns;
`layers`, `dim`, `length`, `steps` and `seed` may follow. The text is that of `glob` (plain files,
and .jsonl or .parquet files whose `field` holds a document each), that of a `dataset` of
tensorflow-datasets, or without both the Python standard library's sources. Tokens are bytes, or
with `bpe=N` a byte-pair encoding of N tokens, trained on the training text. A dataset must have
been prepared in the array_record format (`tfds build NAME --file_format=array_record`); the first
1000 documents of its held-out split are used.
"""

from memjax import defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, mixer="hybrid(sliding_window, gated_delta_net)", **defaults.TEXT)
    return defaults.language_model(arg, layers=((tuple(arg.mixer.split("+")), arg.layers),))
