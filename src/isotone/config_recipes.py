"""What recipes say of an arm: written into the experiment once the model's kind is known.

So the configuration of a run shows what an arm does, records hash it, and ``plan`` counts it. What an arm gives itself
goes first. How weights are kept and where they start is not written for the published recipes, whose name says it for
ever; they leave the configuration as it is, to the letter.
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from isotone.config import Arm, ArmTraining, Constraint, Experiment, Training
from isotone.constraint.recipes import FIXED, RECIPES, ModelKind, Recipe, resolve_recipe
from isotone.errors import UsageError


def with_recipes(experiment: Experiment, find_kind: Callable[[], ModelKind]) -> Experiment:
    """Return the experiment with what its arms' recipes say of constraints and training.

    Args:
        experiment: as it was given.
        find_kind: finds the kind of the model; called only where some recipe says something that depends on it.

    Raises:
        UsageError: what an arm gives beside its recipe does not fit what the recipe means for this model.
    """
    named = {arm.constraint.recipe for arm in experiment.arms.values() if arm.constraint and arm.constraint.recipe}
    if not any(name not in FIXED or recipe.adds for name in named for recipe in RECIPES[name].values()):
        return experiment
    differ = any(len({repr(r) for r in RECIPES[name].values()}) > 1 for name in named)
    kind: ModelKind = find_kind() if differ else "layer_norm"
    arms = {name: _with_recipe(name, arm, experiment.training, kind) for name, arm in experiment.arms.items()}
    if arms == experiment.arms:
        return experiment
    try:
        return Experiment.model_validate({**dict(experiment), "arms": arms})
    except ValidationError as error:
        means = f"this is what recipes mean for {experiment.model.source}; an arm's own keys go first"
        raise UsageError(f"{_reason(error)} ({means})") from error


def _with_recipe(name: str, arm: Arm, common: Training, kind: ModelKind) -> Arm:
    if arm.constraint is None or arm.constraint.recipe is None:
        return arm
    recipe = resolve_recipe(arm.constraint.recipe, kind)
    try:
        changed: dict[str, Any] = {"constraint": _constraint(arm.constraint, recipe)}
    except ValidationError as error:
        raise UsageError(
            f"arms.{name}.constraint: recipe {arm.constraint.recipe} is {recipe.parametrization} from "
            f"{recipe.initialization} here; {_reason(error)}"
        ) from error
    if arm.train:
        changed["training"] = _training(arm.training, common, recipe)
    return arm.model_copy(update=changed)


def _reason(error: ValidationError) -> str:
    return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


def _constraint(given: Constraint, recipe: Recipe) -> Constraint:
    defaults = {name: field.default for name, field in Constraint.model_fields.items()}
    added = {k: v for k, v in recipe.constraint.items() if getattr(given, k) == defaults[k]}
    if not given.enforce or given.parametrization or given.initialization:
        added.pop("anneal", None)  # nothing comes where nothing holds; and a given start is not the one that it needs
    if given.recipe not in FIXED and given.anneal is None and "anneal" not in added:
        pair = {"parametrization": recipe.parametrization, "initialization": recipe.initialization}
        added |= {key: value for key, value in pair.items() if getattr(given, key) is None}
    return Constraint.model_validate({**given.model_dump(), **added}) if added else given


def _training(given: ArmTraining, common: Training, recipe: Recipe) -> ArmTraining:
    asked = ArmTraining.model_validate(recipe.training)
    added = {
        name: value
        for name, value in asked
        if value is not None and getattr(given, name) is None and value != getattr(common, name)
    }
    return given.model_copy(update=added) if added else given
