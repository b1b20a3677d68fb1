"""What really feeds a feed-forward network: found by following tensors through a forward pass, never by a name.

Shapes: T tokens, d width of the residual stream.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from isotone.constraint.architectures import NormKind
from isotone.constraint.feed_forward import FeedForward, in_eval_mode, probe_logits
from isotone.errors import UsageError


@dataclass(frozen=True)
class Norm:
    """The norm whose output is the input u = γ ⊙ z + β of a feed-forward network."""

    name: str
    module: nn.Module
    kind: NormKind
    gain: Tensor
    """γ (d,), fp64; the gain that acts, 1 + weight where that is the convention."""
    offset: Tensor
    """β (d,), fp64."""
    one_plus_weight: bool
    """Whether γ is stored as γ − 1."""
    readers: tuple[str, ...]
    """Projections that read the norm's output directly."""
    stream_std: float
    """Standard deviation of what the norm read in the traced pass."""

    @property
    def one_sign(self) -> bool:
        """Whether all gains are positive, or all are negative."""
        return bool((self.gain > 0).all() or (self.gain < 0).all())


def trace_norms(model: PreTrainedModel, networks: Sequence[FeedForward], tokens_BT: Tensor) -> list[Norm | str]:
    """Return the norm that feeds each network, or, where none does, what was found instead.

    A tensor is followed by its storage: reshapes between norm and projection do not matter. Whether a module is a norm,
    which kind, and what its gain is, is read off its outputs, not its class.
    """
    trace = _Trace()
    with trace.recording(model):
        in_eval_mode(model, lambda: probe_logits(model, tokens_BT))
    return [_norm_before(trace, network) for network in networks]


def trace_norms_that_are_read(model: PreTrainedModel, width: int, tokens_BT: Tensor) -> list[Norm]:
    """Return every norm of this width that a projection reads directly, in the order of the computation."""
    trace = _Trace()
    with trace.recording(model):
        in_eval_mode(model, lambda: probe_logits(model, tokens_BT))
    found = (
        _read_norm(name, module, stream, tuple(trace.readers[address]))
        for address, (name, module, stream) in trace.producers.items()
        if trace.readers[address] and stream.shape[-1] == width
    )
    return [norm for norm in found if norm is not None]


class _Trace:
    """First producer of each storage, and readers of it, in one forward pass."""

    def __init__(self) -> None:
        self.producers: dict[int, tuple[str, nn.Module, Tensor]] = {}
        self.readers: dict[int, list[str]] = {}
        self.read: dict[str, int] = {}
        self._alive: list[Tensor] = []  # a freed storage's address would be given out again

    @contextmanager
    def recording(self, model: PreTrainedModel) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                handles.append(module.register_forward_hook(self._produced(name)))
            if isinstance(module, nn.Linear | Conv1D):
                handles.append(module.register_forward_pre_hook(self._reading(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _produced(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
                address = _address(output)
                self._alive.append(output)
                if address not in self.producers:
                    self.producers[address] = (name, module, inputs[0])
                    self.readers[address] = []  # who read an earlier tensor at this address is of no interest

        return hook

    def _reading(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.read[name] = _address(inputs[0])
            self.readers.setdefault(_address(inputs[0]), []).append(name)

        return hook


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _norm_before(trace: _Trace, network: FeedForward) -> Norm | str:
    address = trace.read[network.names["up"]]
    if address not in trace.producers:
        return "no single module"
    name, module, stream = trace.producers[address]
    return _read_norm(name, module, stream, tuple(trace.readers[address])) or f"{name} ({type(module).__name__})"


@torch.no_grad()
def _read_norm(name: str, module: nn.Module, stream: Tensor, readers: tuple[str, ...]) -> Norm | None:
    """Return the norm that a module computes, found by comparing its outputs with both kinds and both conventions.

    A copy in fp64 is asked: in half precision a norm with small gains could be taken for the other kind.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if any(p is not None and p.ndim != 1 for p in (weight, bias)):
        return None
    d = stream.shape[-1]
    x_TD = torch.randn(8, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20 + 10
    y_TD = copy.deepcopy(module).double().cpu()(x_TD).double()  # large, so that the norm's eps is small beside it
    offset = bias.double().cpu() if bias is not None else torch.zeros(d, dtype=torch.float64)
    stored = weight.double().cpu() if weight is not None else torch.ones(d, dtype=torch.float64)
    centred_TD = x_TD - x_TD.mean(-1, keepdim=True)
    kinds: tuple[tuple[NormKind, Tensor], ...] = (("layer_norm", centred_TD), ("rms_norm", x_TD))
    for kind, raw_TD in kinds:
        z_TD = raw_TD / raw_TD.square().mean(-1, keepdim=True).sqrt()
        for one_plus_weight in (False, True):
            gain = stored + one_plus_weight
            tolerance = 1e-4 * float(gain.abs().max()) + 1e-6 * float(offset.abs().max())  # some compute in fp32 inside
            if torch.allclose(gain * z_TD + offset, y_TD, rtol=0, atol=tolerance):
                return Norm(
                    name,
                    module,
                    kind,
                    gain,
                    offset,
                    one_plus_weight,
                    readers,
                    float(stream.float().std()),
                )
    return None


def stream_ignores_mean(
    model: PreTrainedModel, writers: Sequence[nn.Module], stds: Sequence[float], tokens_BT: Tensor
) -> bool:
    """Return whether adding one number per token to all coordinates of each writer's output leaves the logits alone.

    True exactly where every reader of the residual stream, the head included, sits behind a mean-subtracting norm; then
    1dᵀ can be added to a writer's matrix. The numbers are of the size of the stream, drawn anew for each writer.
    """
    generator = torch.Generator().manual_seed(1)

    def forward() -> Tensor:
        return probe_logits(model, tokens_BT).double()

    def disturb(std: float) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            number = torch.randn((*output.shape[:-1], 1), generator=generator) * std
            return output + number.to(output.device, output.dtype)

        return hook

    before = in_eval_mode(model, forward)
    handles = [w.register_forward_hook(disturb(s)) for w, s in zip(writers, stds, strict=True)]
    try:
        after = in_eval_mode(model, forward)
    finally:
        for handle in handles:
            handle.remove()
    return float((after - before).abs().max()) <= 1e-3 * float(before.std())


def require_claimed_maps(model: PreTrainedModel, networks: Sequence[FeedForward], tokens_BT: Tensor) -> None:
    """Check that each network computes the formula of its architecture, on the inputs of a forward pass.

    Raises:
        UsageError: a network's output is something else (custom code, a forgotten hook); names it.
    """
    for network in networks:  # the formula asks the activation itself, so that it must be what its class says
        activation = network.activation
        if activation._forward_hooks or activation._forward_pre_hooks or "forward" in vars(activation):
            raise UsageError(f"model: a hook on {network.activation_path} may change what it computes; remove it first")
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def reading(block: str) -> Any:
        return lambda module, inputs: seen.__setitem__(block, (inputs[0], inputs[0]))

    def written(block: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(block, (seen[block][0], output))

    handles = []
    for network in networks:
        handles.append(network.up.register_forward_pre_hook(reading(network.block)))
        handles.append(network.down.register_forward_hook(written(network.block)))
    try:
        in_eval_mode(model, lambda: probe_logits(model, tokens_BT))
    finally:
        for handle in handles:
            handle.remove()
    tolerance = 50 * torch.finfo(model.dtype).eps
    for network in networks:
        u, output = seen[network.block]
        difference = (network(u.double()) - output).abs().max()
        if not float(difference) <= tolerance * (1 + float(output.abs().max())):
            raise UsageError(
                f"model.source: the feed-forward network of {network.block} does not compute what a "
                f"{model.config.model_type} computes (difference {float(difference):.2g})"
            )
