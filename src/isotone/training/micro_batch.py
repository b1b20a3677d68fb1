"""How many rows one forward pass has: chosen when a training starts, halved in all processes when memory runs out."""

import logging
from pathlib import Path
from typing import Any

from isotone.errors import Stopped
from isotone.training.distributed import PeerOutOfMemoryError, Team
from isotone.training.memory import Attempt, MicroBatchLedger

_log = logging.getLogger(__name__)


class MicroBatch:
    """The micro-batch of one arm, the same in all processes, with its history and the trace of this attempt.

    Args:
        checkpoints: the arm's checkpoints, beside which the history stands.
        first: rows that the arm begins with.
        effective_batch: rows of one optimizer step.
        team: the processes that share the work.
        parallel: how they do: ``ddp`` or ``fsdp``.

    Attributes:
        rows: rows of one forward pass now.
    """

    def __init__(self, checkpoints: Path, first: int, effective_batch: int, team: Team, parallel: str):
        self.first = self.rows = min(first, effective_batch)
        self._share, self._team, self._parallel = effective_batch // team.size, team, parallel
        self._ledger = MicroBatchLedger(checkpoints.parent, checkpoints.name)
        self._attempt = Attempt(checkpoints / "attempt.json")

    def history(self) -> list[dict[str, Any]]:
        """Return all changes so far, of the micro-batch and of the processes that share the work."""
        return self._ledger.history()

    def begin(self, step: int, total_steps: int) -> None:
        """Choose the rows for an attempt that begins at a step, and leave its trace."""
        self.rows = self._team.first(lambda: self._choose(step, total_steps))

    def watch(self) -> None:
        """Note how much memory is in use; call where it is most."""
        if self._team.is_first:
            self._attempt.watch()

    def end(self) -> None:
        """Remove the trace of this attempt: it ends on its own."""
        if self._team.is_first:
            self._attempt.end()

    def halve(self, step: int, device: str, message: str) -> None:
        """Go on with half the rows from a step on, durably recorded.

        Raises:
            IsotoneError: one row is too much already.
        """
        self.rows = self._team.first(lambda: self._ledger.halve(step, self._most_rows, f"out of memory on {device}"))
        if self._team.is_first:
            _log.warning("step %d: %s; micro-batch is now %d", step, message, self.rows)

    def tell_others(self, error: BaseException, step: int, saved_step: int, device: str) -> None:
        """Let the other processes know that this one ran out of memory.

        Raises:
            Stopped: the model is divided: they wait for this one within a pass, where nothing can be told any more.
                What holds from the last checkpoint on is recorded, and the next start has it.
        """
        if self._team.size == 1 or isinstance(error, PeerOutOfMemoryError):
            return
        if self._parallel == "ddp":
            self._team.say_out_of_memory()
            return
        reason = f"out of memory on {device} in process {self._team.rank}"
        current = self._ledger.halve(saved_step, self._most_rows, reason)
        raise Stopped(f"step {step}: {reason}; micro-batch will be {current} from step {saved_step} on")

    @property
    def _most_rows(self) -> int:
        """The most rows of a pass: a process's share may be less than the micro-batch."""
        return min(self.rows, self._share)

    def _choose(self, step: int, total_steps: int) -> int:
        current = self._ledger.follow_other_arms(step, self._ledger.at(step, self.first))
        if reason := self._attempt.why_last_died_of_memory(step):
            current = self._ledger.halve(step, min(current, self._share), reason)
            _log.warning("%s: micro-batch is now %d", reason, current)
        if step < total_steps:
            self._ledger.note_processes(step, current, self._team.size, self._parallel)
        self._attempt.begin(step)
        return current
