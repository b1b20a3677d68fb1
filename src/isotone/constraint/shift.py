"""The exact start on LayerNorm models: every constrained weight non-negative, the model the same.

The input of the network is u = γ ⊙ z + β with Σz = 0, and what it writes is read behind mean-subtracting norms only.
So, for any c and d,

    W1 + c vᵀ with v = 1/|γ|, b1 − c Σ(v ⊙ β)        W2 + 1 dᵀ

compute the same function. c and d are the smallest that make every entry non-negative, plus a margin where the
parametrization needs one. Shapes: h hidden units, d width of the stream; all arithmetic in fp64.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.feed_forward import (
    FeedForward,
    bias_of,
    change_rows,
    in_eval_mode,
    matrix,
    probe_logits,
    probe_tokens,
)
from isotone.constraint.tracing import Norm, stream_ignores_mean, trace_norms
from isotone.errors import UsageError

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference of a probe's logits, in units of their standard deviation where that is above 1: what rounding may
do (norms and softmax may compute in fp32 inside an fp64 model), far below what an unmet condition does."""


@torch.no_grad()
def shift(
    model: PreTrainedModel,
    networks: Sequence[FeedForward],
    constrained: dict[str, nn.Module],
    margin: float = 0.0,
    will_train: bool = True,
    generator: torch.Generator | None = None,
) -> None:
    """Make the weights of ``constrained`` non-negative in place, without changing the function of the model.

    Args:
        model: a causal language model with LayerNorm, in fp32 or fp64.
        networks: all feed-forward networks of the model.
        constrained: the modules to shift, by full path: some of the networks' ``up``, ``down`` and ``attention_out``.
        margin: how far above 0 every entry ends, in standard deviations of its matrix.
        will_train: whether the model will be trained; dropout would then break the equality.
        generator: draws the tokens on which the result is verified.

    Raises:
        UsageError: the model does not meet the conditions, or its logits changed; names the condition. The model is
            left as it was.
    """
    _require_plain(model, networks, will_train)
    tokens_BT = probe_tokens(model, generator)
    norms = _layer_norms(model, networks, tokens_BT)
    writers = _writers(networks, norms, constrained)
    if writers and not stream_ignores_mean(model, [m for m, _ in writers], [s for _, s in writers], tokens_BT):
        raise UsageError(
            _refusal("something reads the residual stream without subtracting its mean (no final LayerNorm?)")
        )
    touched = _touched(model, norms, constrained)
    before = [p.clone() for p in touched]
    logits = in_eval_mode(model, lambda: probe_logits(model, tokens_BT).double())
    try:
        _shift_all(model, networks, norms, constrained, [m for m, _ in writers], margin)
        shifted = in_eval_mode(model, lambda: probe_logits(model, tokens_BT).double())
        change = float((shifted - logits).abs().max())
        if not change <= _TOLERANCE[model.dtype] * max(1.0, float(logits.std())):
            raise UsageError(_refusal(f"it changed the logits of random tokens by {change:.2g}"))
    except UsageError:
        for parameter, old in zip(touched, before, strict=True):
            parameter.copy_(old)
        raise


def _shift_all(
    model: PreTrainedModel,
    networks: Sequence[FeedForward],
    norms: Sequence[Norm],
    constrained: dict[str, nn.Module],
    writers: Sequence[nn.Module],
    margin: float,
) -> None:
    for network, norm in zip(networks, norms, strict=True):
        if network.names["up"] in constrained:
            _shift_reader(network.up, norm if norm.one_sign else fold_gain(model, norm, _refusal), margin)
    for writer in writers:
        _shift_writer(writer, margin)


def _refusal(reason: str) -> str:
    return f"constraint.initialization: shift is not exact here: {reason}; use another initialization, such as nnls"


def _require_plain(model: PreTrainedModel, networks: Sequence[FeedForward], will_train: bool) -> None:
    if any(network.gate is not None for network in networks):
        raise UsageError(_refusal(f"the feed-forward networks of {model.config.model_type} are gated"))
    if model.dtype not in _TOLERANCE:
        raise UsageError(
            _refusal(f"the weights are {str(model.dtype).removeprefix('torch.')}, too coarse; load in float32")
        )
    for network in networks if will_train else ():
        for name, module in model.get_submodule(network.block).named_modules():
            inside_attention = name and network.names["attention_out"].startswith(
                f"{network.block}.{name.split('.')[0]}."
            )
            if not inside_attention and (p := _dropout(module)) > 0:
                place = f"{network.block}.{name}".rstrip(".")
                raise UsageError(_refusal(f"{place} has dropout {p:g} in training; load the model with dropout=0"))


def _dropout(module: nn.Module) -> float:
    """Return the dropout probability that a module applies itself, by nn.Dropout or by a number it keeps."""
    if isinstance(module, nn.Dropout):
        return module.p
    kept = (getattr(module, key, 0.0) for key in ("dropout", "hidden_dropout"))
    return max(p if isinstance(p, float) else 0.0 for p in kept)


def _layer_norms(model: PreTrainedModel, networks: Sequence[FeedForward], tokens_BT: Tensor) -> list[Norm]:
    norms = []
    for network, norm in zip(networks, trace_norms(model, networks, tokens_BT), strict=True):
        if isinstance(norm, str):
            raise UsageError(_refusal(f"{network.names['up']} is fed by {norm}, not by a LayerNorm"))
        if norm.kind != "layer_norm":
            raise UsageError(_refusal(f"{norm.name}, which feeds {network.names['up']}, is an RMSNorm: the mean stays"))
        if bias_of(network.up) is None and bool(norm.offset.any()):
            raise UsageError(_refusal(f"{norm.name} has a bias and {network.names['up']} has none to compensate it"))
        norms.append(norm)
    return norms


def _writers(
    networks: Sequence[FeedForward], norms: Sequence[Norm], constrained: dict[str, nn.Module]
) -> list[tuple[nn.Module, float]]:
    """Return constrained modules that write to the residual stream, with the size of the stream."""
    return [
        (constrained[network.names[role]], norm.stream_std)
        for network, norm in zip(networks, norms, strict=True)
        for role in ("down", "attention_out")
        if network.names[role] in constrained
    ]


def _touched(model: PreTrainedModel, norms: Sequence[Norm], constrained: dict[str, nn.Module]) -> list[Tensor]:
    """Return every parameter that may change."""
    modules = list(constrained.values())
    for norm in norms:
        modules += [norm.module, *(model.get_submodule(name) for name in norm.readers)]
    return list({id(p): p for m in modules for p in m.parameters(recurse=False)}.values())


def fold_gain(model: PreTrainedModel, norm: Norm, refusal: Callable[[str], str]) -> Norm:
    """Move γ from a norm into all its readers: W ← W diag(γ), β ← β/γ, γ ← 1.

    Where γ_i = 0 the input is the constant β_i, which goes into the readers' biases.

    Raises:
        UsageError: one of them has none; ``refusal`` makes the sentence.
    """
    gain, offset = (t.to(model.device) for t in (norm.gain, norm.offset))
    constant = torch.where(gain == 0, offset, 0)
    kept = torch.where(gain == 0, 0, offset / gain)
    for name in norm.readers:
        module = model.get_submodule(name)
        w, bias = matrix(module), bias_of(module)
        if bias is not None:
            bias.copy_(bias.double() + w.double() @ constant)
        elif bool(constant.any()):
            raise UsageError(refusal(f"a gain of {norm.name} is 0 and {name} has no bias to take up what it leaves"))
        change_rows(w, lambda w_kn: w_kn * gain)
    set_gain(norm, torch.ones_like(gain))
    if getattr(norm.module, "bias", None) is not None:
        norm.module.bias.copy_(kept)  # type: ignore[operator, union-attr]
    return dataclasses.replace(norm, gain=torch.ones_like(norm.gain), offset=kept.cpu())


def set_gain(norm: Norm, gain_d: Tensor) -> None:
    """Give a norm another gain, as it stores it; what reads it is not changed."""
    norm.module.weight.copy_(gain_d - float(norm.one_plus_weight))  # type: ignore[operator, union-attr]


def _shift_reader(module: nn.Module, norm: Norm, margin: float) -> None:
    """W1 ← W1 + c vᵀ and b1 ← b1 − c Σ(v ⊙ β), v = 1/|γ|."""
    w_hd = matrix(module)
    gain = norm.gain.abs().to(w_hd.device)
    scaled_hd = w_hd.double() * gain
    c_h = (-scaled_hd).amax(1).clamp_min(0) + margin * scaled_hd.std()
    w_hd.copy_(((scaled_hd + c_h[:, None]) / gain).clamp_min(0))
    bias = bias_of(module)
    if bias is not None:
        bias.copy_(bias.double() - c_h * (norm.offset.to(gain.device) / gain).sum())


def _shift_writer(module: nn.Module, margin: float) -> None:
    """W2 ← W2 + 1 dᵀ."""
    w_dh = matrix(module)
    wide_dh = w_dh.double()
    d_h = (-wide_dh).amax(0).clamp_min(0) + margin * wide_dh.std()
    w_dh.copy_((wide_dh + d_h).clamp_min(0))
