"""The training loop, the same for every arm: plain PyTorch that can be killed at any moment and continues bit for bit.

Batch *k* of epoch *e*, the learning rate and the streams that dropout draws from are pure functions of seed and step,
so a checkpoint holds weights, optimizer and one integer. Everything else (budgets, signals, clocks) decides only where
a process stops, never what it computes.

Shapes: B rows, L tokens of a row.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from isotone import records
from isotone.config import Training, epochs_as_fraction
from isotone.data.order import batch_rows
from isotone.determinism import seed_streams, streams_fingerprint
from isotone.errors import IsotoneError, UsageError
from isotone.interruption import StopFlag
from isotone.scoring import token_nll
from isotone.training.budget import Budget
from isotone.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    check_identity,
    describe_constraint,
    put_weights,
    trainable_parameters,
    weights_of,
)
from isotone.training.memory import Attempt, MicroBatchLedger, is_out_of_memory
from isotone.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from isotone.training.schedule import learning_rate

_FLUSH_S = 2.0  # metrics wait in memory so long at most: what lies beyond a checkpoint is computed again anyway
_log = logging.getLogger(__name__)


class Rows(Protocol):
    """What training needs of packed data."""

    @property
    def fingerprint(self) -> str:
        """Hash of the packed data."""

    def rows(self, split: str) -> np.ndarray:
        """Return the token rows of ``train`` or ``validation``, unsigned integers [num_rows, L]."""


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

    An epoch has floor(rows / effective batch) steps; the rows left over are other ones in every epoch. The target is
    ceil(epochs × steps per epoch) steps.

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

    Raises:
        UsageError: the data has fewer rows than one effective batch, or nothing is trainable.
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
    ):
        self.model, self.recipe, self.constraint, self.seed, self.stop = model, recipe, constraint, seed, stop
        self.budget, self.autocast, self.progress = budget or Budget(), autocast, progress
        self.train_rows, self.validation_rows = data.rows("train"), data.rows("validation")[: recipe.validation_rows]
        self.effective_batch = recipe.micro_batch * recipe.accumulation
        self.steps_per_epoch = len(self.train_rows) // self.effective_batch
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"training.micro_batch × training.accumulation is {self.effective_batch} rows, but there are only "
                f"{len(self.train_rows)} training rows; use a smaller batch or shorter data.sequence_length"
            )
        self.total_steps = math.ceil(epochs_as_fraction(recipe.epochs) * self.steps_per_epoch)
        self.identity = {
            **(identity or {}),
            "data": data.fingerprint,
            "seed": str(seed),
            "steps": f"{self.total_steps} of {self.effective_batch} rows",
            "autocast": str(autocast),
        }
        self.trainable = trainable_parameters(model, constraint)
        self.optimizer = build_optimizer(self.trainable, recipe, set(constraint.names) if constraint else set())
        self.device = next(model.parameters()).device
        self.checkpoints = CheckpointFolder(folder, recipe.keep_last)
        self.ledger = MicroBatchLedger(self.checkpoints.path.parent, self.checkpoints.path.name)
        self.metrics = records.JsonLines(metrics)
        self.timing = records.JsonLines(self.checkpoints.path / "timing.jsonl")
        self.attempt = Attempt(self.checkpoints.path / "attempt.json")
        self.first_micro_batch = self.micro_batch = min(micro_batch or recipe.micro_batch, self.effective_batch)
        self.step, self.history = 0, list[dict[str, Any]]()
        self._saved_step, self._saved_at, self._slowest_step_s, self._slowest_save_s = -1, 0.0, 0.0, 0.0
        self._pending, self._flushed_at = list[dict[str, Any]](), 0.0

    # --- the course of a run -----------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train from the newest checkpoint on; return at the target or at a safe stop, with everything saved.

        Raises:
            DiskFullError: a save found no space; the checkpoint before it is intact.
            UsageError: the newest checkpoint belongs to another identity.
            IsotoneError: no checkpoint is valid, the loss is not finite, or one row does not fit in memory.
        """
        self._restore()
        self._began = self._saved_at = time.monotonic()
        self.model.train()
        self._set_gradient_checkpointing()
        reason = self._train()
        if self._saved_step != self.step:
            self._save(validated=not self._validation_is_due())
        self.attempt.end()
        self.model.eval()
        return self._result(reason)

    def _train(self) -> str | None:
        """Alternate boundaries and steps; return why it ended, None at the target."""
        while True:
            if self._validation_is_due() and not self._surviving_lack_of_memory(self._validate):
                return self.stop.requested
            if self._save_is_due():
                self._save()
            if self.step == self.total_steps:
                return None
            needed_s = self._slowest_step_s + self._slowest_save_s
            if reason := self.stop.requested or self.budget.why_exhausted(self.steps_per_epoch, needed_s):
                return reason
            if not self._surviving_lack_of_memory(self._optimizer_step):
                return self.stop.requested

    def _result(self, reason: str | None) -> TrainResult:
        best = self._best()
        last = self.checkpoints.paths()[-1].name
        return TrainResult(
            complete=self.step == self.total_steps,
            reason=None if self.step == self.total_steps and reason is None else reason,
            step=self.step,
            total_steps=self.total_steps,
            epochs_done=float(Fraction(self.step, self.steps_per_epoch)),
            best_step=best["step"] if best else None,
            best_validation_nll=best["nll"] if best else None,
            checkpoints={"last": last, "best": f"step-{best['step']:08d}" if best else last},
            tokens=self._tokens(),
            micro_batches=self.ledger.history(),
        )

    # --- one step ----------------------------------------------------------------------------------------------------

    def _optimizer_step(self) -> bool:
        """Make one step; False, and nothing changed, if a stop is requested in between."""
        began = time.monotonic()
        ids_BL = self._batch()
        num_labels = ids_BL.shape[0] * (ids_BL.shape[1] - 1)
        self._forget_gradients()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, part_BL in enumerate(ids_BL.split(self.micro_batch)):
            if self.stop.requested:
                self._forget_gradients()
                return False
            seed_streams(self.seed, "train", self.step, number)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                part_loss = token_nll(self.model, part_BL).sum() / num_labels
            part_loss.backward()
            loss += part_loss.detach()
        self._apply_gradients(loss)
        self._slowest_step_s = max(self._slowest_step_s, time.monotonic() - began)
        self.budget.spend(1, self.steps_per_epoch)
        return True

    def _apply_gradients(self, loss: Tensor) -> None:
        rate = learning_rate(self.recipe, self.step, self.total_steps)
        if self.constraint is not None:
            self.constraint.pull_back()
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.clip)
        loss_value, norm_value = loss.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise IsotoneError(
                f"step {self.step + 1}: loss {loss_value}, gradient norm {norm_value}; the last checkpoint is intact. "
                f"Lower training.lr, or use precision fp32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.constraint is not None:
            self.constraint.push()
        self._forget_gradients()
        self.step += 1
        self._record(loss=loss_value, lr=rate, grad_norm=norm_value, tokens=self._tokens())
        if self.progress:
            self.progress(self.step, f"loss {loss_value:.3f}")

    def _batch(self) -> Tensor:
        """Return the token ids of the step's effective batch, int64 [B, L]."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        chosen_B = batch_rows(
            self.seed, epoch, batch * self.effective_batch, self.effective_batch, len(self.train_rows)
        )
        return torch.from_numpy(self.train_rows[chosen_B].astype(np.int64)).to(self.device)

    def _forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _surviving_lack_of_memory(self, work: Callable[[], bool]) -> bool:
        """Do ``work``; where memory runs out, halve the micro-batch, durably, and do it again.

        Before it changes, the present step is saved: a process that resumes never needs the larger one again.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._forget_gradients()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self._saved_step != self.step:
                self._save(validated=not self._validation_is_due())
            self.micro_batch = self.ledger.halve(self.step, self.micro_batch, f"out of memory on {self.device.type}")
            _log.warning("step %d: %s; micro-batch is now %d", self.step, message, self.micro_batch)

    # --- validation --------------------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        if self.step == 0 or len(self.validation_rows) == 0 or (self.history and self.history[-1]["step"] == self.step):
            return False
        every = self.recipe.validate_every_steps
        at_end = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
        return at_end or (every is not None and self.step % every == 0)

    @torch.no_grad()
    def _validate(self) -> bool:
        """Score the validation rows, nats per token; False if a stop is requested in between."""
        self.model.eval()
        try:
            total = 0.0
            for first in range(0, len(self.validation_rows), self.micro_batch):
                if self.stop.requested:
                    return False
                rows_BL = self.validation_rows[first : first + self.micro_batch]
                ids_BL = torch.from_numpy(rows_BL.astype(np.int64)).to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    total += token_nll(self.model, ids_BL).double().sum().item()
        finally:
            self.model.train()
        rows, length = self.validation_rows.shape
        self.history.append({"step": self.step, "nll": total / (rows * (length - 1))})
        self._record(validation_nll=self.history[-1]["nll"])
        return True

    def _best(self) -> dict[str, Any] | None:
        return min(self.history, key=lambda entry: (entry["nll"], entry["step"]), default=None)

    # --- saving and restoring ----------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        if self._saved_step == self.step or self.step == 0:
            return False
        best = self._best()
        return (
            self.step % self.recipe.save_every_steps == 0
            or self.step % self.steps_per_epoch == 0
            or self.step == self.total_steps
            or (best is not None and best["step"] == self.step)
            or time.monotonic() - self._saved_at >= 60 * self.recipe.save_every_minutes
        )

    def _save(self, validated: bool = True) -> None:
        began = time.monotonic()
        self._flush()
        state = {
            "step": self.step,
            "validated": validated,
            "epoch": self.step // self.steps_per_epoch,
            "batch": self.step % self.steps_per_epoch,
            "total_steps": self.total_steps,
            "best": self._best(),
            "validations": self.history,
            "micro_batches": self.ledger.history(),
            "constraint": describe_constraint(self.constraint),
            "next": self._next_fingerprint(),
            "identity": self.identity,
        }
        self.checkpoints.publish(
            self.step,
            weights_of(self.model, self.constraint),
            optimizer_tensors(self.optimizer, self.trainable),
            state,
        )
        best = self._best()
        self.checkpoints.prune(best["step"] if best else None)
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._slowest_save_s = max(self._slowest_save_s, self._saved_at - began)
        self.attempt.update()
        self.timing.append(
            {
                "step": self.step,
                "seconds": round(self._saved_at - self._began, 3),
                "slowest_step_s": round(self._slowest_step_s, 4),
                "slowest_save_s": round(self._slowest_save_s, 4),
            }
        )

    def _restore(self) -> None:
        """Take up the newest checkpoint, or publish the start."""
        self.checkpoints.sweep()
        checkpoint = self.checkpoints.newest()
        if checkpoint:
            check_identity(checkpoint, self.identity)
            self._load(checkpoint)
        else:
            start = {"step": 0, "constraint": describe_constraint(self.constraint), "identity": self.identity}
            self.checkpoints.publish(0, weights_of(self.model, self.constraint), None, start)
        self._saved_step = self.step if checkpoint is None or checkpoint.state.get("validated", True) else -1
        self._forget_metrics_beyond()
        self._choose_micro_batch()
        self.attempt.begin(self.step)

    def _load(self, checkpoint: Checkpoint) -> None:
        put_weights(checkpoint, self.model, self.constraint)
        self.step = checkpoint.state["step"]
        if checkpoint.is_start:
            return
        load_optimizer_tensors(self.optimizer, self.trainable, checkpoint.optimizer())
        self.history = checkpoint.state["validations"]
        if checkpoint.state["next"] != self._next_fingerprint():
            raise UsageError(
                f"{checkpoint.path}: this software draws other random numbers or another order of rows than the one it "
                f"was made with; use the versions that the run's records name, or start again with --fresh"
            )

    def _choose_micro_batch(self) -> None:
        self.micro_batch = self.ledger.at(self.step, self.first_micro_batch)
        self.micro_batch = self.ledger.follow_other_arms(self.step, self.micro_batch)
        if reason := self.attempt.why_last_died_of_memory(self.step):
            self.micro_batch = self.ledger.halve(self.step, self.micro_batch, reason)
            _log.warning("%s: micro-batch is now %d", reason, self.micro_batch)

    def _next_fingerprint(self) -> str:
        """Return a hash of what the next step will draw: the random streams, and which rows."""
        seed_streams(self.seed, "train", self.step, 0)
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        chosen_B = batch_rows(
            self.seed, epoch, batch * self.effective_batch, self.effective_batch, len(self.train_rows)
        )
        return hashlib.sha256(streams_fingerprint().encode() + chosen_B.tobytes()).hexdigest()

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _record(self, **values: float) -> None:
        self._pending.append({"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 6), **values})
        if time.monotonic() - self._flushed_at >= _FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self.metrics.append(*self._pending)
        self._pending, self._flushed_at = [], time.monotonic()

    def _forget_metrics_beyond(self) -> None:
        validated = {entry["step"] for entry in self.history}
        self.metrics.truncate(
            lambda line: line["step"] in validated if "validation_nll" in line else line["step"] <= self.step
        )

    def _tokens(self) -> int:
        return self.step * self.effective_batch * self.train_rows.shape[1]

    def _set_gradient_checkpointing(self) -> None:
        if self.recipe.gradient_checkpointing:
            model: Any = self.model
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
