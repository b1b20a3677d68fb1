"""Stage 4: held-out perplexity and bits per byte of one arm, and the certificate of the weights it ended with."""

from pathlib import Path
from typing import Any

from isotone import records
from isotone.constraint import certify
from isotone.data.packed import open_packed
from isotone.evaluation import evaluate_perplexity, summarize
from isotone.pipeline.arms import end_folder, load_end
from isotone.pipeline.context import Context

LONGEST_WINDOW = 2048
"""Tokens of a window unless the configuration says otherwise: logits of more need too much memory."""


def run(context: Context) -> list[Path]:
    """Score every token of the held-out documents once, with the last and with the best checkpoint."""
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
    config, data = context.experiment.evaluation, open_packed(context.run.data)
    model = load_end(context, context.arm_name, name)
    documents = list(
        data.documents(config.split).shuffled(context.experiment.data.shuffle_seed)[: config.num_documents]
    )
    work = records.JsonLines(context.run.work(context.node) / f"{name}.jsonl")
    with context.progress(1, "batch") as bar:
        rows = evaluate_perplexity(
            model,
            documents,
            context=config.context or min(records.read_json(context.run.pinned_model)["context"], LONGEST_WINDOW),
            stride=config.stride,
            batch_size=config.batch_size,
            leading_token=data.separator,
            work=work,
            identity={"weights": context.inputs_hash, "checkpoint": folder.name if folder else "start"},
            stop=context.stop,
            report=bar.set,
        )
    if name == context.experiment.attacks.checkpoint:
        records.write_bytes(context.run.documents(context.node), records.dump_json_lines(rows))
    scope = context.arm.certified_scope
    certificate = certify(model, scope=scope).to_dict() if scope else None
    return {"checkpoint": folder.name if folder else "start", "certificate": certificate, **summarize(rows)}
