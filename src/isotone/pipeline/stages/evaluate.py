"""Stage 4: held-out loss of one arm, ROUGE of pairs, and the certificate of the weights that it ended with."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from isotone import records
from isotone.constraint import certify
from isotone.data.packed import PackedData, PackedDocument, open_packed
from isotone.evaluation import evaluate_perplexity, summarize
from isotone.evaluation.pairs import Row, evaluate_pairs
from isotone.evaluation.rouge import rouge, summarize_rouge, write_targets
from isotone.pairs import PairLayout
from isotone.pipeline.arms import end_folder, load_end, pinned_tokenizer
from isotone.pipeline.context import Context

LONGEST_WINDOW = 2048
"""Tokens of a window unless the configuration says otherwise: logits of more need too much memory."""


def run(context: Context) -> list[Path]:
    """Score every token (of pairs, of targets) of the held-out documents, with the last and the best checkpoint."""
    primary: str = context.experiment.attacks.checkpoint
    folders: dict[str, Path | None] = {}
    for name in dict.fromkeys((primary, *context.experiment.evaluation.checkpoints)):
        folders[name] = end_folder(context, context.arm_name, name)
    checkpoints: dict[str, Any] = {}
    done: dict[Path | None, dict[str, Any]] = {}
    for name, folder in folders.items():
        if folder not in done:  # best and last are often the same
            done[folder] = _evaluate(context, name, folder)
        checkpoints[name] = done[folder]
    records.write_json(
        context.run.node_result(context.node),
        {
            "schema": 1,
            "arm": context.arm_name,
            "primary_checkpoint": primary,
            "checkpoints": checkpoints,
            **checkpoints[primary],
        },
    )
    return [context.run.node_result(context.node), context.run.documents(context.node)]


def _evaluate(context: Context, name: str, folder: Path | None) -> dict[str, Any]:
    data = open_packed(context.run.data)
    model = load_end(context, context.arm_name, name)
    config, seed = context.experiment.evaluation, context.experiment.data.shuffle_seed
    documents = list(data.documents(config.split).shuffled(seed)[: config.num_documents])
    identity = {"weights": context.inputs_hash, "checkpoint": folder.name if folder else "start"}
    rows = _score(context, name, model, data, documents, identity)
    found = summarize(rows)
    if name == context.experiment.attacks.checkpoint:
        if data.pairs and config.rouge:
            found["rouge"] = _add_rouge(
                context, model, data.pairs, documents[: config.rouge.num_documents], identity, rows
            )
        records.write_bytes(context.run.documents(context.node), records.dump_json_lines(rows))
    scope = context.arm.certified_scope
    certificate = certify(model, scope=scope).to_dict() if scope else None
    return {"checkpoint": folder.name if folder else "start", "certificate": certificate, **found}


def _score(
    context: Context,
    name: str,
    model: PreTrainedModel,
    data: PackedData,
    documents: list[PackedDocument],
    identity: dict[str, str],
) -> list[Row]:
    config = context.experiment.evaluation
    work = records.JsonLines(context.run.work(context.node) / f"{name}.jsonl")
    with context.progress(1, "batch") as bar:
        if data.pairs:
            return evaluate_pairs(
                model,
                documents,
                data.pairs,
                batch_size=config.batch_size,
                work=work,
                identity=identity,
                stop=context.stop,
                report=bar.set,
            )
        return evaluate_perplexity(
            model,
            documents,
            context=config.context or min(records.read_json(context.run.pinned_model)["context"], LONGEST_WINDOW),
            stride=config.stride,
            batch_size=config.batch_size,
            leading_token=data.separator,
            work=work,
            identity=identity,
            stop=context.stop,
            report=bar.set,
        )


def _add_rouge(
    context: Context,
    model: PreTrainedModel,
    layout: PairLayout,
    documents: list[PackedDocument],
    identity: dict[str, str],
    rows: list[Row],
) -> dict[str, Any]:
    """Write what the model writes, and its scores, into the documents' rows; return the means beside the source's own.

    Copying the source is what a model must beat: an identity scores well where the target resembles the source.
    """
    config = context.experiment.evaluation.rouge
    assert config is not None
    with context.progress(1, "text batch") as bar:
        texts = write_targets(
            model,
            pinned_tokenizer(context),
            documents,
            layout,
            config,
            work=records.JsonLines(context.run.work(context.node) / "rouge.jsonl"),
            identity=identity,
            stop=context.stop,
            report=bar.set,
        )
    copies = []
    for row, document, text in zip(rows, documents, texts, strict=False):  # of the first documents
        reference = document.target or ""
        row |= {"written": text, "rouge": rouge(text, reference)}
        copies.append(rouge(document.text, reference))
    return {
        "num_documents": len(texts),
        **summarize_rouge([row["rouge"] for row in rows[: len(texts)]], config.resamples),
        "source_copied": summarize_rouge(copies, config.resamples),
    }
