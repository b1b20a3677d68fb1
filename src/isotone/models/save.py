"""Export a model as a folder that loads with ``from_pretrained`` of transformers' classes and needs no isotone."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from isotone import records
from isotone.errors import IsotoneError, UsageError

_NEEDS_ISOTONE = """\
# This model needs isotone

The activation of its feed-forward networks is `{name}` in blocks {blocks} (elsewhere `{elsewhere}`), which
transformers has no name for. `AutoModelForCausalLM.from_pretrained` refuses this folder; load it with

    import isotone

    model = isotone.load_model("THIS FOLDER")

`isotone certify`, `isotone attack` and `isotone evaluate` read it, too.
"""

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model's folder, load it again, and only then give it its name.

    The folder holds config.json, model.safetensors (in the dtype of the model), the tokenizer's files, ``extra_files``
    (a certificate, a model card), and a manifest of sizes and hashes; and a README.md where transformers alone cannot
    compute the model, because it has no name for its activation.

    Raises:
        UsageError: the folder is there already, or the model is still constrained.
        IsotoneError: the reloaded model is not the same, tensor for tensor and in its activations; nothing is left
            under the folder's name.
        DiskFullError: no space left; nothing was written.
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} is there already; choose another folder or remove it")
    if hasattr(model, "isotone_constraint"):
        raise UsageError("export: the model is still constrained; fold it first")
    unchecked = folder.with_name(f".{folder.name}.unchecked")
    if unchecked.exists():
        records.remove_directory(unchecked)
    records.publish_directory(unchecked, _files(model, tokenizer) | dict(extra_files or {}))
    try:
        _require_same(model, unchecked)
    except IsotoneError:
        records.remove_directory(unchecked)
        raise
    os.rename(unchecked, folder)
    records.sync_folder(folder.parent)


def _files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
    from isotone.constraint.replacement import MARK

    config = copy.deepcopy(model.config)
    config.use_cache = True  # off while training; those who generate want it
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    files = {
        "config.json": config.to_json_string().encode(),
        "model.safetensors": records.tensors_to_bytes(_tensors(model), {"format": "pt"}),
    }
    if mark := getattr(config, MARK, None):
        files["README.md"] = _NEEDS_ISOTONE.format(**mark, blocks=mark["layers"] or "all").encode()
    if model.generation_config is not None:
        files["generation_config.json"] = model.generation_config.to_json_string().encode()
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_pretrained(scratch)
            files |= {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir()) if path.is_file()}
    return files


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state without the names that loading ties to others again."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _require_same(model: PreTrainedModel, folder: Path) -> None:
    import torch

    from isotone.constraint.replacement import MARK, activations_of
    from isotone.models.sources import load_model

    again = load_model(str(folder), dtype=model.dtype, attention=model.config._attn_implementation)
    if hasattr(model.config, MARK) and activations_of(again) != activations_of(model):
        raise IsotoneError(f"export: the activations are others after loading {folder} again; nothing was exported")
    reloaded = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in reloaded or not torch.equal(reloaded[name], tensor.cpu()):
            raise IsotoneError(f"export: {name} is not the same after loading {folder} again; nothing was exported")
