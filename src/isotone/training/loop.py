"""The training loop, the same for every arm: plain PyTorch that can be killed at any moment and continues bit for bit.

Batch *k* of epoch *e*, the learning rate and the streams that dropout draws from are pure functions of seed and step,
so a checkpoint holds weights, optimizer and one integer. Everything else (budgets, signals, clocks) decides only where
a process stops, never what it computes.

Shapes: B rows, L tokens of a row.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from isotone import records
from isotone.config import Training
from isotone.determinism import seed_streams
from isotone.errors import DivergedError, UsageError
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout
from isotone.scoring import token_nll
from isotone.training.batches import Batches, Rows
from isotone.training.budget import Budget
from isotone.training.checkpoint import (
    OPTIMIZER,
    Checkpoint,
    CheckpointFolder,
    check_identity,
    describe_constraint,
    put_weights,
    trainable_parameters,
    weights_of,
)
from isotone.training.distill import Distillation
from isotone.training.distributed import ALONE, Team
from isotone.training.memory import is_out_of_memory
from isotone.training.metrics import MetricsLog
from isotone.training.micro_batch import MicroBatch
from isotone.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from isotone.training.result import TrainResult
from isotone.training.schedule import learning_rate

T = TypeVar("T")


class Trainer:
    """Trains one arm from its newest checkpoint to its target, or until it is told to stop.

    Args:
        model: a language model of transformers, on its device; trained in place.
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
        team: the processes that share the work, each with a trainer of its own; this one alone unless given.
        edit: returns what the model reads in the place of a step's rows, which stay the labels; None: the rows.
        pairs: the model is an encoder-decoder and the rows are laid out so; the loss is the mean over a step's target
            tokens, whatever micro-batches and processes they are in.
        teacher: brings what ``recipe.distill`` learns from into memory, on the model's device; needed where it has a
            share of the steps.

    Raises:
        UsageError: the data has fewer rows than one effective batch, or the processes cannot share one evenly.
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
        team: Team = ALONE,
        edit: Callable[[Tensor, int], Tensor] | None = None,
        pairs: PairLayout | None = None,
        teacher: Callable[[], nn.Module] | None = None,
    ):
        self.model, self.recipe, self.constraint, self.seed = model, recipe, constraint, seed
        self.team, self.stop = team, team.stop_flag(stop)
        self.budget, self.autocast, self.progress, self.edit = budget or Budget(), autocast, progress, edit
        self.pairs = pairs
        self.batches = Batches(data, recipe, seed)
        self.batches.require_shares(team.size)
        self.total_steps = self.batches.total_steps
        self.validation_rows_NL = data.rows("validation")[: recipe.validation_rows]
        self.checkpoints = CheckpointFolder(folder, recipe.keep_last)
        self.micro_batch = MicroBatch(
            self.checkpoints.path,
            micro_batch or recipe.micro_batch,
            self.batches.effective_batch,
            team,
            recipe.parallel,
        )
        self.identity = {
            **(identity or {}),
            "data": data.fingerprint,
            "seed": str(seed),
            "steps": f"{self.total_steps} of {self.batches.effective_batch} rows",
            "micro-batch": str(self.micro_batch.first),
            "autocast": str(autocast),
        }
        self.divided = team.size > 1 and recipe.parallel == "fsdp"
        self._divide(model, constraint)
        self.distillation: Distillation | None = None
        if recipe.distill.share:
            assert teacher is not None
            self.distillation = Distillation(recipe.distill, teacher, self._divide, self.total_steps, pairs)
        self.trainable = trainable_parameters(model, constraint)
        self.optimizer = build_optimizer(self.trainable, recipe, set(constraint.names) if constraint else set())
        self.device = next(model.parameters()).device
        self.metrics = MetricsLog(metrics)
        self.timing = records.JsonLines(self.checkpoints.path / "timing.jsonl")
        self.step, self.history = 0, list[dict[str, Any]]()
        self._saved = (-1, False)  # step, and whether its validation is in
        self._saved_at = 0.0
        self._slowest_s = {"step": 0.0, "validation": 0.0, "save": 0.0}

    def _divide(self, model: nn.Module, constraint: Any = None) -> None:
        if self.divided:
            from isotone.training.sharding import shard

            shard(model, constraint, self.team)

    # --- the course of a run -----------------------------------------------------------------------------------------

    def run(self, until: int | None = None) -> TrainResult:
        """Train from the newest checkpoint on; return at the target or at a safe stop, with everything saved.

        Args:
            until: step at which to return before the target, whose schedule holds; call again to go on.

        Raises:
            DiskFullError: a save found no space; the checkpoint before it is intact.
            UsageError: the newest checkpoint belongs to another identity.
            DivergedError: the loss is not finite.
            IsotoneError: no checkpoint is valid, or one row does not fit in memory.
        """
        self._restore()
        leaves_trace = False  # but where a process is killed, be it another one
        try:
            self._saved_at = time.monotonic()
            self._begin_training_mode()
            reason = self._train(self.total_steps if until is None else until)
            self._save_if_new()
        except Exception as error:
            if (lost := self.team.lost_peer(error)) is None:
                raise
            leaves_trace = True
            raise lost from error
        finally:
            if not leaves_trace:
                self.micro_batch.end()
        self.model.eval()
        return self.team.first(lambda: self._result(reason))

    def _train(self, until: int) -> str | None:
        """Alternate boundaries and steps; return why it ended, None at the step to go to."""
        while True:
            if self._validation_is_due() and not self._with_less_memory(self._validate):
                return self.stop.requested
            if self.team.first(self._save_is_due):
                self._save_if_new()
            if self.step >= until:
                return None
            if reason := self.stop.requested or self._why_budget_ends():
                return reason
            if self.distillation:
                self.distillation.prepare(self.step)
            began = time.monotonic()
            losses = self._with_less_memory(self._gradients)
            if losses is None:
                return self.stop.requested
            if not self.divided:  # there the backward pass has summed them
                self.team.sum_gradients(self.model.parameters())
            self._apply_gradients({name: self.team.total(loss) for name, loss in losses.items()})
            self._took("step", began)

    def _why_budget_ends(self) -> str | None:
        needed_s = sum(self._slowest_s.values())
        return self.team.first(lambda: self.budget.why_exhausted(self.batches.steps_per_epoch, needed_s))

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
            micro_batches=self.micro_batch.history(),
        )

    # --- one step ----------------------------------------------------------------------------------------------------

    def _gradients(self) -> dict[str, Tensor] | None:
        """Sum the step's gradients over its micro-batches; return the mean losses, None if a stop is requested.

        ``loss`` is what the gradients are of; where something is distilled, its parts have their own names.

        Of several processes each takes its share of the rows, and its part of the sums. Where a share fills whole
        micro-batches, those are the ones that a single process makes, with the same random streams.
        """
        self._forget_gradients()
        ids_BL = self.batches.at(self.step)
        losses_of = self._losses_of(ids_BL)
        read_BL = self.edit(ids_BL, self.step) if self.edit else ids_BL
        both = [self.team.share_of(each).to(self.device).split(self.micro_batch.rows) for each in (read_BL, ids_BL)]
        parts = list(zip(*both, strict=True))
        losses: dict[str, Tensor] = {}
        for number, (part_BL, labels_BL) in enumerate(parts, self.team.rank * len(parts)):
            if self.stop.requested:
                return None
            seed_streams(self.seed, "train", self.step, number)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                found = losses_of(part_BL, labels_BL)
            self.micro_batch.watch()  # here activations are in memory
            found["loss"].backward()
            for name, loss in found.items():
                losses[name] = losses.get(name, torch.zeros_like(loss)) + loss.detach()
        self.team.agree()
        return losses

    def _losses_of(self, ids_BL: Tensor) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        """Return what computes a micro-batch's part of the losses of a step: of what is read, and of its labels."""
        if self.distillation and self.distillation.phase:
            return partial(self.distillation.losses, self.model, counts=self.distillation.counts(ids_BL))
        num_labels = self._num_labels(ids_BL)
        return lambda part_BL, labels_BL: {"loss": self._nll(part_BL, labels_BL).sum() / num_labels}

    def _nll(self, read_BL: Tensor, labels_BL: Tensor | None = None) -> Tensor:
        """Return the loss of every label [B, T]; that of a pair's padding is 0."""
        pairs = None if self.pairs is None else self.pairs.around(read_BL)
        return token_nll(self.model, read_BL, labels_BL=labels_BL, pairs=pairs)

    def _num_labels(self, ids_BL: Tensor) -> int:
        return ids_BL.shape[0] * (ids_BL.shape[1] - 1) if self.pairs is None else self.pairs.num_scored(ids_BL)

    def _apply_gradients(self, losses: dict[str, Tensor]) -> None:
        """Make the optimizer's step; a lack of memory is not met here, for its state is allocated beforehand."""
        rate = learning_rate(self.recipe, self.step, self.total_steps)
        if self.constraint is not None:
            self.constraint.pull_back()
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.clip)
        if self.divided:
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        values, norm_value = {name: loss.item() for name, loss in losses.items()}, norm.item()
        loss_value = values["loss"]
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            if self.team.is_first:
                self.metrics.flush()
            raise self.team.once(
                DivergedError(
                    f"step {self.step + 1}: loss {loss_value}, gradient norm {norm_value}; the last checkpoint is "
                    f"intact. Lower training.lr, or set training.precision: fp32"
                )
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.constraint is not None:
            self.constraint.advance(self.step + 1, self.total_steps)
        self._forget_gradients()
        self.step += 1
        self.budget.spend(1, self.batches.steps_per_epoch)
        self._record(**values, lr=rate, grad_norm=norm_value, tokens=self.batches.tokens(self.step))
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
                self.micro_batch.tell_others(error, self.step, self._saved[0], self.device.type)
            self._forget_gradients()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._save_if_new()
            self.micro_batch.halve(self.step, self.device.type, message)

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
        began, total, rows = time.monotonic(), 0.0, self.micro_batch.rows
        self.model.eval()
        try:
            for round_first in range(0, len(self.validation_rows_NL), rows * self.team.size):
                if self.stop.requested:
                    return False
                first = round_first + self.team.rank * rows
                rows_BL = self.validation_rows_NL[first : first + rows].astype(np.int64)
                is_counted = len(rows_BL) > 0
                if not is_counted:  # all processes compute as often, and one row must do where none is left
                    rows_BL = self.validation_rows_NL[:1].astype(np.int64)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    nll_BT = self._nll(torch.from_numpy(rows_BL).to(self.device))
                total += nll_BT.cpu().double().sum().item() if is_counted else 0.0
            self.team.agree()
            total = self.team.total(torch.tensor(total, dtype=torch.float64)).item()
        finally:
            self.model.train()
        num_labels = self._num_labels(torch.from_numpy(self.validation_rows_NL.astype(np.int64)))
        self.history.append({"step": self.step, "nll": total / num_labels})
        self._record(validation_nll=self.history[-1]["nll"])
        self._took("validation", began)
        return True

    def _best(self) -> dict[str, Any] | None:
        """Return the validation of the lowest loss, from where on the constraint holds."""
        first = 0 if self.constraint is None else self.constraint.first_strict_step(self.total_steps)
        standing = [entry for entry in self.history if entry["step"] >= first]
        return min(standing, key=lambda entry: (entry["nll"], entry["step"]), default=None)

    def _record(self, **values: float) -> None:
        if self.team.is_first:
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
        if not self.divided:
            self.team.require_equal(self.trainable.values(), f"step {self.step}: the weights")
        self.team.first(self.metrics.flush)
        best = self._best()
        self._publish(
            {
                "step": self.step,
                "validated": validated,
                "epochs": str(self.batches.epochs(self.step)),
                "total_steps": self.total_steps,
                "best": best,
                "validations": self.history,
                "micro_batches": self.micro_batch.history(),
                "constraint": describe_constraint(self.constraint),
                "next": self.batches.fingerprint(self.step),
                "identity": self.identity,
            },
            optimizer_tensors(self.optimizer, self.trainable),
        )
        self.team.first(lambda: self.checkpoints.prune(best["step"] if best else None))
        self._saved, self._saved_at = (self.step, validated), time.monotonic()
        self._took("save", began)
        line = {
            "step": self.step,
            "slowest_step_s": round(self._slowest_s["step"], 4),
            "save_s": round(self._saved_at - began, 4),
        }
        self.team.first(lambda: self.timing.append(line))

    def _publish(self, state: dict[str, Any], optimizer: dict[str, Tensor] | None) -> None:
        weights = weights_of(self.model, self.constraint)
        if self.divided:
            self.checkpoints.publish_shards(self.team, self.step, weights, optimizer, state)
        else:
            self.team.first(lambda: self.checkpoints.publish(self.step, weights, optimizer, state))

    def _restore(self) -> None:
        """Take up the newest checkpoint, or publish the start; choose the micro-batch."""
        self.team.first(self.checkpoints.sweep)
        checkpoint = self.team.first(self.checkpoints.newest)
        if checkpoint is None:
            self._publish(
                {"step": 0, "constraint": describe_constraint(self.constraint), "identity": self.identity}, None
            )
        else:
            self.team.first(lambda: check_identity(checkpoint, self.identity))
            put_weights(checkpoint, self.model, self.constraint)
            self.step = checkpoint.state["step"]
        if checkpoint is not None and not checkpoint.is_start:
            self._restore_optimizer(checkpoint)
        self._saved = (self.step, checkpoint is None or checkpoint.state.get("validated", True))
        self._slowest_s["save"] = max((line["save_s"] for line in self.timing.read()[-1:]), default=0.0)
        self.team.first(lambda: self.metrics.resume(self.step, (entry["step"] for entry in self.history)))
        self.micro_batch.begin(self.step, self.total_steps)

    def _restore_optimizer(self, checkpoint: Checkpoint) -> None:
        if self.divided:
            targets = optimizer_tensors(self.optimizer, self.trainable)
            checkpoint.fill(OPTIMIZER, targets, "the optimizer's state")
        else:
            load_optimizer_tensors(self.optimizer, self.trainable, checkpoint.optimizer())
        self.history = checkpoint.state["validations"]
        if checkpoint.state["next"] != self.batches.fingerprint(self.step):
            raise UsageError(
                f"{checkpoint.path}: this software draws other random numbers or another order of rows than the "
                f"one it was made with; use the versions that the run's records name, or start again with --fresh"
            )

    def _begin_training_mode(self) -> None:
        self.model.train()
        if self.recipe.gradient_checkpointing:
            model: Any = self.model  # transformers renamed the method within version 5
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
