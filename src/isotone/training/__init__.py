"""Training: one loop for all arms, checkpoints, budgets, and the micro-batch that fits."""

from isotone.training.budget import Budget
from isotone.training.checkpoint import load_weights, read_checkpoint, save_initial
from isotone.training.loop import Trainer
from isotone.training.memory import MicroBatchLedger
from isotone.training.result import TrainResult

__all__ = ["Budget", "MicroBatchLedger", "TrainResult", "Trainer", "load_weights", "read_checkpoint", "save_initial"]
