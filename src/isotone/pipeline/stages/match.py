"""Makes one matched-loss control: its start, damaged until its clean loss on what is attacked is another arm's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from isotone import records
from isotone.config import MatchedLoss
from isotone.data.packed import open_packed
from isotone.errors import IsotoneError, Stopped, UsageError
from isotone.matching import (
    TOLERANCE,
    Interpolation,
    Match,
    Noise,
    Temperature,
    bisect,
    clean_nll,
    is_matched,
    matched_entry,
)
from isotone.pipeline.arms import (
    attack_protocol,
    attacked_windows,
    first_token,
    load_end,
    load_start,
    load_teacher,
    random_prefix,
    start_constrained,
)
from isotone.pipeline.context import Context
from isotone.training import Trainer, save_initial
from isotone.training.checkpoint import STATE, CheckpointFolder, read_checkpoint, weights_of

EVALUATIONS = 20
"""Measured moments of a training that is repeated, where the recipe does not say how often it validates."""

Measure = Callable[[PreTrainedModel], float]


@dataclass(frozen=True)
class _Found:
    """The nearest model of a construction, how near it is, and what the construction adds to the result."""

    model: PreTrainedModel
    match: Match
    details: dict[str, Any] = field(default_factory=dict)


def run(context: Context) -> list[Path]:
    """Measure the arm to be matched, bring a copy of the start to its loss, and publish that.

    Where the loss cannot be reached the nearest model is published all the same, and the result says so: it is measured
    like any other, but nothing follows from it.

    Raises:
        Stopped: a stop was requested; what was measured and trained so far is kept.
        UsageError: there is no attacked document to measure a loss on.
    """
    matched = context.arm.matched_loss
    assert matched is not None  # the graph has this node for matched arms only
    measure, counts = _measure(context)
    target = measure(load_end(context, matched.to, context.experiment.attacks.checkpoint)) + matched.above
    model = load_start(context, context.arm_name)
    construct = {"temperature": _temperature, "noise": _noise, "undertrained": _undertrained}[matched.by]
    found = construct(context, matched, model, measure, target)
    outputs = [_publish(context, found.model), context.run.node_result(context.node)]
    records.write_json(
        context.run.node_result(context.node),
        {
            "schema": 1,
            "arm": context.arm_name,
            "start": context.arm.start,
            **matched.model_dump(mode="json"),
            **matched_entry(found.match, target),
            **found.details,
            **counts,
        },
    )
    if found.match.reason:
        above = f" + {matched.above:g}" if matched.above else ""
        context.say(f"{context.node}: the loss of {matched.to}{above} is not reachable: {found.match.reason}")
    metrics = context.run.metrics(context.node)
    return [*outputs, metrics] if metrics.is_file() else outputs


def _measure(context: Context) -> tuple[Measure, dict[str, int]]:
    """Return what measures a model's clean loss, and on how much."""
    data, protocol = open_packed(context.run.data), attack_protocol(context)
    windows, num_short = attacked_windows(context, data, "attack_test", first_token(context))
    if not windows:
        asked = "flips of attacks.hotflip" if protocol.pairs else f"{protocol.length} tokens of attacks.protocol"
        raise UsageError(
            f"arms.{context.arm_name}.matched_loss: no attack_test document has the {asked} ({num_short} are "
            "shorter); give data.fractions.attack_test more, or ask for less"
        )
    ids_BL = torch.from_numpy(np.stack([window.tokens for window in windows]))
    batch = context.experiment.attacks.batch_documents
    counts = {
        "num_documents": len(windows),
        "num_tokens": sum(protocol.num_scored(window.tokens.tolist()) for window in windows),
    }
    return lambda model: clean_nll(model, ids_BL, protocol.scored, batch, protocol.pairs), counts


def _temperature(
    context: Context, matched: MatchedLoss, model: PreTrainedModel, measure: Measure, target: float
) -> _Found:
    return _Found(model, _bisected(context, Temperature(model), model, measure, target))


def _noise(context: Context, matched: MatchedLoss, model: PreTrainedModel, measure: Measure, target: float) -> _Found:
    constraint = context.experiment.arms[matched.to].constraint
    scope = matched.scope or (constraint.scope if constraint else None)
    assert scope is not None  # the schema demands it
    layers = constraint.layers if constraint and not matched.scope else None
    noise = Noise(model, scope, context.seed, matched.draw, layers)
    return _Found(model, _bisected(context, noise, model, measure, target), {"scope": scope})


def _bisected(
    context: Context,
    damage: Temperature | Noise | Interpolation,
    model: PreTrainedModel,
    measure: Measure,
    target: float,
) -> Match:
    """Bisect, and leave the model as the nearest one found; what a process before this one measured is read back."""
    log = records.JsonLines(context.run.work(context.node) / "evaluations.jsonl")
    with context.progress(1, "evaluation") as bar:
        found = bisect(
            damage,
            lambda: measure(model),
            target,
            log,
            before=lambda known: context.stop.check(f"{context.node} after {known} evaluations"),
            after=lambda known, nll: bar.set(known, known + 1, f"loss {nll:.4f} of {target:.4f}"),
        )
        bar.set(len(log.read()), len(log.read()))
    return found


def _publish(context: Context, model: PreTrainedModel) -> Path:
    identity = {"configuration": context.config_hash, "start": context.inputs_hash}
    return save_initial(context.run.checkpoints(context.arm_name), model, identity=identity) / records.MANIFEST


# --- the training of the start once more, stopped early --------------------------------------------------------------


def _undertrained(
    context: Context, matched: MatchedLoss, model: PreTrainedModel, measure: Measure, target: float
) -> _Found:
    """Repeat the training that made ``model`` until it crosses the loss, and interpolate what stands on both sides."""
    at_end = measure(model)
    learner, _ = start_constrained(context, context.arm.start)
    bracket = CheckpointFolder(context.run.work(context.node) / "bracket")
    bracket.sweep()
    if bracket.newest() is None:
        _add(bracket, 0, learner, model, measure)
    at_start = _nll(bracket.paths()[0])
    if not at_end - TOLERANCE <= target <= at_start + TOLERANCE:
        reason = (
            f"training {context.arm.start} takes the loss from {at_start:.4f} to {at_end:.4f}; only what lies on a way "
            f"down can be met"
        )
        if abs(at_end - target) < abs(at_start - target):
            end = load_start(context, context.arm_name)  # ``model`` holds what was last measured
            return _Found(end, Match(0.0, at_end, reason, 2), {"steps": None})
        return _Found(_filled(model, learner), Match(0.0, at_start, reason, 2), {"steps": [0, 0]})
    _train_past(context, learner, bracket, model, measure, target)
    *before, last = bracket.paths()
    steps = {"steps": [_step(before[-1] if before else last), _step(last)]}
    later = read_checkpoint(last).weights()
    if before and _nll(last) <= target:
        between = Interpolation(model, read_checkpoint(before[-1]).weights(), later)
        return _Found(model, _bisected(context, between, model, measure, target), steps)
    Interpolation(model, later, later).apply(0.0)
    reason = "" if is_matched(_nll(last), target) else "repeating the training does not cross it"
    return _Found(model, Match(0.0, _nll(last), reason, len(bracket.paths())), {"steps": [_step(last), _step(last)]})


def _train_past(
    context: Context,
    learner: PreTrainedModel,
    bracket: CheckpointFolder,
    model: PreTrainedModel,
    measure: Measure,
    target: float,
) -> None:
    """Train as the start was trained, bit for bit, and keep the last two measured moments, until the loss is met."""
    start, work = context.arm.start, context.run.work(context.node)
    recipe = context.experiment.training_of(start)
    data = open_packed(context.run.data)
    trainer = Trainer(
        learner,
        data,
        recipe,
        seed=context.seed,
        folder=work / "training",
        metrics=context.run.metrics(context.node),
        stop=context.stop,
        budget=context.budget,
        identity={"configuration": context.config_hash, "start": context.inputs_hash},
        autocast=recipe.precision == "bf16",
        edit=random_prefix(context, start, learner),
        pairs=data.pairs,
        teacher=partial(load_teacher, context, start),
    )
    every = recipe.validate_every_steps or math.ceil(trainer.total_steps / EVALUATIONS)
    with context.progress(trainer.total_steps, "step") as bar:
        trainer.progress = bar.update
        while _nll(last := bracket.paths()[-1]) > target and _step(last) < trainer.total_steps:
            until = min((_step(last) // every + 1) * every, trainer.total_steps)
            result = trainer.run(until)
            if result.step < until:
                raise Stopped(
                    f"{context.node} stopped safely at step {result.step} of at most {result.total_steps} "
                    f"({result.reason})"
                )
            _add(bracket, result.step, learner, model, measure)


def _add(
    bracket: CheckpointFolder, step: int, learner: PreTrainedModel, model: PreTrainedModel, measure: Measure
) -> None:
    """Measure a moment of the training in fp32, and keep its weights and loss."""
    nll = measure(_filled(model, learner))
    if not math.isfinite(nll):
        raise IsotoneError(f"the loss after {step} steps of the training that is repeated is not a finite number")
    bracket.publish(step, weights_of(learner), None, {"step": step, "nll": nll, "constraint": None, "identity": {}})
    bracket.prune(None)


@torch.no_grad()
def _filled(model: PreTrainedModel, learner: PreTrainedModel) -> PreTrainedModel:
    """Return ``model`` with the weights of another one."""
    Interpolation(model, weights_of(learner), weights_of(learner)).apply(0.0)
    return model


def _nll(checkpoint: Path) -> float:
    return float(records.read_json(checkpoint / STATE)["nll"])


def _step(checkpoint: Path) -> int:
    return int(records.read_json(checkpoint / STATE)["step"])
