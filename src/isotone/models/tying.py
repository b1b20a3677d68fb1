"""Gives a model an output embedding of its own, where it shares the input's."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel


def untie_head(model: PreTrainedModel) -> Callable[[], None]:
    """Give a model, in place, a head with weights of its own; its function stays the same.

    What is saved afterwards has both matrices, and a configuration that says so. Nothing is done where they are two
    already, or where there is no head.

    Returns:
        What ties them again, and takes back what was changed since in the head.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return lambda: None
    shared, names = head.weight, getattr(model, "all_tied_weights_keys", {})
    head.weight = nn.Parameter(shared.detach().clone())  # type: ignore[operator, union-attr]
    model.config.tie_word_embeddings = False
    # what an export leaves out, as loading ties it again
    model.all_tied_weights_keys = {k: v for k, v in names.items() if model.get_parameter(k) is not head.weight}  # type: ignore[assignment]

    def undo() -> None:
        head.weight, model.config.tie_word_embeddings = shared, True
        model.all_tied_weights_keys = names  # type: ignore[assignment]

    return undo
