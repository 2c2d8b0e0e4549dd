"""Other libraries' forms of the same recurrences, to be timed beside ours.

    python -m memjax.benchmark --cells=gated_delta_net,attention,rwkv4,titans --peers

They need `pip install -e '.[peers]'` (torch, transformers, titans-pytorch) and run on torch's CPU
or GPU.
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
        function, leaves = self._ready(xs)
        return _timed(lambda *given: self.call(function, type(leaves)(*given)), leaves)

    def _ready(self, xs):
        leaves = type(xs)(*map(_tensor, xs))
        return getattr(_import(self.module), self.function), leaves


@dataclasses.dataclass(frozen=True)
class Layer:
    """A whole layer of another library that does what our mixer of `cell` does. Its weights are its
    own, so that only the times are compared.

    options: of our mixer, beside `heads`. make: (heads, size of a head) -> a torch module, and what
    takes its answer for activations [B, T, D] from what it gives.
    """

    name: str
    cell: str
    options: dict[str, Any]
    make: Callable[[int, int], tuple[Any, Callable[[Any], Any]]]

    def calls(self, x: np.ndarray, heads: int) -> Sequence[Callable[[], Any]]:
        """Forward, and forward and backward with gradients of the activations and the weights."""
        module, answer = self.make(heads, x.shape[-1] // heads)
        given = _tensor(x)
        module = module.to(given.device)

        def call(x):
            module.zero_grad(set_to_none=True)
            return answer(module(x))

        return _timed(call, [given])


def _tensor(leaf):
    torch = _import("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor(np.asarray(leaf), device=device)


def _timed(call, leaves):
    """(forward, forward and backward) of a function of tensors."""
    torch = _import("torch")

    def finish(y):
        if y.is_cuda:
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad():
            finish(call(*leaves))

    def both():
        y = call(*(a.detach().requires_grad_() for a in leaves))
        y.sum().backward()
        finish(y)

    return forward, both


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


def _titans(heads, size):
    """Its memory of one matrix a head, with momentum; one step of the frozen chunk's gradients."""
    library = _import("titans_pytorch")
    memory = library.MemoryMLP(size, depth=1)
    sizes = {"dim": heads * size, "dim_head": size, "heads": heads, "chunk_size": 64}
    return library.NeuralMemory(**sizes, model=memory), lambda given: given[0]


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


LAYERS = (
    Layer(
        "titans-pytorch layer",
        "titans",
        {"frozen_chunk": 64, "convolution": 0, "gate": "none"},
        _titans,
    ),
)


def of(cell: str) -> list[Peer]:
    """The peers of one cell."""
    return [peer for peer in PEERS if peer.cell == cell]


def layers_of(cell: str) -> list[Layer]:
    """The layers of other libraries that stand beside the mixer of one cell."""
    return [layer for layer in LAYERS if layer.cell == cell]
