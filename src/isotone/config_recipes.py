"""What recipes say of an arm beside its start: written into the experiment once the model's kind is known.

So the configuration of a run shows what an arm does, records hash it, and ``plan`` counts it. What an arm gives itself
goes first; a recipe that adds nothing leaves the configuration as it is, to the letter.
"""

from collections.abc import Callable
from typing import Any

from isotone.config import Arm, ArmTraining, Constraint, Experiment, Training
from isotone.constraint.architectures import NormKind
from isotone.constraint.recipes import RECIPES, Recipe, resolve_recipe


def with_recipes(experiment: Experiment, norm_of_model: Callable[[], NormKind]) -> Experiment:
    """Return the experiment with what its arms' recipes add to constraints and training.

    Args:
        experiment: as it was given.
        norm_of_model: finds the kind of norm before the model's feed-forward networks; called only where some recipe
            adds something that depends on it.
    """
    named = {arm.constraint.recipe for arm in experiment.arms.values() if arm.constraint and arm.constraint.recipe}
    if not any(recipe.adds for name in named for recipe in RECIPES[name].values()):
        return experiment
    differ = any(len({repr((r.constraint, r.training)) for r in RECIPES[name].values()}) > 1 for name in named)
    norm: NormKind = norm_of_model() if differ else "layer_norm"
    arms = {name: _with_recipe(arm, experiment.training, norm) for name, arm in experiment.arms.items()}
    return experiment if arms == experiment.arms else Experiment.model_validate({**dict(experiment), "arms": arms})


def _with_recipe(arm: Arm, common: Training, norm: NormKind) -> Arm:
    if arm.constraint is None or arm.constraint.recipe is None:
        return arm
    recipe = resolve_recipe(arm.constraint.recipe, norm)
    changed: dict[str, Any] = {"constraint": _constraint(arm.constraint, recipe)}
    if arm.train:
        changed["training"] = _training(arm.training, common, recipe)
    return arm.model_copy(update=changed)


def _constraint(given: Constraint, recipe: Recipe) -> Constraint:
    defaults = {name: field.default for name, field in Constraint.model_fields.items()}
    added = {k: v for k, v in recipe.constraint.items() if getattr(given, k) == defaults[k]}
    if not given.enforce or given.parametrization or given.initialization:
        added.pop("anneal", None)  # nothing comes where nothing holds; and a given start is not the one that it needs
    return Constraint.model_validate({**given.model_dump(), **added}) if added else given


def _training(given: ArmTraining, common: Training, recipe: Recipe) -> ArmTraining:
    asked = ArmTraining.model_validate(recipe.training)
    added = {
        name: value
        for name, value in asked
        if value is not None and getattr(given, name) is None and value != getattr(common, name)
    }
    return given.model_copy(update=added) if added else given
