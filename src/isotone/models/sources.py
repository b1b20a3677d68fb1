"""Load a language model and its tokenizer from any source, and refuse in one line what cannot be loaded."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isotone.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from isotone.config import Model

BUNDLED = {
    name: Path(__file__).parent / name.replace("-", "_")
    for name in ("pocket", "pocket-t5", "pocket-arcee", "pocket-gated")
}
"""The bundled models' folders, by the name that ``model.source`` gives them."""

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Source:
    """A source, resolved: what ``from_pretrained`` is given."""

    given: str
    """As the user wrote it."""
    location: str
    """Folder, or name on the hub."""
    gguf_file: str | None
    local: bool


def resolve_source(source: str, gguf_file: str | None = None) -> Source:
    """Tell bundled models, a folder, a GGUF file and a name on the hub apart.

    Raises:
        UsageError: a path that is not there, a folder without config.json, or something that is no model.
    """
    if (bundled := BUNDLED.get(source)) is not None:
        if not (bundled / "config.json").is_file():
            raise UsageError(
                f"model.source: the bundled model {source} is missing from this installation; install isotone again"
            )
        return Source(source, str(bundled), None, True)
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"model.source: there is no file {source}")
        return Source(source, str(path.parent), path.name, True)
    if path.is_dir():
        wanted = gguf_file or "config.json"
        if not (path / wanted).is_file():
            raise UsageError(f"model.source: folder {source} holds no {wanted}, so it is not a model")
        return Source(source, str(path), gguf_file, True)
    if path.exists():
        raise UsageError(f"model.source: {source} is a file; give a folder, a .gguf file, or a name on the hub")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UsageError(f"model.source: there is no folder {source}")
    return Source(source, source, gguf_file, False)


def load_model(
    source: str | Model,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    dropout: float | None = None,
    pin: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a language model, causal or encoder-decoder as its configuration says, in eval mode, without a cache.

    Args:
        source: ``pocket`` or another bundled model, a folder, a ``*.gguf`` file, or a name on the hub; or the
            ``model`` part of an experiment, which brings its own values for the arguments of the same names.
        revision: branch, tag or commit on the hub.
        gguf_file: name of the GGUF file inside the folder or hub repository.
        dtype: of the weights; float32 unless given, ``"auto"``: what its configuration says.
        attention: attention kernel, ``sdpa`` or ``eager``; the faster one that the architecture has, unless given.
        allow_pickle: load ``pytorch_model.bin``, which can execute code.
        trust_remote_code: run Python code that comes with the model.
        dropout: replaces every dropout probability of the configuration, if given.
        pin: what ``pin_model`` returned; only with the ``model`` part of an experiment.

    Raises:
        UsageError: missing, unreadable, of an unknown architecture, with weights missing or left over, with pickles or
            code that were not asked for, or not the pinned files.
    """
    if not isinstance(source, str):
        return load_model(
            source.source,
            revision=_pinned_revision(source, pin),
            gguf_file=source.gguf_file,
            attention=source.attention,
            allow_pickle=source.allow_pickle,
            trust_remote_code=source.trust_remote_code,
            dtype=dtype,
            dropout=dropout,
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from isotone.constraint.replacement import replace_activation, take_mark

    at = resolve_source(source, gguf_file)
    if at.local and not allow_pickle and at.gguf_file is None:
        refuse_pickles(at)
    common = {"revision": revision, "trust_remote_code": trust_remote_code, **_gguf(at)}
    with one_line(at):
        config = AutoConfig.from_pretrained(at.location, **common)
        if dropout is not None:
            _set_dropout(config, dropout)
        mark = take_mark(config)
        family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = family.from_pretrained(
            at.location,
            config=config,
            dtype=torch.float32 if dtype is None else dtype,
            attn_implementation=attention,
            use_safetensors=None if allow_pickle or at.gguf_file else True,
            ignore_mismatched_sizes=True,  # refused below, by name: transformers names none in its error
            output_loading_info=True,
            **common,
        )
    model, loading = loaded
    _require_whole(at, model, loading)
    if mark is not None:
        replace_activation(model, mark["name"], mark["layers"])
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(
    source: str | Model,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    pin: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a source; arguments as in ``load_model``.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if not isinstance(source, str):
        return load_tokenizer(
            source.source,
            revision=_pinned_revision(source, pin),
            gguf_file=source.gguf_file,
            trust_remote_code=source.trust_remote_code,
        )
    from transformers import AutoTokenizer

    at = resolve_source(source, gguf_file)
    with one_line(at, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            at.location, revision=revision, trust_remote_code=trust_remote_code, **_gguf(at)
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one up from config.json
        raise UsageError(f"model.source: {at.given} comes without a tokenizer; put its files (tokenizer.json) there")
    return tokenizer


def _pinned_revision(model: Model, pin: Mapping[str, Any] | None) -> str | None:
    from isotone.models.pin import require_pinned

    if pin is None:
        return model.revision
    require_pinned(model, pin)
    return pin["revision"]


def _gguf(at: Source) -> dict[str, str]:
    return {} if at.gguf_file is None else {"gguf_file": at.gguf_file}


def refuse_pickles(at: Source) -> None:
    """Check that a local folder holds weights that cannot execute code.

    Raises:
        UsageError: it holds pickles only, or no weights.
    """
    folder = Path(at.location)
    if any(folder.glob("*.safetensors")):
        return
    if found := [name for name in _PICKLES if (folder / name).is_file()]:
        raise UsageError(
            f"model.source: {at.given} has its weights only as a pickle ({found[0]}), which can execute code; "
            "convert it to safetensors, or set model.allow_pickle: true if you trust it"
        )
    raise UsageError(f"model.source: folder {at.given} holds no weights (*.safetensors)")


def _set_dropout(config: Any, dropout: float) -> None:
    for key in (
        "dropout",
        "dropout_rate",
        "hidden_dropout",
        "attention_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
    ):
        if isinstance(getattr(config, key, None), int | float):
            setattr(config, key, dropout)


def _require_whole(at: Source, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse a model of which some weights would be random: transformers only prints a report."""
    for name, stored, needed in sorted(loading["mismatched_keys"])[:1]:
        raise UsageError(
            f"model.source: {at.given} does not fit its own configuration: {name} is {list(stored)} where "
            f"{list(needed)} is needed"
        )
    missing = sorted(loading["missing_keys"])
    left_over = sorted(k for k in loading["unexpected_keys"] if "parametrizations" in k or "original" in k.split("."))
    if missing or left_over:
        what, names = ("lacks", missing) if missing else ("holds a live parametrization in", left_over)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UsageError(
            f"model.source: {at.given} {what} {names[0]}{more}; it is not a whole {model.config.model_type} "
            "(was it saved before its constraint was folded?)"
        )


@contextlib.contextmanager
def one_line(at: Source, what: str = "model") -> Iterator[None]:
    """Turn what transformers, the hub and safetensors raise into one line that says what to do."""
    # without this, a repository that has only pickles is converted by a bot on the hub, in a thread
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        with _quiet():
            yield
    except MemoryError:
        raise
    except Exception as error:  # many unrelated types, all re-raised
        raise UsageError(f"model.source: {_explain(at, what, error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the libraries print while loading: what they warn of is an error here, bars are isotone's own."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("transformers", "huggingface_hub"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    bars: Any = sys.modules["transformers"].utils.logging if "transformers" in sys.modules else None
    shown = bars is not None and bars.is_progress_bar_enabled()
    if shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def _explain(at: Source, what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text or "custom code" in text:
        return f"{at.given} comes with its own Python code; set model.trust_remote_code: true if you trust it"
    if "does not support an attention implementation" in text:
        return f"{at.given} has no such attention kernel; set model.attention: eager"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"{at.given} is of an architecture that transformers does not know ({_short(text)})"
    if "gguf" in text.lower() and isinstance(error, ImportError):
        return f"{at.given} needs the gguf package; install isotone[gguf]"
    if at.local:
        return f"the {what} in {at.given} cannot be read ({type(error).__name__}: {_short(text)})"
    if "safetensors" in text and "not appear to have" in text:
        return (
            f"{at.given} has no safetensors weights on the hub; if it has pickles and you trust them, "
            "set model.allow_pickle: true"
        )
    return (
        f"{at.given!r} is no folder here and its {what} could not be fetched from the hub ({_short(text)}); check the "
        f"name and the network, or run `hf download {at.given}` where there is one and set HF_HUB_OFFLINE=1, or give a "
        "folder"
    )


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
