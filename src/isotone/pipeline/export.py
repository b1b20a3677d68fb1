"""Models without a pipeline: export an arm, constrain a model into a folder, evaluate a model on documents."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isotone import records
from isotone.config import Data, Model
from isotone.config_io import load_experiment
from isotone.constraint import Certificate, certify, constrain, fold
from isotone.constraint.initialization import FITTED
from isotone.constraint.journal import Journal
from isotone.data.corpora import open_corpus
from isotone.data.packing import separator_of
from isotone.data.shards import tokenize
from isotone.errors import BlockedError, UsageError
from isotone.interruption import StopFlag
from isotone.models import load_model, load_tokenizer, pin_model, save_model
from isotone.pipeline.arms import load_end, pinned_tokenizer
from isotone.pipeline.context import Context
from isotone.pipeline.graph import Graph
from isotone.pipeline.record import standing
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.status import seed_of
from isotone.progress import progress
from isotone.training.budget import Budget


def export_arm(folder: Path, arm: str, out: Path, checkpoint: str) -> Path:
    """Write an arm's folded model and tokenizer as a plain folder, reloaded and compared before it is called done.

    Raises:
        UsageError: no such run, arm or checkpoint, or ``out`` is there already.
        BlockedError: the arm is not complete.
    """
    run = RunDirectory.find(folder)
    experiment = load_experiment(run.config)
    graph, seed = Graph(experiment), seed_of(run)
    if arm not in experiment.arms:
        raise UsageError(f"{folder} has no arm {arm!r}; it has {', '.join(experiment.arms)}")
    if checkpoint not in ("last", "best"):
        raise UsageError(f"--checkpoint {checkpoint!r}: allowed are last and best")
    end = graph.end_of(arm)
    if (now := standing(run, graph, experiment, seed, end)).state != "complete":
        raise BlockedError(f"{end} is {now.state} ({now.reason}); complete the run first: isotone run …")
    context = Context(experiment, graph, run, seed, end, StopFlag(), Budget(), print)
    save_model(load_end(context, arm, checkpoint), pinned_tokenizer(context), out)
    return out


@dataclass(frozen=True)
class Calibration:
    """Text that a start is fitted on.

    Attributes:
        documents: txt, jsonl(.gz, .zst) or parquet.
        rows: most rows of 512 tokens (or the model's context) that are taken, from the first document on.
        text_field: the field that holds the text.
    """

    documents: Path
    rows: int = 64
    text_field: str = "text"


def constrain_to_folder(
    source: str,
    out: Path,
    scope: str,
    parametrization: str,
    initialization: str,
    layers: str | None = None,
    activation: str | None = None,
    calibration: Calibration | None = None,
    calibrate: bool = False,
) -> Certificate:
    """Constrain a model, fold it, and write it with its certificate.

    Args:
        source: the model.
        out: the folder.
        scope: as ``constrain`` has it, as are the next three.
        parametrization: see ``scope``.
        initialization: see ``scope``.
        layers: see ``scope``; or indices with commas between.
        activation: put in the place of the model's own.
        calibration: the text that a start is fitted on.
        calibrate: match means and variances after the start, on that text.

    Raises:
        UsageError: the model, the scope, the combination or the text cannot be used; the reason is named.
    """
    if out.exists():  # said before the work, not behind it
        raise UsageError(f"{out} is there already; choose another folder or remove it")
    model, tokenizer = load_model(source), load_tokenizer(source)
    is_list = layers is not None and re.fullmatch(r"-?\d+(,-?\d+)*", layers)
    chosen = [int(index) for index in layers.split(",")] if layers and is_list else layers
    is_fitted = initialization in FITTED or calibrate
    if calibration is not None and not is_fitted:
        raise UsageError("--calibration: nothing is fitted on text here; give --initialization nnls, or --calibrate")
    if calibration is None and is_fitted:
        raise UsageError(
            f"{'--calibrate' if calibrate else '--initialization ' + initialization} is fitted on text; give it with "
            "--calibration FILE"
        )
    constraint = constrain(
        model,
        scope,
        parametrization,
        initialization,
        calibration_rows_NL=None if calibration is None else _rows_of(calibration, model, tokenizer),
        will_train=False,
        layers=chosen,
        activation=activation,
        calibrate=calibrate,
        journal=Journal(progress=lambda total, unit: progress("constrain", total, unit=unit)),
    )
    fold(model)
    certificate = certify(model, scope=constraint.scope)
    save_model(model, tokenizer, out, {"certificate.json": records.dump_json(certificate.to_dict())})
    return certificate


def _rows_of(calibration: Calibration, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the first rows of a file's documents, packed as a run packs them, int64 [N, L]."""
    if model.config.is_encoder_decoder:
        raise UsageError("--calibration: an encoder-decoder is fitted on pairs; do it in a run (docs/seq2seq.md)")
    corpus = open_corpus(Data(source=str(calibration.documents), text_field=calibration.text_field))
    length, separator = min(_ROW, getattr(model.config, "max_position_embeddings", _ROW)), separator_of(tokenizer)
    stream: list[int] = []
    for document in corpus.read(0):
        stream += [] if separator is None else [separator]
        stream += tokenize([document.text], tokenizer)[0]
        if len(stream) >= calibration.rows * length:
            break
    length = min(length, len(stream))
    if not length:
        raise UsageError(f"--calibration: {calibration.documents} holds no text")
    if max(stream) >= (known := int(model.get_input_embeddings().weight.size(0))):  # type: ignore[operator, union-attr]
        raise UsageError(f"model.source: the tokenizer gives token {max(stream)}, but the model has {known} embeddings")
    rows = min(calibration.rows, len(stream) // length)
    return torch.tensor(stream[: rows * length]).view(rows, length)


_ROW = 512
"""Tokens of a calibration row, at most."""


def probe_documents(source: str, documents: Path, text_field: str) -> dict[str, Any]:
    """Measure the premise of a certificate, and order at the model's end, on the documents of a file.

    Args:
        source: the model; an encoder-decoder reads the documents as sources.
        documents: txt, jsonl(.gz, .zst) or parquet; the first 64 of at least 8 tokens are used.
        text_field: the field that holds the text.

    Raises:
        UsageError: the model or the documents cannot be used, or no document is long enough.
    """
    from isotone.constraint.premise import MIN_LENGTH, measure_order

    model, tokenizer = load_model(source), load_tokenizer(source)
    texts = [d.text for d in open_corpus(Data(source=str(documents), text_field=text_field)).read(0)]
    tokens = [np.array(ids, np.int64) for text in texts for ids in tokenize([text], tokenizer)]
    long_enough = [ids for ids in tokens if len(ids) >= MIN_LENGTH][:_NUM_PROBED]
    if not long_enough:
        raise UsageError(f"--probe: {documents} holds no document of at least {MIN_LENGTH} tokens; give longer ones")
    return measure_order(model, long_enough)


_NUM_PROBED = 64
"""Documents that a probe takes, at most."""


def evaluate_documents(
    source: str, documents: Path, text_field: str, out: Path | None, stop: StopFlag
) -> dict[str, Any]:
    """Measure perplexity and bits per byte of a model on the documents of a file.

    Args:
        source: the model.
        documents: txt, jsonl(.gz, .zst) or parquet.
        text_field: the field that holds the text.
        out: folder for finished batches and the result; an interrupted evaluation continues there.
        stop: read after each batch.

    Raises:
        UsageError: the model or the documents cannot be used, or there is no text in them.
    """
    from tempfile import TemporaryDirectory

    from isotone.data.packed import PackedDocument
    from isotone.evaluation import evaluate_perplexity, summarize

    model, tokenizer = load_model(source), load_tokenizer(source)
    if model.config.is_encoder_decoder:
        raise UsageError(
            f"{source} is an encoder-decoder: documents have no loss of their own there; evaluate pairs in a run, with "
            "an arm of train: false (docs/seq2seq.md)"
        )
    texts = list(open_corpus(Data(source=str(documents), text_field=text_field)).read(0))
    tokenized = [
        PackedDocument(d.id, np.array(ids, np.int64), len(d.text.encode()), d.text)
        for d in texts
        for ids in [tokenize([d.text], tokenizer)[0]]
    ]
    if not any(len(document.tokens) for document in tokenized):
        raise UsageError(f"--documents: {documents} holds no text")
    with TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        rows = evaluate_perplexity(
            model,
            tokenized,
            context=min(getattr(model.config, "max_position_embeddings", 2048), 2048),
            leading_token=separator_of(tokenizer),
            work=records.JsonLines(folder / "evaluation.work.jsonl"),
            identity={"model": records.hash_json(pin_model(Model(source=source)))},
            stop=stop,
        )
        result = {"schema": 1, **summarize(rows)}
        if out:
            records.write_json(out / "evaluation_results.json", result)
    return result
