"""Named combinations of parametrization, initialization and precision."""

from dataclasses import dataclass

from isotone.constraint.architectures import NormKind
from isotone.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How an arm is constrained, as a whole."""

    parametrization: str
    initialization: str
    pure_bf16: bool = False
    """Masters, weights and optimizer in bf16, as the published Pythia runs had them: weights near 0 do not move."""


_PUBLISHED = Recipe("softplus", "absolute")

RECIPES: dict[str, dict[str, Recipe]] = {
    "published": {"layer_norm": _PUBLISHED, "rms_norm": _PUBLISHED},
    "published_bf16": {
        "layer_norm": Recipe("softplus", "absolute", pure_bf16=True),
        "rms_norm": Recipe("softplus", "absolute", pure_bf16=True),
    },
    "recommended": {
        "layer_norm": Recipe("scaled_softplus", "shift"),
        "rms_norm": Recipe("projection", "relu"),
    },
}
"""``published`` is 2602.02686 with fp32 masters; ``published_bf16`` is the same as it was run on Pythia."""


def resolve_recipe(name: str, norm_kind: NormKind) -> Recipe:
    """Return what a recipe's name means for a model whose feed-forward networks follow this kind of norm.

    Raises:
        UsageError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UsageError(f"constraint.recipe: there is no recipe {name!r}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name][norm_kind]
