"""What is proved about a model's feed-forward weights: one verdict, with its fields and reasons.

The claim is about each network in scope, u ↦ W2 σ(W1 u + b1) + b2 from the norm's output to before the residual sum: it
is coordinatewise non-decreasing in real arithmetic with these very weights. Nothing is claimed about a block, the
model, or edits of tokens.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.activations import Monotonicity, monotonicity_of
from isotone.constraint.feed_forward import (
    FeedForward,
    architecture_of_model,
    bias_of,
    constrained_modules,
    feed_forwards,
    matrix,
    probe_tokens,
    require_finite,
)
from isotone.constraint.layers import Layers, resolve_layers
from isotone.constraint.tracing import Norm, require_claimed_maps, trace_norms
from isotone.constraint.witness import find_witness
from isotone.errors import UsageError

Verdict = Literal["violated", "vacuous", "strict", "local", "empirical"]


@dataclass(frozen=True)
class Certificate:
    """What holds for the feed-forward networks of one set of weights.

    Attributes:
        verdict: the first that applies. ``violated``: a constrained entry is negative, or an ordered reachable pair is
            mapped out of order. ``vacuous``: no two different inputs are ordered, so every network qualifies.
            ``strict``: non-decreasing on all of ℝ^d (not: strictly increasing). ``local``: non-decreasing wherever the
            norm's outputs can be, by an interval for each unit, and not shown elsewhere. ``empirical``: unproved; a
            search found nothing against it, which is not a proof.
        scope: which projections were examined.
        map: the function that the claim is about.
        domain: the inputs that the claim is about.
        weights: ``nonneg`` or ``mixed``: signs of the examined entries.
        activation: class of σ (every one, where networks differ), and where all of them are non-decreasing.
        order: ``vacuous``, ``binding``, or ``basis-dependent`` (RMSNorm: a rotation of the residual stream keeps the
            model and changes which inputs are ordered).
        weights_hash: SHA-256 over the examined matrices, their biases and the norms before them.
        reasons: one sentence each.
        layers: indices of the blocks that were examined, counted from 0 (an encoder's before a decoder's); None: all.
    """

    verdict: Verdict
    scope: str
    map: str
    domain: str
    weights: Literal["nonneg", "mixed"]
    activation: dict[str, str]
    order: Literal["vacuous", "binding", "basis-dependent"]
    weights_hash: str
    reasons: tuple[str, ...]
    layers: tuple[int, ...] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """What was examined, and what was found of each part of the claim."""
        values = self.to_dict()
        keys = ("scope", "layers", "map", "domain", "weights", "activation", "order")
        return {key: values[key] for key in keys if key in values}

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as JSON values; ``layers`` where it is about some blocks only."""
        values = asdict(self) | {"reasons": list(self.reasons), "layers": self.layers and list(self.layers)}
        return values if self.layers is not None else {k: v for k, v in values.items() if k != "layers"}


def certify(model: PreTrainedModel | str | Path, scope: str | None = None, layers: Layers | None = None) -> Certificate:
    """Examine the feed-forward networks of a model in memory or of an exported folder.

    Args:
        model: the model (not changed), or what ``isotone.models.load_model`` takes.
        scope: which projections to examine; what the model's configuration says it was constrained to, or else the
            widest scope of its architecture.
        layers: the blocks to examine (``:`` means all); unless given, those that the model's configuration says were
            constrained, or else all.

    Raises:
        UsageError: the model cannot be read, its architecture is unknown, the scope matches nothing in it, or a network
            does not compute what its architecture's does.
    """
    if isinstance(model, PreTrainedModel):
        return _certify(model, scope, layers)
    from isotone.models import load_model

    return _certify(load_model(str(model)), scope, layers)  # fp32 holds whatever halves hold, and what is evaluated


def _certify(model: PreTrainedModel, scope: str | None, layers: Layers | None) -> Certificate:
    recorded = _recorded(model)
    layers = recorded.get("layers") if layers is None else layers
    scope = scope or recorded.get("scope") or architecture_of_model(model).widest_scope
    modules = constrained_modules(model, scope, layers)
    networks = feed_forwards(model, layers)
    require_finite(model, beside=modules)
    norms = trace_norms(model, networks, probe_tokens(model))
    activation = _weakest(networks)
    wrong = _wrong_entries(modules)
    if not wrong:
        require_claimed_maps(model, networks, probe_tokens(model))
    order = _order(norms)
    verdict, reasons = _judge(networks, norms, activation, wrong, modules)
    return Certificate(
        verdict=verdict,
        scope=scope,
        map=_map(networks[0], modules),
        domain=_DOMAINS.get(verdict, "none proved"),
        weights="mixed" if wrong else "nonneg",
        activation={
            "name": ", ".join(_activations(networks)),
            "non_decreasing_on": str(activation),
        },
        order=order,
        weights_hash=_hash(modules, norms),
        reasons=tuple(reasons),
        layers=resolve_layers(layers, len(feed_forwards(model))) if layers is not None else None,
    )


def _recorded(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a model's configuration says was constrained.

    Raises:
        UsageError: it says something that was never written there.
    """
    recorded = getattr(model.config, "isotone", None)
    if recorded is None:
        return {}
    found = recorded if isinstance(recorded, dict) else {"isotone": recorded}
    kinds: dict[str, Any] = {"isotone": dict, "scope": str, "layers": (str, list, tuple)}
    for key, value in found.items():
        if key in kinds and value is not None and not isinstance(value, kinds[key]):
            raise UsageError(f"config.json: isotone says {value!r} of {key}, which isotone never wrote; take it out")
    return found


_DOMAINS: dict[Verdict, str] = {
    "vacuous": "outputs of the norm, an antichain",
    "strict": "ℝ^d",
    "local": "outputs of the norm: γ ⊙ x̂ + β with ‖x̂‖ ≤ √d",
}


def _wrong_entries(modules: dict[str, nn.Module]) -> list[str]:
    """Return, for each examined matrix with an entry that is not a non-negative number, a sentence."""
    wrong = []
    for name, module in modules.items():
        bad = ~(matrix(module) >= 0) | torch.isinf(matrix(module))
        if count := int(bad.sum()):
            wrong.append(f"{name}.weight has {count} of {bad.numel()} entries that are negative or not finite")
        bias = bias_of(module)
        if bias is not None and (count := int((~torch.isfinite(bias)).sum())):
            wrong.append(f"{name}.bias has {count} of {bias.numel()} entries that are not finite")
    return wrong


def _order(norms: Sequence[Norm | str]) -> Literal["vacuous", "binding", "basis-dependent"]:
    if all(_antichain(norm) for norm in norms):
        return "vacuous"
    if any(isinstance(norm, Norm) and norm.kind == "rms_norm" for norm in norms):
        return "basis-dependent"
    return "binding"


def _antichain(norm: Norm | str) -> bool:
    """Return whether no two different outputs of a norm are ordered: mean-subtracting, gains of one sign, none 0."""
    return isinstance(norm, Norm) and norm.kind == "layer_norm" and norm.one_sign


def _weakest(networks: Sequence[FeedForward]) -> Monotonicity:
    """Return where the activations of all networks are non-decreasing, as the one says of which least is proved."""
    found = [monotonicity_of(network.activation) for network in networks]
    return max(found, key=lambda each: math.inf if each.least is None else each.least)


def _activations(networks: Sequence[FeedForward]) -> list[str]:
    return list(dict.fromkeys(type(network.activation).__name__ for network in networks))


def _judge(
    networks: Sequence[FeedForward],
    norms: Sequence[Norm | str],
    activation: Monotonicity,
    wrong: Sequence[str],
    modules: dict[str, nn.Module],
) -> tuple[Verdict, list[str]]:
    if wrong:
        return "violated", [*wrong[:3], *([f"and {len(wrong) - 3} more matrices"] if len(wrong) > 3 else [])]
    if all(_antichain(norm) for norm in norms):
        return "vacuous", [
            "each network reads a LayerNorm with gains of one sign: no two different inputs are ordered, "
            "so any network there is monotone, constrained or not"
        ]
    gated = networks[0].gate is not None
    if not gated and activation.everywhere:
        names = " and ".join(_activations(networks))
        return "strict", [f"no examined weight is negative and {names} is non-decreasing on ℝ", *_signs(norms)]
    if not gated and (least := _least_margin(networks, norms)) >= 0:
        return "local", [
            f"no examined weight is negative, and whatever the norms put out, no unit gets below the point from which "
            f"its activation does not decrease (margin {least:.3g}); proved for outputs of the norms only, not on ℝ^d",
            *_signs(norms),
        ]
    doubts = []
    if gated:
        doubts.append("a gated product is monotone only where both factors are non-negative and non-decreasing")
    if not activation.everywhere:
        doubts.append(f"{activation.name} is not proved non-decreasing on ℝ (proved on: {activation})")
    return _search(networks, norms, modules, [*doubts, *_signs(norms)])


def _signs(norms: Sequence[Norm | str]) -> list[str]:
    """Return what is to be said where gains turn the order around, be it in some coordinates only."""
    turned = sum(isinstance(norm, Norm) and bool((norm.gain < 0).any()) for norm in norms)
    if not turned:
        return []
    networks = f"{turned} of {len(norms)} networks" if turned < len(norms) else "all networks"
    return [
        f"negative gains stand in the norms before {networks}: these read the stream in another order than that in "
        f"which it is written"
    ]


def _least_margin(networks: Sequence[FeedForward], norms: Sequence[Norm | str]) -> float:
    """Return by how much every reachable pre-activation lies right of where its activation decreases; −∞ if unknown.

    A norm puts out γ ⊙ x̂ + β with ‖x̂‖ ≤ √d, and Σx̂ = 0 for LayerNorm. So w·u + b lies in m ± r with m = w·β + b and
    r = √d‖γ ⊙ w‖, for LayerNorm after the mean of γ ⊙ w is taken off. The bound allows for its own rounding in fp64.
    """
    margin = float("inf")
    for network, norm in zip(networks, norms, strict=True):
        least = monotonicity_of(network.activation).least
        if isinstance(norm, str) or least is None:
            return float("-inf")
        w_hd, bias_h = matrix(network.up).double().cpu(), bias_of(network.up)
        scaled_hd = w_hd * norm.gain
        if norm.kind == "layer_norm":
            scaled_hd = scaled_hd - scaled_hd.mean(1, keepdim=True)
        centre_h = w_hd @ norm.offset + (0 if bias_h is None else bias_h.double().cpu())
        radius_h = len(norm.gain) ** 0.5 * scaled_hd.norm(dim=1)
        slack_h = 1e-9 * (1 + centre_h.abs() + radius_h + w_hd.abs() @ norm.offset.abs())
        margin = min(margin, float((centre_h - radius_h - slack_h).min()) - least)
    return margin


def _search(
    networks: Sequence[FeedForward], norms: Sequence[Norm | str], modules: dict[str, nn.Module], doubts: list[str]
) -> tuple[Verdict, list[str]]:
    for network, norm in zip(networks, norms, strict=True):
        if isinstance(norm, str):
            doubts.append(f"{network.names['up']} is fed by {norm}: no norm, so reachable inputs are not known")
        elif not _antichain(norm):
            function, num_outputs = _function(network, modules)
            if found := find_witness(function, norm, num_outputs):
                where = f"the feed-forward network of {network.block}"
                falls = f"output {found.output} falls by {found.drop:.3g} although no input falls"
                return "violated", [*doubts, f"{where}: {falls} (ordered pair of reachable inputs, checked in fp64)"]
    return "empirical", [*doubts, "a search for an ordered pair out of order found none, which is not a proof"]


def _function(network: FeedForward, modules: dict[str, nn.Module]) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the map that the claim is about, with its weights in fp64, and the number of its outputs."""
    if network.names["down"] not in modules:
        return network.hidden, matrix(network.up).shape[0]
    return network, matrix(network.down).shape[0]


def _map(network: FeedForward, modules: dict[str, nn.Module]) -> str:
    hidden = "σ(W1 u + b1)" if network.gate is None else "(σ(W_gate u) ⊙ W1 u)"
    whole = network.names["down"] in modules
    return f"u ↦ W2 {hidden} + b2" if whole else f"u ↦ {hidden}"


def _hash(modules: dict[str, nn.Module], norms: Sequence[Norm | str]) -> str:
    """Return a hash of everything the claim depends on, the same in memory and from disk."""
    digest = hashlib.sha256()
    tensors: dict[str, Tensor | None] = {}
    for name, module in modules.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = matrix(module), bias_of(module)
    for norm in norms:
        if isinstance(norm, Norm):
            tensors[f"{norm.name}.gain"], tensors[f"{norm.name}.offset"] = norm.gain, norm.offset
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor is not None:
            if tensor.dtype != torch.float64:  # a folder's halves are read as fp32
                tensor = tensor.float()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
