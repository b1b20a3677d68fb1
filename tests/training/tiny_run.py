"""A training run of a second: a GPT-NeoX of two layers with dropout, 45 rows, 11 steps an epoch."""

import os
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from isotone import records
from isotone.config import Training
from isotone.constraint import constrain
from isotone.interruption import StopFlag
from isotone.training import Budget, Trainer, TrainResult

VOCABULARY, LENGTH, STEPS_PER_EPOCH = 64, 16, 11
RECIPE = Training(epochs=1, micro_batch=2, accumulation=2, lr=1e-2, save_every_steps=3, validate_every_steps=4)


class RandomRows:
    """45 rows to train on: 11 batches of 4, and one row left over; 6 to validate on."""

    fingerprint = "random"

    def rows(self, split: str) -> np.ndarray:
        rng = np.random.default_rng(0 if split == "train" else 1)
        return rng.integers(0, VOCABULARY, (45 if split == "train" else 6, LENGTH), dtype=np.uint16)


def tiny_model(dropout: float = 0.1) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        hidden_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def trainer(folder: Path, parametrization: str | None = None, recipe: Training = RECIPE, **options: Any) -> Trainer:
    """Return a trainer on ``folder`` as a new process would make it: from the pretrained weights."""
    model = tiny_model(options.pop("dropout", 0.1))
    anneal, start = options.pop("anneal", None), "unchanged" if parametrization == "sign_frozen" else "absolute"
    start = "unchanged" if anneal else start
    constraint = constrain(model, "mlp_both", parametrization, start, anneal=anneal) if parametrization else None
    defaults: dict[str, Any] = {"seed": 1, "stop": StopFlag(), "identity": {"configuration": "c"}}
    return Trainer(
        model,
        RandomRows(),
        recipe,
        constraint=constraint,
        folder=folder / "checkpoints" / "arm",
        metrics=folder / "train.arm.jsonl",
        **defaults | options,
    )


def train(folder: Path, parametrization: str | None = None, **options: Any) -> TrainResult:
    return trainer(folder, parametrization, **options).run()


def train_in_budgets(folder: Path, epochs: str, parametrization: str | None = None, **options: Any) -> int:
    """Train to the end in processes of so many epochs each; return how many it took."""
    for number in range(1, 100):
        if train(folder, parametrization, budget=Budget(Fraction(epochs)), **options).complete:
            return number
    raise AssertionError("no end in sight")


def outcome(folder: Path) -> dict[str, str]:
    """Return hashes of everything that must not depend on interruptions."""
    last = sorted((folder / "checkpoints" / "arm").glob("step-????????"))[-1]
    files = [*(p for p in last.iterdir()), folder / "train.arm.jsonl"]
    return {f"{last.name}/{p.name}": records.sha256_file(p) for p in sorted(files)}


def in_child(action: Callable[[], object]) -> int:
    """Run something in a process of its own, which may be killed; return its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def was_killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
