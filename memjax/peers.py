"""Other libraries' forms of the same recurrences, to be timed beside ours.

    python -m memjax.benchmark --cells=gated_delta_net,attention,rwkv4 --peers

They need `pip install -e '.[peers]'` (torch, transformers) and run on torch's CPU or GPU.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memjax.errors import UserError
from memjax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Peer:
    """One function of another library.

    name: what the table calls it. cell: the cell whose work it does.
    module, function: where it is. call: (function, inputs as tensors) -> answers, in our layout.
    prepare: inputs -> inputs that the peer can take too; the work is the same.
    """

    name: str
    cell: str
    module: str
    function: str
    call: Callable[[Callable, Any], Any]
    prepare: Callable[[Any], Any] = lambda xs: xs

    def answers(self, xs: PyTree) -> np.ndarray:
        """y of the inputs, leaves [B, T, h, ...] in numpy."""
        function, leaves = self._ready(xs)
        with _import("torch").no_grad():
            return self.call(function, leaves).cpu().numpy()

    def calls(self, xs: PyTree) -> Sequence[Callable[[], Any]]:
        """The forward pass, and forward and backward with gradients of all inputs."""
        torch = _import("torch")
        function, leaves = self._ready(xs)

        def finish(y):
            if y.is_cuda:
                torch.cuda.synchronize()

        def forward():
            with torch.no_grad():
                finish(self.call(function, leaves))

        def both():
            inputs = type(leaves)(*(a.detach().requires_grad_() for a in leaves))
            y = self.call(function, inputs)
            y.sum().backward()
            finish(y)

        return forward, both

    def _ready(self, xs):
        torch = _import("torch")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        leaves = type(xs)(*(torch.tensor(np.asarray(leaf), device=device) for leaf in xs))
        return getattr(_import(self.module), self.function), leaves


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise UserError(
            f"--peers needs {name}, which cannot be imported ({err}); run "
            "`pip install -e '.[peers]'`, or leave --peers out"
        ) from err


def _delta_rule(function, xs):
    return function(xs.q, xs.k, xs.v, g=xs.g, beta=xs.beta)[0]


def _attention(function, xs):
    q, k, v = xs.q[:, :, :, 0].transpose(1, 2), xs.k.transpose(1, 2), xs.v.transpose(1, 2)
    return function(q, k, v, is_causal=True).transpose(1, 2)[:, :, :, None]


def _constant(xs):
    """The decay and the bonus of the first token at all tokens."""
    first = {name: np.asarray(getattr(xs, name))[:1, :1] for name in ("w", "u")}
    return xs._replace(**{name: np.broadcast_to(a, xs.k.shape) for name, a in first.items()})


def _wkv(function, xs):
    w, u = (a[0, 0].flatten() for a in (xs.w, xs.u))
    return function((-w).log(), u, xs.k.flatten(2), xs.v.flatten(2))[0].view(xs.v.shape)


_QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"

PEERS = (
    Peer(
        "transformers chunk", "gated_delta_net", _QWEN, "torch_chunk_gated_delta_rule", _delta_rule
    ),
    Peer(
        "transformers loop",
        "rwkv4",
        "transformers.models.rwkv.modeling_rwkv",
        "rwkv_linear_attention_cpu",
        _wkv,
        _constant,
    ),
    Peer(
        "torch sdpa",
        "attention",
        "torch.nn.functional",
        "scaled_dot_product_attention",
        _attention,
    ),
)


def of(cell: str) -> list[Peer]:
    """The peers of one cell."""
    return [peer for peer in PEERS if peer.cell == cell]
