"""Named combinations of parametrization, initialization, precision, and what helps a model to recover.

Imports no torch, and knows no configuration: values stand here as an experiment file has them, and are checked there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from isotone.constraint.architectures import Architecture
from isotone.errors import UsageError

ModelKind = Literal["layer_norm", "rms_norm", "rotatable"]
"""What a recipe's meaning depends on: the norm before the networks, and whether the stream can be rotated."""


@dataclass(frozen=True)
class Recipe:
    """How an arm is constrained, as a whole."""

    parametrization: str
    initialization: str
    constraint: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of ``constraint``, such as ``activation``, ``anneal`` or ``layers``, where the arm gives none."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``arms.NAME.training``, such as ``distill``, where the arm gives none; before the experiment's own."""
    pure_bf16: bool = False
    """Masters, weights and optimizer in bf16, as the published Pythia runs had them: weights near 0 do not move."""

    @property
    def adds(self) -> bool:
        """Whether it says more than how weights are kept, where they start and in which precision."""
        return bool(self.constraint or self.training)


_AS_PUBLISHED: dict[str, Any] = {"distill": {}}
"""Nothing is distilled, whatever the experiment's ``training`` says: the paper trained on the plain loss."""

_PUBLISHED = Recipe("softplus", "absolute", training=_AS_PUBLISHED)
_PUBLISHED_BF16 = Recipe("softplus", "absolute", pure_bf16=True, training=_AS_PUBLISHED)

_DISTILLED: dict[str, Any] = {"distill": {"logits": 1.0, "weight": 0.9}}

RECIPES: dict[str, dict[ModelKind, Recipe]] = {
    "published": {"layer_norm": _PUBLISHED, "rms_norm": _PUBLISHED, "rotatable": _PUBLISHED},
    "published_bf16": {"layer_norm": _PUBLISHED_BF16, "rms_norm": _PUBLISHED_BF16, "rotatable": _PUBLISHED_BF16},
    "recommended": {
        "layer_norm": Recipe("scaled_softplus", "shift"),
        "rms_norm": Recipe("projection", "nnls", training=_DISTILLED),
        "rotatable": Recipe("projection", "rotated_nnls", training=_DISTILLED),
    },
}
"""``published`` is 2602.02686 with fp32 masters; ``published_bf16`` is the same as it was run on Pythia."""


FIXED = ("published", "published_bf16")
"""Recipes that will mean the same for ever, so that their name says it all; what others mean is written out."""

CALIBRATED_SHIFT_REFUSED = (
    "calibrate: shift starts from exactly the original model, which a calibration would only take away; leave "
    "calibrate out, or give another initialization"
)
"""Why an exact start is not calibrated, with the key."""

CALIBRATED_ROTATION_REFUSED = (
    "calibrate: rotated_nnls has means and variances fitted already, in a basis of its own, in which those of the "
    "original mean nothing; leave calibrate out, or give another initialization"
)
"""The same of a rotated start."""

ROTATED = "rotated_nnls"
"""The initialization that brings the whole model into another basis of its residual stream."""

CALIBRATION_REFUSED = {"shift": CALIBRATED_SHIFT_REFUSED, ROTATED: CALIBRATED_ROTATION_REFUSED}
"""Initializations that are not calibrated, and why."""


def kind_of_model(architecture: Architecture, width: int) -> ModelKind:
    """Return what a recipe's meaning depends on, of a model of an architecture with this width of the stream."""
    if architecture.norm == "layer_norm":
        return "layer_norm"
    return "rotatable" if architecture.rotatable and width % 2 == 0 else "rms_norm"


def resolve_recipe(name: str, kind: ModelKind) -> Recipe:
    """Return what a recipe's name means for a kind of model.

    Raises:
        UsageError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UsageError(f"constraint.recipe: there is no recipe {name!r}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name][kind]
