"""A training run in miniature, with the real loop, checkpoints and constraint: what ``doctor`` kills and resumes.

    python -m isotone.rehearsal FOLDER DEVICE HOLD_AT_STEP

trains in FOLDER, says ``holding`` after that step, and waits there to be killed.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from isotone import determinism, records
from isotone.config import Training
from isotone.constraint import constrain
from isotone.interruption import StopFlag
from isotone.training import Trainer

SEED = 7
NUM_STEPS = 24
VOCABULARY, LENGTH = 64, 16
_RECIPE = Training(micro_batch=4, accumulation=2, lr=1e-3, save_every_steps=5, validate_every_steps=7)
_WAIT_S = 120.0  # the parent kills long before; a forgotten process ends by itself


class RandomRows:
    """Packed data of random tokens, the same at every call."""

    fingerprint = "rehearsal"

    def rows(self, split: str) -> np.ndarray:
        """Return the token rows of a split, uint16 [num_rows, LENGTH]."""
        effective_batch = _RECIPE.micro_batch * _RECIPE.accumulation
        num_rows = NUM_STEPS * effective_batch if split == "train" else effective_batch
        return np.random.default_rng((SEED, num_rows)).integers(0, VOCABULARY, (num_rows, LENGTH), dtype=np.uint16)


def rehearse(folder: Path, device: str, hold_at: int | None = None) -> str:
    """Train a tiny constrained model in a folder, or go on where a killed rehearsal stopped.

    Args:
        folder: holds checkpoints and metrics.
        device: where the model is trained.
        hold_at: step after which the process waits to be killed.

    Returns:
        A hash of final weights, optimizer and metrics.
    """
    determinism.prepare(SEED, threads=1, device=device)
    model = tiny_model()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    constraint = constrain(model, "mlp_both", "softplus", "absolute")
    arm, metrics = folder / "checkpoints" / "arm", folder / "metrics.jsonl"
    trainer = Trainer(
        model,
        RandomRows(),
        _RECIPE,
        constraint=constraint,
        seed=SEED,
        folder=arm,
        metrics=metrics,
        stop=StopFlag(),
        progress=lambda step, _: _hold() if step == hold_at else None,
    )
    last = arm / trainer.run().checkpoints["last"]
    files = (last / "model.safetensors", last / "optimizer.safetensors", metrics)
    return records.hash_json([records.sha256_file(file) for file in files])


def tiny_model() -> GPTNeoXForCausalLM:
    """Return a GPT-NeoX of two layers with random weights, the same at every call, in eval mode."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def _hold() -> None:
    print("holding", flush=True)
    time.sleep(_WAIT_S)
    sys.exit(1)


if __name__ == "__main__":
    rehearse(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
