"""Put a monotone activation into feed-forward networks, and say in the model's configuration what has become of it.

``relu`` in every block is something that transformers has a name for, and config.json says just that. What it has no
name for (``monotone_gelu``, or two activations in one model) is marked there: the usual key then holds a name that
transformers refuses, so that it cannot compute another function unnoticed, and ``isotone.load_model`` reads the mark.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from isotone.constraint.activations import MONOTONE
from isotone.constraint.architectures import Architecture, architecture_of, row_name
from isotone.constraint.feed_forward import architecture_of_model, feed_forwards
from isotone.constraint.layers import Layers
from isotone.errors import UsageError

MARK = "isotone_activation"
"""Key of config.json: ``name``, ``layers`` (indices; null: all) and ``elsewhere``, what the usual key held before."""


def replace_activation(model: PreTrainedModel, name: str, layers: Layers | None = None) -> Callable[[], None]:
    """Replace the activation of the feed-forward networks in the given blocks, in the model and in its configuration.

    Returns:
        What undoes it.

    Raises:
        UsageError: an unknown name, a block that is not there, an architecture whose activation is fixed in its code,
            or a model that has been given another activation in other blocks.
    """
    if name not in MONOTONE:
        raise UsageError(f"constraint.activation: {name!r} is unknown; allowed: {', '.join(MONOTONE)}")
    architecture, config = architecture_of_model(model), model.config
    if not hasattr(config, architecture.activation_key):
        raise UsageError(
            f"constraint.activation: the activation of {architecture.model_type} is fixed in its code; its config.json "
            f"cannot name another one"
        )
    networks = feed_forwards(model)
    blocks = [network.block for network in networks]
    chosen = {blocks.index(network.block) for network in feed_forwards(model, layers)}
    elsewhere, replaced = getattr(config, architecture.activation_key), set[int]()
    if mark := getattr(config, MARK, None):
        elsewhere, replaced = mark["elsewhere"], set(range(len(blocks)) if mark["layers"] is None else mark["layers"])
        if mark["name"] != name and replaced - chosen:
            raise UsageError(
                f"constraint.activation: the arm starts from a model with {mark['name']} in blocks "
                f"{sorted(replaced - chosen)}; give it the same activation, or constrain those blocks, too"
            )
    modules = {networks[index].activation_path: networks[index].activation for index in chosen}
    named = {key: getattr(config, key, None) for key in (architecture.activation_key, MARK)}

    def undo() -> None:
        for place, module in modules.items():
            model.set_submodule(place, module)
        _mark(config, architecture, named[architecture.activation_key], named[MARK])

    for place in modules:
        model.set_submodule(place, MONOTONE[name]())
    indices = sorted(chosen | replaced)
    whole = len(indices) == len(blocks)
    if name == "relu" and (whole or elsewhere == "relu"):
        _mark(config, architecture, name, None)
    else:
        mark = {"name": name, "layers": None if whole else indices, "elsewhere": elsewhere}
        _mark(config, architecture, f"isotone:{name}", mark)
    return undo


def take_mark(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the mark of a configuration, which then names what transformers can build; None where there is none.

    Raises:
        UsageError: it is not a mark that this isotone understands.
    """
    mark = getattr(config, MARK, None)
    if mark is None:
        return None
    if not isinstance(mark, dict) or mark.keys() != {"name", "layers", "elsewhere"} or mark["name"] not in MONOTONE:
        raise UsageError(f"model.source: config.json has {MARK} {mark!r}, which this isotone does not understand")
    architecture = architecture_of(row_name(config.model_type, getattr(config, "feed_forward_proj", None)))
    _mark(config, architecture, mark["elsewhere"], None)
    return mark


def activations_of(model: PreTrainedModel) -> list[type[nn.Module]]:
    """Return the class of each feed-forward network's activation, first block first."""
    return [type(network.activation) for network in feed_forwards(model)]


def _mark(config: PretrainedConfig, architecture: Architecture, name: str | None, mark: dict[str, Any] | None) -> None:
    setattr(config, architecture.activation_key, name)
    if mark is not None:
        setattr(config, MARK, mark)
    elif hasattr(config, MARK):
        delattr(config, MARK)
