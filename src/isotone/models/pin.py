"""Pin a model to the very files that a run starts from, so that no later stage starts from others unnoticed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Model
from isotone.errors import UsageError
from isotone.models.describe import describe
from isotone.models.sources import Source, one_line, refuse_pickles, resolve_source

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What is fetched of a hub repository: configuration, weights and tokenizer; pickles only where they are allowed."""
_TEXTS = (
    "config.json",
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
"""What is pinned of a folder beside its weights: all that decides which tokens a text gets."""


def pin_model(model: Model) -> dict[str, Any]:
    """Fetch a model if it is on the hub, and return what identifies it, without any path of this machine.

    Returns:
        ``source``, ``revision`` (the commit; None where local), ``files`` (name → SHA-256), and the sizes that other
        parts need: ``model_type``, ``vocab_size``, ``context``, ``num_parameters``; ``encoder_decoder`` where it is
        one.

    Raises:
        UsageError: the model cannot be fetched or read.
    """
    at = resolve_source(model.source, model.gguf_file)
    if at.local and at.gguf_file is None and not model.allow_pickle:
        refuse_pickles(at)  # now, and not when the corpus has been packed
    folder = Path(at.location) if at.local else _snapshot(at, model)
    sizes = describe(str(folder / at.gguf_file) if at.gguf_file else str(folder))
    return {
        "source": model.source,
        "revision": None if at.local else folder.name,  # a snapshot's folder is named by its commit
        "files": _hashes(folder, at, model.allow_pickle),
        "model_type": sizes.model_type,
        "vocab_size": sizes.vocab_size,
        "context": sizes.context,
        "num_parameters": sizes.num_parameters,
        **({"encoder_decoder": True} if sizes.encoder_decoder else {}),  # no key in the pins of causal models
    }


def require_pinned(model: Model, pin: Mapping[str, Any]) -> None:
    """Check that the files of a model are those of its pin; hub files are pinned by their commit.

    Raises:
        UsageError: names the first file that is missing, new or different.
    """
    at = resolve_source(model.source, model.gguf_file)
    if not at.local:
        return
    found = _hashes(Path(at.location), at, model.allow_pickle)
    changed = sorted(name for name in found.keys() | pin["files"].keys() if found.get(name) != pin["files"].get(name))
    if changed:
        raise UsageError(
            f"model.source: {changed[0]} of {model.source} is not the file that setup pinned; bring it back, or start "
            "a new run with --fresh"
        )


def _snapshot(at: Source, model: Model) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [at.gguf_file, *_PATTERNS] if at.gguf_file else [*_PATTERNS, *(["*.bin"] if model.allow_pickle else [])]
    with one_line(at):
        return Path(snapshot_download(at.location, revision=model.revision, allow_patterns=patterns))


def _hashes(folder: Path, at: Source, allow_pickle: bool) -> dict[str, str]:
    if at.gguf_file:
        return {at.gguf_file: records.sha256_file(folder / at.gguf_file)}
    weights = [*folder.glob("*.safetensors"), *(folder.glob("*.bin") if allow_pickle else ())]
    files = sorted(path for path in [*weights, *(folder / name for name in _TEXTS)] if path.is_file())
    return {path.name: records.sha256_file(path) for path in files}
