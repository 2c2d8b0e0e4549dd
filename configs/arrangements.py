"""Stacks of different layers as papers arrange them, as language models on text.

    python -m memjax.train --config=configs/arrangements.py:sambay --workdir=runs/sambay

    python -m memjax.train --config='configs/arrangements.py:griffin,layers=6,glob=~/books/*.txt' \\
        --workdir=runs/griffin

    python -m memjax.train \\
        --config=configs/arrangements.py:sambay,layers=8,dim=64,length=128,steps=300 \\
        --config.batch=4 --config.optim.lr=3e-3 --config.model.std=0.125 --workdir=runs/small

The first argument is one of `based`, `samba`, `sambay`, `griffin`, `olmo_hybrid`, `titans_mag`,
`titans_mal`, `atlas_mag`, `atlas_mal`; the others are those of configs/text.py, with 12 layers.
Each function below says what its paper has and where this differs. Common to all: sizes are those
of a small model, heads are 4, every layer has a norm in front and a channel mixer.

The default sizes, 10 million parameters and 16 rows of 512 bytes a step, ask for an accelerator: on
two CPU cores a step takes a minute. The last command takes about four minutes there and ends with
2.66 held-out bits per byte on the standard library's sources.
"""

from memjax import defaults
from memjax.config import UserError, parse_arg


def repeat(pattern, depth):
    """`pattern` over and over for `depth` layers, as groups; the last time it may be cut."""
    whole, rest = divmod(depth, len(pattern))
    return ((pattern, whole),) * (whole > 0) + ((pattern[:rest], 1),) * (rest > 0)


def based(arg):
    """Arora et al. 2024, arXiv 2402.18668: of every five layers one of linear attention with
    Taylor's features, then one window of 64 tokens, the others gated short convolutions.

    Their code has windows of 256, convolutions four times as wide with an output projection, and
    in its model of 1.3B parameters twice a distance of six.
    """
    if arg.layers < 3:
        raise UserError(f"based: layers must be at least 3; given {arg.layers}")
    pattern = ("base_conv", "linear_attention", "sliding_window", "base_conv", "base_conv")
    layers = repeat(pattern, arg.layers)
    if arg.layers % 5 == 2:  # no linear attention without a window behind it
        layers = (*layers[:-1], (("base_conv", "base_conv"), 1))
    taylor = {"feature_map": "taylor", "normalise": True, "key_dim": 16, "norm": "none"}
    return layers, {"linear_attention": taylor, "sliding_window": {"window": 64}}, {}


def samba(arg):
    """Ren et al. 2024, arXiv 2406.07522: a state-space layer, then a window, each with an MLP.

    Mamba-2 stands for Mamba. Their window is half of a row, 2048 of 4096, and so is this one.
    """
    mixers = {"sliding_window": {"window": half(arg.length)}}
    return repeat(("mamba2", "sliding_window"), arg.layers), mixers, {}


def sambay(arg):
    """Ren et al. 2025, arXiv 2507.06607: half a Samba; a state-space layer that publishes its
    memory and a layer of attention that publishes keys and values; gated memory units and cross
    attention in turn, which read them. No positions anywhere. The window is their scaling runs'.

    Mamba-2 stands for Mamba, so that the gated memory units have the norm.
    """
    if arg.layers % 4:
        raise UserError(f"sambay: layers must be a multiple of 4; given {arg.layers}")
    layers = repeat(("mamba2", "sliding_window"), arg.layers // 2)
    layers += repeat(("published(mamba2)", "published(attention)"), 2)
    layers += repeat(("gmu", "cross_attention"), arg.layers // 2 - 2)
    mixers = {
        "sliding_window": {"window": 128, "rotary_base": 0.0},
        "attention": {"window": capacity(arg.length), "rotary_base": 0.0},
        "cross_attention": {"rotary_base": 0.0},
    }
    return layers, mixers, {}


def griffin(arg):
    """De et al. 2024, arXiv 2402.19427: two layers of the RG-LRU, then a window with one head of
    keys and values; MLPs gated by GELU, three times as wide.

    Their window is 1024, here half of a row; their rotary positions turn the first half of each
    head, here the whole. The recurrence is 4/3 as wide as the model, as theirs.
    """
    mixers = {
        "rg_lru": {"width": 8 * round(arg.dim / 6)},
        "sliding_window": {"window": half(arg.length), "kv_heads": 1},
    }
    layers = repeat(("rg_lru", "rg_lru", "sliding_window"), arg.layers)
    return layers, mixers, {"channel": "geglu", "mlp": 3.0}


def olmo_hybrid(arg):
    """Olmo Hybrid 2026, arXiv 2604.03444: three layers of Gated DeltaNet with beta up to 2, then
    attention without positions. Keys have 3/4 of dim / heads channels, values twice as many.

    Their attention normalises queries and keys over all heads, here in each, and its output in
    place of its input.
    """
    width = 3 * arg.dim // 16
    mixers = {
        "gated_delta_net": {"beta_max": 2.0, "key_dim": width, "value_dim": 2 * width},
        "attention": {"window": capacity(arg.length), "rotary_base": 0.0, "qk_norm": True},
    }
    return repeat((*["gated_delta_net"] * 3, "attention"), arg.layers), mixers, {}


def beside_a_window(block, memory):
    """Behrouz et al. 2024, arXiv 2501.00663 (Titans), and 2025, arXiv 2505.23735 (Atlas): in every
    layer a window with persistent keys and values and a memory, the memory as a gate (MAG) or as
    a layer in front of the window (MAL).

    The papers give neither the window nor the number of persistent tokens. Their memories are
    networks, ours matrices unless `depth` says otherwise.
    """

    def arrangement(arg):
        mixers = {"sliding_window": {"window": 64, "persistent": 4}}
        return ((((f"{block}(sliding_window, {memory})",), arg.layers),), mixers, {})

    return arrangement


def half(length):
    """The window over half of a row."""
    return max(length // 2, 1)


def capacity(length):
    """Room for a row, and for 2048 tokens at least."""
    return max(length, 2048)


ARRANGEMENTS = {
    "based": based,
    "samba": samba,
    "sambay": sambay,
    "griffin": griffin,
    "olmo_hybrid": olmo_hybrid,
    "titans_mag": beside_a_window("mag", "titans"),
    "titans_mal": beside_a_window("mal", "titans"),
    "atlas_mag": beside_a_window("mag", "atlas"),
    "atlas_mal": beside_a_window("mal", "atlas"),
}


def get_config(arg=None):
    chosen = {"arrangement": ("samba", tuple(ARRANGEMENTS)), **defaults.TEXT, "layers": 12}
    arg = parse_arg(arg, **chosen)
    if arg.layers < 1:
        raise UserError(f"layers must be at least 1; given {arg.layers}")
    layers, mixers, model = ARRANGEMENTS[arg.arrangement](arg)
    return defaults.language_model(arg, layers, mixers, **model)
