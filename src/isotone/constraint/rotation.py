"""The basis in which the constraint binds least: an RMSNorm model is the same in every basis of its residual stream.

With norms' gains moved into what reads them, a rotation Q of the stream leaves a model as it is: W becomes Q W where
the stream is written, W Qᵀ where it is read (Ashkboos et al., SliceGPT, 2024). The order that certificates speak of
belongs to the basis, and so does what it costs to keep it. Two directions decide:

- v, along which what the networks read varies least, becomes p/√d, p in {−1, 1}ᵈ with as many of each; and p is the
  gain of the norms before constrained networks. Then W1 + c 1ᵀ, which is ≥ 0 from some c on, adds c√d (v·x̂) to
  pre-activations: little, but for a mean that a bias takes up.
- w, the next one, becomes q = 1/√d. W2 + 1 dᵀ writes along it. Nothing needs to read it: it is taken out of all other
  readers' matrices, and constrained networks can do without it, as p is orthogonal to q. What is left of it is in the
  norms' denominators.

So on these models, too, the property is to be had for less by a choice that no function depends on. The networks are
then monotone in what they read, which is ordered by other signs than what they write. Shapes: T tokens, d width of the
stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.calibration import read
from isotone.constraint.feed_forward import (
    FeedForward,
    bias_of,
    change_rows,
    feed_forwards,
    in_eval_mode,
    matrix,
    probe_logits,
    probe_tokens,
)
from isotone.constraint.journal import Journal
from isotone.constraint.shift import fold_gain, set_gain
from isotone.constraint.tracing import Norm, trace_norms, trace_norms_that_are_read
from isotone.errors import UsageError
from isotone.models.tying import untie_head

PENALTY = 0.3
"""What a square along q counts for in a fit, where any other counts 1, as it moves the norms' denominators alone.
docs/constraints.md has others that were tried."""

_TOLERANCE = 1e-3
"""Largest difference of a probe's logits, in units of their standard deviation where that is above 1, in fp32."""


@dataclass(frozen=True)
class Basis:
    """The basis that the stream has now."""

    gain_d: Tensor
    """p, the gain of norms before constrained networks; fp64."""

    @property
    def unread_d(self) -> Tensor:
        """Return q, the direction that nothing reads; fp64, of length 1."""
        return torch.full_like(self.gain_d, len(self.gain_d) ** -0.5)

    def without_unread(self, u_Td: Tensor) -> Tensor:
        """Return what a constrained network would read if nothing had been written along q (T, d), computed in fp64."""
        p_d = self.gain_d.to(u_Td.device)
        x_Td = u_Td.double() * p_d
        x_Td = x_Td - x_Td.mean(-1, keepdim=True)
        size_T1 = x_Td.square().mean(-1, keepdim=True).sqrt()
        return (x_Td / size_T1.clamp_min(torch.finfo(torch.float64).tiny) * p_d).to(u_Td.dtype)


@torch.no_grad()
def rotate(
    model: PreTrainedModel,
    networks: Sequence[FeedForward],
    constrained: Mapping[str, nn.Module],
    rows_NL: Tensor,
    generator: torch.Generator | None = None,
    journal: Journal | None = None,
) -> Basis:
    """Bring a model's stream, in place, into the basis in which ``constrained`` can best be fitted with weights ≥ 0.

    A head that shares the input embeddings' matrix gets its own, as the last norm's gain lies between the two.

    Args:
        model: a causal language model with RMSNorm before every sublayer and before its head, in fp32 or fp64.
        networks: the networks that are constrained, or some of whose projections are.
        constrained: the modules that will be, by full path.
        rows_NL: token ids on which v and w are found.
        generator: draws the tokens on which it is verified that the model is the same.
        journal: keeps v and w, or what is fitted in their basis would be brought back into another one, where rounding
            is another.

    Raises:
        UsageError: the model does not meet the conditions, or its logits changed; names the condition. The model is
            left as it was.
    """
    tokens_BT = probe_tokens(model, generator)
    stream = _stream_of(model, networks, tokens_BT)
    tie_again = untie_head(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = in_eval_mode(model, lambda: probe_logits(model, tokens_BT).double())
    try:
        for norm in stream.norms:
            fold_gain(model, norm, _refusal)
        v_d, w_d = _directions(model, networks, rows_NL, journal or Journal())
        _turn(model, stream, v_d, w_d)
        turned = in_eval_mode(model, lambda: probe_logits(model, tokens_BT).double())
        change = float((turned - logits).abs().max())
        if not change <= _TOLERANCE * max(1.0, float(logits.std())):
            raise UsageError(_refusal(f"it changed the logits of random tokens by {change:.2g}"))
    except Exception:
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
        tie_again()
        raise
    del before
    basis = Basis(_signs(len(v_d)).to(model.device))
    _set_gains(model, stream, networks, constrained, basis)
    return basis


def _refusal(reason: str) -> str:
    refused = f"constraint.initialization: rotated_nnls is not possible here: {reason}"
    return f"{refused}; use another initialization, such as nnls"


@dataclass(frozen=True)
class _Stream:
    """Everything that reads the residual stream, and everything that writes it."""

    norms: list[Norm]
    before: dict[str, Norm]
    """The norm that feeds each constrained network, by block."""
    writers: list[nn.Module]


def _stream_of(model: PreTrainedModel, networks: Sequence[FeedForward], tokens_BT: Tensor) -> _Stream:
    if model.config.is_encoder_decoder:
        raise UsageError(_refusal("an encoder-decoder has two streams, with embeddings in common"))
    if model.dtype not in (torch.float32, torch.float64):
        raise UsageError(_refusal(f"the weights are {str(model.dtype).removeprefix('torch.')}; load in float32"))
    if (width := model.get_input_embeddings().weight.size(1)) % 2:  # type: ignore[operator, union-attr]
        raise UsageError(_refusal(f"the stream's width, {width}, is odd"))
    before = {}
    for network, norm in zip(networks, trace_norms(model, networks, tokens_BT), strict=True):
        if isinstance(norm, str):
            raise UsageError(_refusal(f"{network.names['up']} is fed by {norm}, not by an RMSNorm"))
        if norm.kind != "rms_norm":
            raise UsageError(_refusal(f"{norm.name}, which feeds {network.names['up']}, is a LayerNorm"))
        before[network.block] = norm
    norms = trace_norms_that_are_read(model, width, tokens_BT)
    writers = [module for network in feed_forwards(model) for module in (network.attention_out, network.down)]
    return _Stream(norms, before, writers)


def _directions(
    model: PreTrainedModel, networks: Sequence[FeedForward], rows_NL: Tensor, journal: Journal
) -> tuple[Tensor, Tensor]:
    """Return v and w: those that were kept, or else those that are found now."""
    width = matrix(networks[0].up).shape[1]
    kept = nn.Module()
    for name in ("v", "w"):
        kept.register_buffer(name, torch.empty(width, dtype=torch.float64, device=model.device))
    if journal.restore({"rotation": kept}) is None:
        kept.v, kept.w = _least_varying(model, networks, rows_NL)
        journal.keep({"rotation": kept})
    return kept.v, kept.w  # type: ignore[return-value]


def _least_varying(model: PreTrainedModel, networks: Sequence[FeedForward], rows_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two directions along which the networks' inputs, all together, vary least over tokens.

    Where a network has no bias to take up a mean, the mean counts as well.
    """
    ups = {network.block: network.up for network in networks}
    width = matrix(networks[0].up).shape[1]
    spread_dd = torch.zeros(width, width, dtype=torch.float64, device=model.device)
    sums = {block: torch.zeros(width, dtype=torch.float64, device=model.device) for block in ups}
    count = 0
    for row_L in rows_NL:
        found = read(model, row_L[None], ups)
        count += row_L.numel()
        for block, (x_Td, _) in found.items():
            x_Td = x_Td.double()
            spread_dd.addmm_(x_Td.T, x_Td)
            sums[block] += x_Td.sum(0)
    spread_dd /= count
    for block, up in ups.items():
        if bias_of(up) is not None:
            spread_dd -= torch.outer(sums[block] / count, sums[block] / count)
    vectors_dd = torch.linalg.eigh(spread_dd).eigenvectors
    return vectors_dd[:, 0], vectors_dd[:, 1]


def _signs(width: int) -> Tensor:
    """Return p: 1 and −1 in turn."""
    return torch.ones(width, dtype=torch.float64).index_fill_(0, torch.arange(1, width, 2), -1)


def _turn(model: PreTrainedModel, stream: _Stream, v_d: Tensor, w_d: Tensor) -> None:
    """Rotate the stream by the Q that brings v to p/√d and w to 1/√d: two reflections (Householder 1958)."""
    width = len(v_d)
    q_dd = torch.eye(width, dtype=torch.float64, device=v_d.device)
    for start_d, end_d in ((v_d, _signs(width).to(v_d.device)), (w_d, torch.ones_like(w_d))):
        normal_d = q_dd @ start_d - end_d * width**-0.5
        if (square := float(normal_d @ normal_d)) > torch.finfo(torch.float64).eps:
            q_dd = q_dd - 2 / square * torch.outer(normal_d, normal_d @ q_dd)
    embeddings: Tensor = model.get_input_embeddings().weight.data  # type: ignore[assignment, union-attr]
    for w_md in (embeddings, *map(matrix, _readers(model, stream.norms))):
        change_rows(w_md, lambda w_kd: w_kd @ q_dd.T)
    for writer in stream.writers:
        matrix(writer).copy_(q_dd @ matrix(writer).double())
        if (bias := bias_of(writer)) is not None:
            bias.copy_(q_dd @ bias.double())


def _readers(model: PreTrainedModel, norms: Sequence[Norm]) -> list[nn.Module]:
    return [model.get_submodule(name) for norm in norms for name in norm.readers]


def _set_gains(
    model: PreTrainedModel,
    stream: _Stream,
    networks: Sequence[FeedForward],
    constrained: Mapping[str, nn.Module],
    basis: Basis,
) -> None:
    """Put p before the constrained networks, and take q out of whatever else reads the stream."""
    p_d, q_d = basis.gain_d, basis.unread_d
    signed = {
        stream.before[n.block].name for n in networks if any(n.names.get(r) in constrained for r in ("up", "gate"))
    }
    for norm in stream.norms:
        if norm.name in signed:
            set_gain(norm, p_d)
        for name in norm.readers:
            w_md = matrix(model.get_submodule(name))
            if name not in constrained:
                change_rows(w_md, lambda w_kd: w_kd - torch.outer(w_kd @ q_d, q_d))
            if norm.name in signed:
                w_md.mul_(p_d)
