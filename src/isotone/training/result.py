"""What a training returns: how far it has come, and which checkpoints hold it."""

from dataclasses import dataclass
from typing import Any


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
        tokens: training tokens read, by all processes; of pairs, with the padding of their rows.
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
