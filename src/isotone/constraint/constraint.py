"""The constraint on a model: masters V beside the weights, whose effective values W stay in the modules.

``module.weight`` stays a parameter that holds W, so ``state_dict`` and ``save_pretrained`` are right at any moment.
What the optimizer holds is V: gradients are pulled back from W to V before its step, and W is written from V after it.
"""

import copy
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isotone.constraint.architectures import projections_of
from isotone.constraint.calibration import calibrated_shift, require_enough
from isotone.constraint.feed_forward import (
    architecture_of_model,
    constrained_modules,
    feed_forwards,
    matrix,
    require_finite,
)
from isotone.constraint.initialization import FITTED, absolute, margin_for, relu, require_pair
from isotone.constraint.journal import Journal
from isotone.constraint.layers import Layers, resolve_layers
from isotone.constraint.moments import match_moments
from isotone.constraint.nnls import Fit, nnls
from isotone.constraint.parametrization import (
    PARAMETRIZATIONS,
    STEPS,
    Annealed,
    Parametrization,
    Projection,
    Scale,
)
from isotone.constraint.recipes import CALIBRATION_REFUSED, ROTATED
from isotone.constraint.replacement import replace_activation
from isotone.constraint.rotation import rotate
from isotone.constraint.shift import shift
from isotone.errors import IsotoneError, UsageError
from isotone.models.tying import untie_head
from isotone.pairs import PairLayout

ATTRIBUTE = "isotone_constraint"
"""Attribute of a constrained model that holds its ``Constraint``."""

_SCALE = ".scale"


class Constraint:
    """Masters V of the constrained weights, and the two moves of a training step.

    A step is: backward (any number of micro-batches) → ``pull_back()`` → clip and ``optimizer.step()`` → ``push()``, or
    ``advance(step, total_steps)`` if it is annealed. ``attach(optimizer)`` does the moves by hooks where nothing has to
    happen in between.

    Attributes:
        scope: which projections are constrained.
        parametrization: how they are kept non-negative.
        initialization: where they started.
        layers: indices of the blocks in which they are constrained; None: in all.
        step: ``raw``, or ``matched``: masters move so that weights move as far as they would under ``projection``.
        anneal: share of all steps in which the constraint comes, as W = W⁺ − λW⁻ with λ from 1 to 0; None: at once.
        fits: how well ``nnls`` or ``rotated_nnls`` fitted each module, by its full path; empty after other starts, and
            when restored.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        scope: str,
        parametrization: str,
        initialization: str,
        master_dtype: torch.dtype | None = None,
        layers: tuple[int, ...] | None = None,
        step: str = "raw",
        anneal: float | None = None,
    ):
        self.scope, self.parametrization, self.initialization = scope, parametrization, initialization
        self.layers, self.step, self.anneal = layers, step, anneal
        self._before: dict[str, Tensor] = {}  # masters as they were before a matched step, from pull_back to push
        self.fits: dict[str, Fit] = {}
        self._map: Parametrization = PARAMETRIZATIONS[parametrization] if anneal is None else Annealed()
        self._weights = dict(weights)
        self._masters: dict[str, nn.Parameter] = {}
        self._scales: dict[str, Scale] = {}
        for name, weight in self._weights.items():
            if isinstance(self._map, Projection):
                self._masters[name], self._scales[name] = weight, self._map.scale_for(weight.detach())
                continue
            dtype = master_dtype or torch.promote_types(weight.dtype, torch.float32)
            v, self._scales[name] = self._map.inverse(weight.detach().to(dtype))
            self._masters[name] = nn.Parameter(v)
        self.push()

    def __repr__(self) -> str:
        return (
            f"Constraint(scope={self.scope!r}, parametrization={self.parametrization!r}, "
            f"initialization={self.initialization!r}, num_weights={sum(w.numel() for w in self._weights.values())})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the constrained weights, ``<module>.weight``, first block first."""
        return tuple(self._weights)

    def parameters(self) -> list[nn.Parameter]:
        """Return the masters V (the weights themselves under ``projection``), in the order of ``names``."""
        return list(self._masters.values())

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what an optimizer must hold, by name: V in the place of each constrained W, the rest as it is."""
        return {name: self._masters.get(name, p) for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def pull_back(self) -> None:
        """Turn the summed gradients of the weights into gradients of the masters; once a step, before clipping."""
        if isinstance(self._map, Projection):
            return
        for name, master in self._masters.items():
            weight = self._weights[name]
            if weight.grad is None:
                master.grad = None
                continue
            master.grad = weight.grad.to(master.dtype)  # the same memory where the dtypes agree
            weight.grad = None
            if self.step == "matched":  # the optimizer sees the gradients of W, push() turns its step into one of V
                self._before[name] = _own(master).clone()
                continue
            self._map.pull_back_(_own(master.grad), _own(master), self._scales[name])

    @torch.no_grad()
    def push(self) -> None:
        """Write W = map(V) into the modules; once a step, after the optimizer's."""
        for name, master in self._masters.items():
            v, w = _own(master), _own(self._weights[name])
            if name in self._before:
                self._map.match_step_(self._before.pop(name), v, self._scales[name])
            if w.dtype == v.dtype:
                self._map.apply_(v, w, _own_scale(self._scales[name]))
            else:
                effective = torch.empty_like(v)
                self._map.apply_(v, effective, _own_scale(self._scales[name]))
                w.copy_(effective)

    @property
    def description(self) -> dict[str, Any]:
        """Return what checkpoints, records and config.json say about it; what it has none of is left out."""
        said = {
            "scope": self.scope,
            "parametrization": self.parametrization,
            "initialization": self.initialization,
            "layers": None if self.layers is None else list(self.layers),
            "anneal": self.anneal,
            "step": None if self.step == "raw" else self.step,
        }
        return {key: value for key, value in said.items() if value is not None}

    @property
    def slack(self) -> float:
        """λ now: how much of what is below 0 is still there; 0 where the constraint holds."""
        return float(next(iter(self._scales.values()))) if isinstance(self._map, Annealed) else 0.0

    def first_strict_step(self, total_steps: int) -> int:
        """Return after how many steps of a training the constraint holds, and from then on."""
        return 0 if self.anneal is None else math.ceil(Fraction(str(self.anneal)) * total_steps)

    @torch.no_grad()
    def advance(self, step: int, total_steps: int) -> None:
        """Do what ``push`` does after the optimizer's step that makes ``step`` of ``total_steps``, and lower λ.

        λ is 1 − step / n over the first n = ⌈anneal · total_steps⌉ steps.
        """
        before = self.slack
        if isinstance(self._map, Annealed) and before > 0:
            slack = max(0.0, 1 - step / self.first_strict_step(total_steps))
            for name, weight in self._weights.items():
                self._map.shrink_(_own(weight), slack / before)
                self._scales[name] = slack
        self.push()

    def to(self, device: torch.device | str) -> "Constraint":
        """Move the masters; call it beside ``model.to(device)``, before an optimizer is made."""
        for master in self._masters.values():
            master.data = master.data.to(device)
        for name, scale in self._scales.items():
            self._scales[name] = scale.to(device) if isinstance(scale, Tensor) else scale
        return self

    def follow(self, weights: Mapping[str, nn.Parameter], divide: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Go on with weights that were divided over processes, and divide the masters like them.

        Args:
            weights: the model's parameters by name, after they were divided.
            divide: called with a whole master and its divided weight; returns the divided master.
        """
        for name in self._weights:
            weight = self._weights[name] = weights[name]
            is_weight = isinstance(self._map, Projection)
            v = self._masters[name].detach()
            self._masters[name] = weight if is_weight else nn.Parameter(divide(v, weight))
            scale = self._scales[name]
            self._scales[name] = divide(scale, weight) if isinstance(scale, Tensor) else scale

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every step of an optimizer pull back before it and push after it.

        Raises:
            UsageError: the constraint is annealed, and an optimizer does not know how far its training has come.
        """
        if self.anneal is not None:
            raise UsageError("constraint.anneal: call advance(step, total_steps) after each step; attach() cannot")
        optimizer.register_step_pre_hook(lambda *_: self.pull_back())
        optimizer.register_step_post_hook(lambda *_: self.push())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masters by name, and each one's scale under NAME.scale (fp64 scalar; frozen signs: int8)."""
        scales = {
            name + _SCALE: s if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.float64)
            for name, s in self._scales.items()
        }
        return {name: m.detach() for name, m in self._masters.items()} | scales

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take masters and scales from ``state_dict()`` of the same constraint and write the weights.

        Raises:
            IsotoneError: names, shapes or dtypes are not this constraint's; names the first that differs.
        """
        expected = self.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            old, new = expected.get(name), state.get(name)
            if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
                found = "missing" if new is None else "unexpected" if old is None else f"{tuple(new.shape)} {new.dtype}"
                raise IsotoneError(f"saved constraint does not fit this model: {name} is {found}")
        for name, master in self._masters.items():
            master.copy_(state[name])
            scale, now = state[name + _SCALE], self._scales[name]
            self._scales[name] = scale.to(now.device, copy=True) if isinstance(now, Tensor) else float(scale)
        self.push()

    def holds(self) -> bool:
        """Return whether every effective weight is finite and on its side of 0 (softplus may round to 0 far below).

        While the constraint is annealed there is no such side yet.
        """
        if self.slack > 0:
            return all(bool(torch.isfinite(_own(weight)).all()) for weight in self._weights.values())
        for name, weight in self._weights.items():
            w, scale = _own(weight), _own_scale(self._scales[name])
            side = w * scale if isinstance(scale, Tensor) else w
            if not bool(((side >= 0) & torch.isfinite(w)).all()):
                return False
        return True


def constrain(
    model: PreTrainedModel,
    scope: str = "mlp_both",
    parametrization: str = "scaled_softplus",
    initialization: str = "absolute",
    generator: torch.Generator | None = None,
    *,
    calibration_rows_NL: Tensor | None = None,
    pairs: PairLayout | None = None,
    master_dtype: torch.dtype | None = None,
    will_train: bool = True,
    layers: Layers | None = None,
    activation: str | None = None,
    anneal: float | None = None,
    weights_follow: bool = False,
    calibrate: bool = False,
    step: str = "raw",
    journal: Journal | None = None,
) -> Constraint:
    """Make the feed-forward weights of a model non-negative, and keep them so while it is trained.

    The model is changed in place: its weights become the effective ones, and ``fold(model)`` later drops the rest.

    Args:
        model: a language model of an architecture in the table.
        scope: which projections are constrained.
        parametrization: how a weight is kept non-negative.
        initialization: where the constrained weights start.
        generator: draws the random tokens on which ``shift`` is verified; keyed by 0 unless given.
        calibration_rows_NL: token ids that ``calibrated_shift``, ``nnls`` and ``rotated_nnls`` are fitted on.
        pairs: how these rows lie, where the model is an encoder-decoder.
        master_dtype: dtype of V; fp32, or the weights' own if wider, unless given (``published_bf16`` gives bf16).
        will_train: whether training follows; ``shift`` then refuses a model with dropout.
        layers: the blocks in which weights are constrained: indices, ``first:N``, ``last:N`` or a slice; None: all.
        activation: ``relu`` or ``monotone_gelu``, put in the place of the activation in these blocks; None: kept.
        anneal: share of a training's steps in which the constraint comes; of ``projection`` from ``unchanged`` weights.
        weights_follow: a checkpoint's weights will be loaded next, so nothing is fitted on calibration text.
        calibrate: match means and variances of units and outputs after the start, on ``calibration_rows_NL``.
        step: ``raw``, or ``matched``: see ``Constraint``.
        journal: keeps what is fitted on calibration text as it is made, so that a kill does not start it over.

    Returns:
        The constraint, also kept at ``model.isotone_constraint``.

    Raises:
        UsageError: unknown architecture or name, a scope that matches nothing, a pair that does not fit, or a model
            that does not meet the conditions of the initialization. The model is then as it was.
    """
    require_pair(parametrization, initialization, anneal)
    if calibrate and initialization in CALIBRATION_REFUSED:
        raise UsageError(f"constraint.{CALIBRATION_REFUSED[initialization]}")
    if step not in STEPS:
        raise UsageError(f"constraint.step: {step!r} is unknown; allowed: {', '.join(STEPS)}")
    projections_of(architecture_of_model(model), scope)
    if hasattr(model, ATTRIBUTE):
        raise UsageError("constraint: the model is constrained already; fold it first")
    modules, networks = constrained_modules(model, scope, layers), feed_forwards(model, layers)
    if not weights_follow:
        require_finite(model)
        if (initialization in FITTED or calibrate) and model.config.is_encoder_decoder and pairs is None:
            raise UsageError("constraint: an encoder-decoder is fitted on pairs; give pairs, how the rows are laid out")
    undo = replace_activation(model, activation, layers) if activation is not None else lambda: None
    fits: dict[str, Fit] = {}
    if initialization == ROTATED and weights_follow:
        untie_head(model)  # as the weights have it that come
    originals = copy.deepcopy(networks) if calibrate and not weights_follow else []
    try:
        if originals:
            require_enough(calibration_rows_NL, modules, "calibrate", pairs)
        if initialization == "shift":
            shift(model, networks, modules, margin_for(parametrization), will_train, generator)
        elif initialization in FITTED and not weights_follow:
            rows_NL = require_enough(calibration_rows_NL, modules, initialization, pairs)
            if initialization in ("nnls", ROTATED):
                basis = None
                if initialization == ROTATED:
                    basis = rotate(model, networks, modules, rows_NL, generator, journal)
                fits = nnls(model, networks, modules, rows_NL, pairs, journal, basis)
            else:
                calibrated_shift(model, networks, modules, rows_NL, margin_for(parametrization), pairs, journal)
        elif initialization != "unchanged":
            _start_each(modules, initialization, PARAMETRIZATIONS[parametrization].contains_zero)
        if originals and calibration_rows_NL is not None:
            again = journal and journal.part("calibrate")
            match_moments(model, networks, originals, modules, calibration_rows_NL, pairs, again)
    except UsageError:
        undo()
        raise
    weights: dict[str, nn.Parameter] = {f"{name}.weight": m.weight for name, m in modules.items()}  # type: ignore[misc]
    chosen = resolve_layers(layers, len(feed_forwards(model))) if layers is not None else None
    constraint = Constraint(weights, scope, parametrization, initialization, master_dtype, chosen, step, anneal)
    constraint.fits = fits
    _remember(model, constraint)
    return constraint


def _own(tensor: Tensor) -> Tensor:
    """Return the data of a tensor, or this process's part of it: the maps work on single entries."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.data


def _own_scale(scale: Scale) -> Scale:
    return _own(scale) if isinstance(scale, Tensor) else scale


@torch.no_grad()
def _start_each(modules: Mapping[str, nn.Module], initialization: str, contains_zero: bool) -> None:
    for module in modules.values():
        w = matrix(module)
        w.copy_(relu(w) if initialization == "relu" else absolute(w, contains_zero))


def _remember(model: PreTrainedModel, constraint: Constraint) -> None:
    setattr(model, ATTRIBUTE, constraint)
    model.config.isotone = constraint.description
