"""A hybrid byte model (sliding-window attention beside Gated DeltaNet) on the standard library.

    make quickstart
    python -m memjax.train --config=configs/quickstart.py --workdir=runs/quickstart

About 8 minutes of training on 2 CPU cores; README.md has the figures it ends with. The text is
the Python standard library's own sources, which every machine has; they differ a little between
versions of Python, and the figures with them.
"""

from memjax import defaults

NEXT = """\
  python -m memjax.generate --workdir={workdir} --prompt='def ' --length=400
  python -m memjax.train --config=configs/quickstart.py --workdir=runs/longer --config.steps=10000
  python -m memjax.train --config='configs/text.py:delta_net,glob=~/books/**/*.txt' \\
      --workdir=runs/books
  python -m memjax.train --config=configs/mqar.py:delta_net --workdir=runs/mqar"""


def get_config():
    # Three layers as one pattern: on CPU a loop in Python runs faster than a scan over layers.
    layer = "hybrid(sliding_window, gated_delta_net)"
    config = defaults.config(
        data={
            "name": "text",
            "glob": "",
            "length": 256,
            "holdout": 0.05,
            "shuffle": 1024,
            "workers": 0,
        },
        layers=(((layer, layer, layer), 1),),
        mixers={"sliding_window": {"window": 64}},
        dim=160,
    )
    config.steps, config.batch = 2400, 4
    config.optim.update(lr=3e-3, final=0.05)
    config.eval.update(every=400, batches=16)
    config.checkpoint.every = 200
    config.next_steps = NEXT
    return config
