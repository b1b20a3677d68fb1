"""Stage 0: pin the model, pack the data; shared by all seeds of an experiment."""

from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Data
from isotone.data import prepare_data
from isotone.errors import UsageError
from isotone.evaluation.rouge import require_rouge_score
from isotone.models import load_tokenizer, pin_model
from isotone.pipeline.context import Context
from isotone.pipeline.slices import config_slice


def run(context: Context) -> list[Path]:
    """Pin the model's revision and hashes, then split, tokenize and pack the corpus.

    Raises:
        UsageError: the model or the corpus cannot be used, or another seed's setup stands for other settings.
    """
    config = context.experiment
    settings, settings_file = config_slice(config, context.seed, context.node), context.run.setup / "settings.json"
    _require_same_settings(context, settings, settings_file)
    if config.evaluation.rouge is not None:
        require_rouge_score()  # now, and not when models have been trained
    pin = pin_model(config.model)
    if settings_file.is_file() and records.read_json(context.run.pinned_model) != pin:
        raise UsageError(
            f"model.source {config.model.source}: its files are not the ones pinned in {context.run.pinned_model}; "
            f"bring them back, or start over with --only setup --fresh"
        )
    records.write_json(context.run.pinned_model, pin)
    _require_fitting_data(config.data, bool(pin.get("encoder_decoder")))
    tokenizer = load_tokenizer(config.model, pin=pin)
    with context.progress(config.data.num_documents or 1, "document") as bar:
        summary = prepare_data(
            config.data,
            tokenizer,
            context.run.data,
            max_context=pin["context"],
            vocab_size=pin["vocab_size"],
            stop=context.stop,
            # how many documents a corpus has is known only at its end
            progress=lambda done, text: bar.set(done, max(done, config.data.num_documents or 0), text),
        )
    for side in ("source", "target") if config.data.pairs else ():
        if cut := sum(counts[f"{side}s_cut"] for counts in summary["splits"].values()):
            limit = f"data.{side}_length: {getattr(config.data, f'{side}_length')}"
            context.say(f"{cut} {side}s are longer than {limit}; only their beginning is read")
    records.write_json(settings_file, settings)  # last: a mistyped setting that failed binds nobody
    return [context.run.pinned_model, *sorted(p for p in context.run.data.iterdir() if p.is_file())]


def _require_fitting_data(data: Data, encoder_decoder: bool) -> None:
    if encoder_decoder and not data.pairs:
        raise UsageError(
            "data.source_field: the model is an encoder-decoder and reads pairs; give source_field and target_field, "
            "or two text files as source and target_file, or source: bible-pairs"
        )
    if data.pairs and not encoder_decoder:
        raise UsageError(
            "data: these are pairs of source and target, and the model is no encoder-decoder; give one text "
            "(text_field), or a model such as T5"
        )


def _require_same_settings(context: Context, settings: dict[str, Any], path: Path) -> None:
    """Refuse to pack other settings over what other seeds were trained on."""
    if path.is_file() and records.read_json(path) != settings:
        raise UsageError(
            f"{context.run.setup} was made for other values of model or data, and other seeds may use it; "
            f"choose another name or --out, or set it aside: isotone run … --only setup --fresh"
        )
