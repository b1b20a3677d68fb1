"""Which rows a step reads: a pure function of seed and step, so the data position of a run is one integer.

Shapes: B rows, L tokens of a row.
"""

import hashlib
import math
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from isotone.config import Training, epochs_as_fraction
from isotone.data.order import batch_rows
from isotone.determinism import seed_streams, streams_fingerprint
from isotone.errors import UsageError


class Rows(Protocol):
    """What training needs of packed data."""

    @property
    def fingerprint(self) -> str:
        """Hash of the packed data."""

    def rows(self, split: str) -> np.ndarray:
        """Return the token rows of ``train`` or ``validation``, unsigned integers [num_rows, L]."""


class Batches:
    """The batches of one training.

    An epoch has floor(rows / effective batch) steps; the rows left over are other ones in every epoch. The target is
    ceil(epochs × steps per epoch) steps.

    Args:
        data: packed rows.
        recipe: ``epochs``, ``micro_batch`` and ``accumulation``.
        seed: the run's seed.

    Attributes:
        effective_batch: rows of one optimizer step.
        steps_per_epoch: optimizer steps of one pass.
        total_steps: optimizer steps of the target.

    Raises:
        UsageError: there are fewer rows than one effective batch.
    """

    def __init__(self, data: Rows, recipe: Training, seed: int):
        self.seed, self._rows_NL = seed, data.rows("train")
        self.effective_batch = recipe.micro_batch * recipe.accumulation
        self.steps_per_epoch = len(self._rows_NL) // self.effective_batch
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"training.micro_batch × training.accumulation is {self.effective_batch} rows, but there are only "
                f"{len(self._rows_NL)} training rows; use a smaller batch or a shorter data.sequence_length"
            )
        self.total_steps = math.ceil(epochs_as_fraction(recipe.epochs) * self.steps_per_epoch)

    def at(self, step: int) -> Tensor:
        """Return the token ids of a step's batch, int64 [B, L], on the CPU."""
        return torch.from_numpy(self._rows_NL[self._chosen(step)].astype(np.int64))

    def require_shares(self, num_processes: int) -> None:
        """Refuse a number of processes that cannot share a batch evenly.

        Raises:
            UsageError: names the settings to change.
        """
        if self.effective_batch % num_processes:
            raise UsageError(
                f"training.micro_batch × training.accumulation is {self.effective_batch} rows, which {num_processes} "
                f"processes cannot share evenly; start a number of processes that divides it"
            )

    def epochs(self, num_steps: int) -> Fraction:
        """Return how many epochs so many steps are."""
        return Fraction(num_steps, self.steps_per_epoch)

    def tokens(self, num_steps: int) -> int:
        """Return how many tokens so many steps read."""
        return num_steps * self.effective_batch * self._rows_NL.shape[1]

    def ends_epoch(self, step: int) -> bool:
        """Tell whether an epoch is complete after so many steps."""
        return step % self.steps_per_epoch == 0

    def fingerprint(self, step: int) -> str:
        """Return a hash of what a step will draw, its random streams and its rows: the tripwire of a checkpoint."""
        seed_streams(self.seed, "train", step, 0)
        return hashlib.sha256(streams_fingerprint().encode() + self._chosen(step).tobytes()).hexdigest()

    def _chosen(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, self.steps_per_epoch)
        first = batch * self.effective_batch
        return batch_rows(self.seed, epoch, first, self.effective_batch, len(self._rows_NL))
