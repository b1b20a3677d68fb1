"""Stages 2 and 3: train one arm; the same data in the same order and the same budget for all."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from isotone import records
from isotone.data.packed import open_packed
from isotone.errors import Stopped
from isotone.pipeline.arms import load_teacher, random_prefix, start_constrained
from isotone.pipeline.context import Context
from isotone.training import Trainer, TrainResult
from isotone.training.checkpoint import CheckpointFolder


def run(context: Context) -> list[Path]:
    """Train the arm to its target, from its newest checkpoint on.

    Raises:
        Stopped: a signal or a budget ended this process's part; the newest checkpoint holds it.
    """
    recipe = context.experiment.training_of(context.arm_name)
    data = open_packed(context.run.data)
    folder = context.run.checkpoints(context.arm_name)
    has_begun = context.team.first(lambda: bool(CheckpointFolder(folder).paths()))
    model, constraint = start_constrained(context, context.arm_name, weights_follow=has_begun)
    trainer = Trainer(
        model,
        data,
        recipe,
        constraint=constraint,
        seed=context.seed,
        folder=folder,
        metrics=context.run.metrics(context.node),
        stop=context.stop,
        budget=context.budget,
        identity={"configuration": context.config_hash, "start": context.inputs_hash},
        autocast=recipe.precision == "bf16",
        team=context.team,
        edit=random_prefix(context, context.arm_name, model),
        pairs=data.pairs,
        teacher=partial(load_teacher, context, context.arm_name),
    )
    if context.team.is_first:
        with context.progress(trainer.total_steps, "step") as bar:
            trainer.progress = bar.update
            result = trainer.run()
    else:
        result = trainer.run()
    return context.team.first(lambda: _conclude(context, trainer, result))


def _conclude(context: Context, trainer: Trainer, result: TrainResult) -> list[Path]:
    """Write what training found; return the node's outputs."""
    if not result.complete:
        raise Stopped(
            f"{context.node} stopped safely at step {result.step} of {result.total_steps} "
            f"({result.epochs_done:.3g} epochs; {result.reason})"
        )
    trainer.checkpoints.keep_only(set(result.checkpoints.values()))
    summary = {k: v for k, v in asdict(result).items() if k not in ("complete", "reason")}
    records.write_json(
        context.run.node_result(context.node),
        {"schema": 1, "arm": context.arm_name, "recipe": trainer.recipe.model_dump(mode="json"), **summary},
    )
    manifests = [
        context.run.checkpoints(context.arm_name) / name / records.MANIFEST
        for name in sorted(set(result.checkpoints.values()))
    ]
    return [*manifests, context.run.metrics(context.node), context.run.node_result(context.node)]
