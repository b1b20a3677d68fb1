"""Brings a model to a given clean loss by damaging it in one number: the controls at matched loss.

A model that has become worse is also moved less by edits, so robustness is compared at equal loss only. Each damage
here is a family of models with one parameter in which the loss grows, and ``match`` bisects it.

Shapes: B documents, L tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.attacks.scoring import Target, frozen
from isotone.constraint.feed_forward import constrained_modules
from isotone.constraint.layers import Layers
from isotone.determinism import stream_key
from isotone.models.tying import untie_head
from isotone.pairs import PairLayout
from isotone.records import JsonLines

TOLERANCE = 0.01
"""Nats per scored token within which a loss counts as matched."""

_AIM = 0.001
"""Where the bisection ends: an evaluation is cheap, and what is left of the difference is in every comparison."""

_DOUBLINGS, _HALVINGS = 20, 40


@dataclass(frozen=True)
class Match:
    """How near a family of models comes to a loss.

    Attributes:
        parameter: of the nearest model found.
        reached: its loss, nats per scored token; None where it is not finite.
        reason: why the loss is not matched; empty where it is.
        evaluations: how many models were measured.
    """

    parameter: float
    reached: float | None
    reason: str
    evaluations: int


def is_matched(loss: float, target: float) -> bool:
    """Tell whether a loss is within the tolerance of another; what is not finite never is."""
    return abs(loss - target) <= TOLERANCE


def match(loss: Callable[[float], float], target: float, first: float, step: float) -> Match:
    """Find the parameter at which a loss that grows with it meets a target: doubled steps, then bisection.

    Args:
        loss: of a parameter; must be deterministic.
        target: nats per scored token.
        first: smallest parameter, that of the undamaged model.
        step: first step beyond it.
    """
    seen: dict[float, float] = {}

    def measured(parameter: float) -> float:
        seen[parameter] = loss(parameter)
        return seen[parameter]

    def nearest(reason: str) -> Match:
        parameter = min(seen, key=lambda p: _distance(seen[p], target))
        reached = seen[parameter]
        matched = is_matched(reached, target)
        return Match(parameter, reached if math.isfinite(reached) else None, "" if matched else reason, len(seen))

    at_first = measured(first)
    if not math.isfinite(target):
        return nearest("the loss to be met is not a finite number")
    if not at_first < target:
        return nearest(f"the loss is {at_first:.4f} before anything is changed, and that is too high already")
    low = high = first
    for doubling in range(_DOUBLINGS):
        high = first + step * 2**doubling
        if not measured(high) < target:  # what is not finite is too much damage
            break
        low = high
    else:
        return nearest(f"the loss stays at {seen[high]:.4f} and below, up to a parameter of {high:g}")
    for _ in range(_HALVINGS):
        if _distance(min(seen.values(), key=lambda nll: _distance(nll, target)), target) <= _AIM:
            break
        middle = (low + high) / 2
        if measured(middle) < target:
            low = middle
        else:
            high = middle
    return nearest(f"the loss jumps past it near a parameter of {high:g}")


def bisect(
    damage: "Temperature | Noise | Interpolation",
    measure: Callable[[], float],
    target: float,
    log: JsonLines,
    before: Callable[[int], None] = lambda known: None,
    after: Callable[[int, float], None] = lambda known, nll: None,
) -> Match:
    """Bisect a damage, and leave the model as the nearest one found.

    Args:
        damage: of the model that is measured.
        measure: the model's loss as it stands.
        target: nats per scored token.
        log: what was measured; a process before this one may have begun it.
        before: called with how many models are measured before each one is looked at; may raise.
        after: called with how many are measured now, and the last one's loss.
    """
    known = {line["parameter"]: line["nll"] for line in log.read()}

    def loss(parameter: float) -> float:
        before(len(known))
        if parameter not in known:
            damage.apply(parameter)
            nll = measure()
            known[parameter] = nll if math.isfinite(nll) else None
            log.append({"parameter": parameter, "nll": known[parameter]})
            after(len(known), nll)
        return math.nan if known[parameter] is None else known[parameter]

    found = match(loss, target, damage.first, damage.step)
    damage.apply(found.parameter)
    return found


def matched_entry(found: Match, target: float) -> dict[str, Any]:
    """Return what results say of a match; what is not finite is None."""
    aim = target if math.isfinite(target) else None
    return {
        "target": aim,
        "reached": found.reached,
        "difference": None if found.reached is None or aim is None else found.reached - aim,
        "tolerance": TOLERANCE,
        "reachable": not found.reason,
        "reason": found.reason,
        "parameter": found.parameter,
        "evaluations": found.evaluations,
    }


def clean_nll(
    model: nn.Module, ids_BL: Tensor, scored: slice, batch_documents: int, pairs: PairLayout | None = None
) -> float:
    """Return the mean loss of the scored tokens of documents that nobody attacks, nats per token.

    Args:
        model: a causal or encoder-decoder language model in fp32.
        ids_BL: the documents, cut to the attacks' protocol.
        scored: the positions whose losses count.
        batch_documents: documents in one forward pass; part of the result, as batches fix the rounding.
        pairs: how rows are divided that an encoder-decoder model reads.
    """
    with frozen(model):
        target = Target(model, scored, batch_documents, pairs)
        nats_B = torch.cat([target.around(part_BL).nats(part_BL) for part_BL in ids_BL.split(batch_documents)])
    num_scored = ids_BL[:, scored].numel() if pairs is None else int((ids_BL[:, scored] != pairs.pad).sum())
    return float(nats_B.sum()) / num_scored


class Temperature:
    """The same model with its logits divided by T, by way of its output head, so that it exports as a plain model.

    A head that shares its weights with the input embedding gets its own; a cap on the logits is divided as well:
    cap·tanh(z/cap)/T = (cap/T)·tanh((z/T)/(cap/T)).
    """

    first, step = 1.0, 0.25

    def __init__(self, model: PreTrainedModel):
        self._model = model
        untie_head(model)
        head = model.get_output_embeddings()
        self._parts = [p for p in (head.weight, head.bias) if p is not None]  # type: ignore[union-attr]
        self._undivided = [part.detach().clone() for part in self._parts]  # type: ignore[union-attr, operator]
        self._cap: float | None = getattr(model.config, "final_logit_softcapping", None)

    @torch.no_grad()
    def apply(self, parameter: float) -> None:
        """Divide the logits by T."""
        for part, undivided in zip(self._parts, self._undivided, strict=True):
            torch.div(undivided, parameter, out=part)  # type: ignore[arg-type, call-overload]
        if self._cap is not None:
            self._model.config.final_logit_softcapping = self._cap / parameter


class Noise:
    """W + λ·std(W)·ξ on the matrices of a scope, with one standard normal ξ for all λ.

    Args:
        model: the undamaged model.
        scope: the projections that get noise.
        seed: the run's.
        draw: number of ξ.
        layers: the blocks whose projections do; None: all.
    """

    first, step = 0.0, 1 / 64

    def __init__(self, model: PreTrainedModel, scope: str, seed: int, draw: int, layers: Layers | None = None):
        modules = constrained_modules(model, scope, layers)
        self._weights: list[Tensor] = [m.weight.data for m in modules.values()]  # type: ignore[misc, union-attr]
        self._clean = [weight.clone() for weight in self._weights]
        self._keys = [stream_key(seed, "matched_noise", draw, number) for number in range(len(self._weights))]

    @torch.no_grad()
    def apply(self, parameter: float) -> None:
        """Set the strength λ of the noise."""
        for weight, clean, key in zip(self._weights, self._clean, self._keys, strict=True):
            xi = torch.randn(clean.shape, generator=torch.Generator().manual_seed(key))  # drawn anew: it is large
            weight.copy_(clean + parameter * clean.std() * xi.to(clean.device))


class Interpolation:
    """Between two checkpoints of one training: the share of the earlier one.

    Args:
        model: of the checkpoints' architecture, in fp32.
        earlier: weights by name, with the higher loss.
        later: weights by name.
    """

    first, step = 0.0, 1.0

    def __init__(self, model: PreTrainedModel, earlier: Mapping[str, Tensor], later: Mapping[str, Tensor]):
        self._model, self._earlier, self._later = model, earlier, later

    @torch.no_grad()
    def apply(self, parameter: float) -> None:
        """Set the share of the earlier checkpoint; 0 and 1 give the checkpoints themselves."""
        for name, weight in self._model.named_parameters():
            earlier, later = (w[name].to(weight.device, weight.dtype) for w in (self._earlier, self._later))
            weight.copy_(torch.lerp(later, earlier, parameter))


def divide_logits(model: PreTrainedModel, temperature: float) -> None:
    """Divide a model's logits by a temperature, for good."""
    Temperature(model).apply(temperature)


def _distance(loss: float, target: float) -> float:
    return abs(loss - target) if math.isfinite(loss) else math.inf
