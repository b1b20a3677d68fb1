"""Drop the constraint from a model: its weights are the very tensors that ``forward`` used."""

from typing import TypeVar

from transformers import PreTrainedModel

from isotone.constraint.constraint import ATTRIBUTE, Constraint
from isotone.errors import IsotoneError

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def fold(model: ModelT) -> ModelT:
    """Return the same model without its constraint; a model that has none is returned as it is.

    No weight is computed or copied: the modules hold the effective values already. What the constraint was stays in
    ``config.isotone``, so that an exported folder says which scope its certificate is about.

    Raises:
        IsotoneError: a weight left the constraint (something changed it without ``push``).
    """
    constraint: Constraint | None = getattr(model, ATTRIBUTE, None)
    if constraint is None:
        return model
    if not constraint.holds():
        raise IsotoneError(
            "fold: a constrained weight is negative or not finite, or has left its frozen sign; push() was not called "
            "after a step"
        )
    delattr(model, ATTRIBUTE)
    for parameter in model.parameters():
        parameter.grad = None
    return model
