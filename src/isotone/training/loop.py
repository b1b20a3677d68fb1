"""The training loop, the same for every arm: plain PyTorch that can be killed at any moment and continues bit for bit.

Batch *k* of epoch *e*, the learning rate and the streams that dropout draws from are pure functions of seed and step,
so a checkpoint holds weights, optimizer and one integer. Everything else (budgets, signals, clocks) decides only where
a process stops, never what it computes.

Shapes: B rows, L tokens of a row.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from isotone import records
from isotone.config import Training
from isotone.determinism import seed_streams
from isotone.errors import IsotoneError, UsageError
from isotone.interruption import StopFlag
from isotone.scoring import token_nll
from isotone.training.batches import Batches, Rows
from isotone.training.budget import Budget
from isotone.training.checkpoint import (
    CheckpointFolder,
    check_identity,
    describe_constraint,
    put_weights,
    trainable_parameters,
    weights_of,
)
from isotone.training.memory import Attempt, MicroBatchLedger, is_out_of_memory
from isotone.training.metrics import MetricsLog
from isotone.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from isotone.training.schedule import learning_rate

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How far training has come.

    Attributes:
        complete: whether the target is reached.
        reason: why it stopped before (a signal or a budget); None when complete.
        step: optimizer steps made, by all processes.
        total_steps: optimizer steps of the whole target.
        epochs_done: passes over the training rows.
        best_step: step of the lowest validation loss; None before the first validation.
        best_validation_nll: nats per token.
        checkpoints: names of the folders ``last`` and ``best``.
        tokens: training tokens read, by all processes.
        micro_batches: changes of the micro-batch, with step and reason.
    """

    complete: bool
    reason: str | None
    step: int
    total_steps: int
    epochs_done: float
    best_step: int | None
    best_validation_nll: float | None
    checkpoints: dict[str, str]
    tokens: int
    micro_batches: list[dict[str, Any]]


class Trainer:
    """Trains one arm from its newest checkpoint to its target, or until it is told to stop.

    Args:
        model: a causal language model of transformers, on its device; trained in place.
        data: packed rows.
        recipe: the arm's training values.
        constraint: the model's constraint, or None.
        seed: the run's seed.
        folder: the arm's checkpoints.
        metrics: JSON lines, one a step and one a validation; the same with and without interruption.
        stop: read at every micro-batch.
        budget: what this process may spend; no limit unless given.
        identity: hashes of configuration and inputs; checkpoints of another identity are refused.
        micro_batch: rows of one forward pass; the recipe's unless given. The effective batch is always the recipe's.
        autocast: compute in bf16, keep weights as they are.
        progress: called after every step with the step and a short text.
        edit: returns what the model reads in the place of a step's rows, which stay the labels; None: the rows.

    Raises:
        UsageError: the data has fewer rows than one effective batch.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Rows,
        recipe: Training,
        *,
        constraint: Any = None,
        seed: int,
        folder: Path | str,
        metrics: Path | str,
        stop: StopFlag,
        budget: Budget | None = None,
        identity: Mapping[str, str] | None = None,
        micro_batch: int | None = None,
        autocast: bool = False,
        progress: Callable[[int, str], None] | None = None,
        edit: Callable[[Tensor, int], Tensor] | None = None,
    ):
        self.model, self.recipe, self.constraint, self.seed, self.stop = model, recipe, constraint, seed, stop
        self.budget, self.autocast, self.progress, self.edit = budget or Budget(), autocast, progress, edit
        self.batches = Batches(data, recipe, seed)
        self.total_steps = self.batches.total_steps
        self.validation_rows_NL = data.rows("validation")[: recipe.validation_rows]
        self.first_micro_batch = self.micro_batch = min(micro_batch or recipe.micro_batch, self.batches.effective_batch)
        self.identity = {
            **(identity or {}),
            "data": data.fingerprint,
            "seed": str(seed),
            "steps": f"{self.total_steps} of {self.batches.effective_batch} rows",
            "micro-batch": str(self.first_micro_batch),
            "autocast": str(autocast),
        }
        self.trainable = trainable_parameters(model, constraint)
        self.optimizer = build_optimizer(self.trainable, recipe, set(constraint.names) if constraint else set())
        self.device = next(model.parameters()).device
        self.checkpoints = CheckpointFolder(folder, recipe.keep_last)
        self.ledger = MicroBatchLedger(self.checkpoints.path.parent, self.checkpoints.path.name)
        self.attempt = Attempt(self.checkpoints.path / "attempt.json")
        self.metrics = MetricsLog(metrics)
        self.timing = records.JsonLines(self.checkpoints.path / "timing.jsonl")
        self.step, self.history = 0, list[dict[str, Any]]()
        self._saved = (-1, False)  # step, and whether its validation is in
        self._saved_at = 0.0
        self._slowest_s = {"step": 0.0, "validation": 0.0, "save": 0.0}

    # --- the course of a run -----------------------------------------------------------------------------------------

    def run(self, until: int | None = None) -> TrainResult:
        """Train from the newest checkpoint on; return at the target or at a safe stop, with everything saved.

        Args:
            until: step at which to return before the target, whose schedule holds; call again to go on.

        Raises:
            DiskFullError: a save found no space; the checkpoint before it is intact.
            UsageError: the newest checkpoint belongs to another identity.
            IsotoneError: no checkpoint is valid, the loss is not finite, or one row does not fit in memory.
        """
        self._restore()
        try:
            self._saved_at = time.monotonic()
            self._begin_training_mode()
            reason = self._train(self.total_steps if until is None else until)
            self._save_if_new()
        finally:
            self.attempt.end()  # only a kill leaves its trace
        self.model.eval()
        return self._result(reason)

    def _train(self, until: int) -> str | None:
        """Alternate boundaries and steps; return why it ended, None at the step to go to."""
        while True:
            if self._validation_is_due() and not self._with_less_memory(self._validate):
                return self.stop.requested
            if self._save_is_due():
                self._save_if_new()
            if self.step >= until:
                return None
            if reason := self.stop.requested or self._why_budget_ends():
                return reason
            began = time.monotonic()
            loss = self._with_less_memory(self._gradients)
            if loss is None:
                return self.stop.requested
            self._apply_gradients(loss)
            self._took("step", began)

    def _why_budget_ends(self) -> str | None:
        return self.budget.why_exhausted(self.batches.steps_per_epoch, sum(self._slowest_s.values()))

    def _took(self, what: str, began: float) -> None:
        self._slowest_s[what] = max(self._slowest_s[what], time.monotonic() - began)

    def _result(self, reason: str | None) -> TrainResult:
        best, last = self._best(), self.checkpoints.paths()[-1].name
        return TrainResult(
            complete=self.step == self.total_steps and reason is None,
            reason=reason,
            step=self.step,
            total_steps=self.total_steps,
            epochs_done=float(self.batches.epochs(self.step)),
            best_step=best["step"] if best else None,
            best_validation_nll=best["nll"] if best else None,
            checkpoints={"last": last, "best": f"step-{best['step']:08d}" if best else last},
            tokens=self.batches.tokens(self.step),
            micro_batches=self.ledger.history(),
        )

    # --- one step ----------------------------------------------------------------------------------------------------

    def _gradients(self) -> Tensor | None:
        """Sum the step's gradients over its micro-batches; return the mean loss, None if a stop is requested."""
        self._forget_gradients()
        ids_BL = self.batches.at(self.step)
        read_BL = (self.edit(ids_BL, self.step) if self.edit else ids_BL).to(self.device)
        ids_BL = ids_BL.to(self.device)
        num_labels = ids_BL.shape[0] * (ids_BL.shape[1] - 1)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        parts = zip(read_BL.split(self.micro_batch), ids_BL.split(self.micro_batch), strict=True)
        for number, (part_BL, labels_BL) in enumerate(parts):
            if self.stop.requested:
                return None
            seed_streams(self.seed, "train", self.step, number)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                part_loss = token_nll(self.model, part_BL, labels_BL=labels_BL).sum() / num_labels
            self.attempt.watch()  # here activations are in memory
            part_loss.backward()
            loss += part_loss.detach()
        return loss

    def _apply_gradients(self, loss: Tensor) -> None:
        """Make the optimizer's step; a lack of memory is not met here, for its state is allocated beforehand."""
        rate = learning_rate(self.recipe, self.step, self.total_steps)
        if self.constraint is not None:
            self.constraint.pull_back()
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.clip)
        loss_value, norm_value = loss.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.metrics.flush()
            raise IsotoneError(
                f"step {self.step + 1}: loss {loss_value}, gradient norm {norm_value}; the last checkpoint is intact. "
                f"Lower training.lr, or set training.precision: fp32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.constraint is not None:
            self.constraint.push()
        self._forget_gradients()
        self.step += 1
        self.budget.spend(1, self.batches.steps_per_epoch)
        self._record(loss=loss_value, lr=rate, grad_norm=norm_value, tokens=self.batches.tokens(self.step))
        if self.progress:
            self.progress(self.step, f"loss {loss_value:.3f}")

    def _forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _with_less_memory(self, work: Callable[[], T]) -> T:
        """Do ``work``; where memory runs out, halve the micro-batch, durably, and do it again.

        Before it changes, the present step is saved: a process that resumes never needs the larger one again.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).split("\n")[0]
            self._forget_gradients()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._save_if_new()
            self.micro_batch = self.ledger.halve(self.step, self.micro_batch, f"out of memory on {self.device.type}")
            _log.warning("step %d: %s; micro-batch is now %d", self.step, message, self.micro_batch)

    # --- validation --------------------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        if (
            self.step == 0
            or not len(self.validation_rows_NL)
            or (self.history and self.history[-1]["step"] == self.step)
        ):
            return False
        every = self.recipe.validate_every_steps
        at_end = self.batches.ends_epoch(self.step) or self.step == self.total_steps
        return at_end or (every is not None and self.step % every == 0)

    @torch.no_grad()
    def _validate(self) -> bool:
        """Score the validation rows, nats per token; False if a stop is requested in between."""
        began, total = time.monotonic(), 0.0
        self.model.eval()
        try:
            for first in range(0, len(self.validation_rows_NL), self.micro_batch):
                if self.stop.requested:
                    return False
                rows_BL = self.validation_rows_NL[first : first + self.micro_batch].astype(np.int64)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    nll_BT = token_nll(self.model, torch.from_numpy(rows_BL).to(self.device))
                total += nll_BT.cpu().double().sum().item()
        finally:
            self.model.train()
        num_rows, length = self.validation_rows_NL.shape
        self.history.append({"step": self.step, "nll": total / (num_rows * (length - 1))})
        self._record(validation_nll=self.history[-1]["nll"])
        self._took("validation", began)
        return True

    def _best(self) -> dict[str, Any] | None:
        return min(self.history, key=lambda entry: (entry["nll"], entry["step"]), default=None)

    def _record(self, **values: float) -> None:
        self.metrics.record(self.step, epoch=round(float(self.batches.epochs(self.step)), 6), **values)

    # --- saving and restoring ----------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        best = self._best()
        return self.step > 0 and (
            self.step % self.recipe.save_every_steps == 0
            or self.batches.ends_epoch(self.step)
            or self.step == self.total_steps
            or (best is not None and best["step"] == self.step)
            or time.monotonic() - self._saved_at >= 60 * self.recipe.save_every_minutes
        )

    def _save_if_new(self) -> None:
        """Publish the state between two steps, unless it is there already, and prune what is superseded."""
        validated = not self._validation_is_due()
        if self._saved == (self.step, validated):
            return
        began = time.monotonic()
        self.metrics.flush()
        best = self._best()
        state = {
            "step": self.step,
            "validated": validated,
            "epochs": str(self.batches.epochs(self.step)),
            "total_steps": self.total_steps,
            "best": best,
            "validations": self.history,
            "micro_batches": self.ledger.history(),
            "constraint": describe_constraint(self.constraint),
            "next": self.batches.fingerprint(self.step),
            "identity": self.identity,
        }
        optimizer = optimizer_tensors(self.optimizer, self.trainable)
        self.checkpoints.publish(self.step, weights_of(self.model, self.constraint), optimizer, state)
        self.checkpoints.prune(best["step"] if best else None)
        self._saved, self._saved_at = (self.step, validated), time.monotonic()
        self._took("save", began)
        self.timing.append(
            {
                "step": self.step,
                "slowest_step_s": round(self._slowest_s["step"], 4),
                "save_s": round(self._saved_at - began, 4),
            }
        )

    def _restore(self) -> None:
        """Take up the newest checkpoint, or publish the start; choose the micro-batch."""
        self.checkpoints.sweep()
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            start = {"step": 0, "constraint": describe_constraint(self.constraint), "identity": self.identity}
            self.checkpoints.publish(0, weights_of(self.model, self.constraint), None, start)
        else:
            check_identity(checkpoint, self.identity)
            put_weights(checkpoint, self.model, self.constraint)
            self.step = checkpoint.state["step"]
        if checkpoint is not None and not checkpoint.is_start:
            load_optimizer_tensors(self.optimizer, self.trainable, checkpoint.optimizer())
            self.history = checkpoint.state["validations"]
            if checkpoint.state["next"] != self.batches.fingerprint(self.step):
                raise UsageError(
                    f"{checkpoint.path}: this software draws other random numbers or another order of rows than the "
                    f"one it was made with; use the versions that the run's records name, or start again with --fresh"
                )
        self._saved = (self.step, checkpoint is None or checkpoint.state.get("validated", True))
        self.metrics.resume(self.step, (entry["step"] for entry in self.history))
        self._slowest_s["save"] = max((line["save_s"] for line in self.timing.read()[-1:]), default=0.0)
        self._choose_micro_batch()
        self.attempt.begin(self.step)

    def _choose_micro_batch(self) -> None:
        current = self.ledger.follow_other_arms(self.step, self.ledger.at(self.step, self.first_micro_batch))
        if reason := self.attempt.why_last_died_of_memory(self.step):
            current = self.ledger.halve(self.step, current, reason)
            _log.warning("%s: micro-batch is now %d", reason, current)
        self.micro_batch = current

    def _begin_training_mode(self) -> None:
        self.model.train()
        if self.recipe.gradient_checkpointing:
            model: Any = self.model  # transformers renamed the method within version 5
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
