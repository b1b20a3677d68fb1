"""Measure tokens per second of a baseline step, a monotonic step and a step of the Hugging Face Trainer.

    python benchmarks/training_speed.py

The three train the same GPT-NeoX on the same rows with the same batch, precision and optimizer, in turns, so that a
machine that slows down slows all of them; figures are medians over all steps. Exits with 3 if isotone's baseline is
slower than the Trainer, or the monotonic step takes more than 5 % longer than the baseline's.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, TrainerCallback, TrainingArguments

from isotone.config import Training
from isotone.constraint import constrain
from isotone.determinism import resolve_device, resolve_precision
from isotone.interruption import StopFlag
from isotone.training import Trainer

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
NUM_WARMUP = 2  # steps of every round that are not counted: allocators and caches fill


class RandomRows:
    """Packed rows of random tokens."""

    fingerprint = "random"

    def __init__(self, num_rows: int, length: int, vocabulary: int):
        self._train = np.random.default_rng(0).integers(0, vocabulary, (num_rows, length), dtype=np.uint16)

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of ``train``; no other split has any."""
        return self._train if split == "train" else self._train[:0]


class Clock(TrainerCallback):
    """Notes when each step of the Hugging Face Trainer ends."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.ends = now, list[float]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(self.now())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--parametrization", default="scaled_softplus")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: for a CPU that others use as well")
    parser.add_argument("--steps", type=int, default=8, help="steps of each in one round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.device = resolve_device(args.device)
    args.precision = resolve_precision(args.precision, args.device)
    print("both:", json.dumps(vars(args)))
    print("isotone:", training(args).model_dump_json())
    with tempfile.TemporaryDirectory() as folder:
        print("Trainer:", json.dumps({k: v for k, v in arguments(args, folder).to_dict().items() if k in SHOWN}))
    seconds = measure(args)
    tokens = args.micro_batch * args.accumulation * args.length
    for name, times in seconds.items():
        print(f"{name:10} {tokens / statistics.median(times):9.0f} tokens/s (median of {len(times)} steps)")
    report(seconds)


SHOWN = ("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "max_grad_norm", "bf16",
         "lr_scheduler_type", "learning_rate", "weight_decay", "torch_compile", "dataloader_num_workers")  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds of every counted step, by name; the order within a round turns, so that none is always first."""
    runs = {"Trainer": huggingface_steps, "baseline": isotone_steps, "monotonic": isotone_steps}
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            with tempfile.TemporaryDirectory() as folder:
                ends = runs[name](args, Path(folder), name)
            steps = [b - a for a, b in itertools.pairwise(ends)]
            seconds[name] += steps[NUM_WARMUP:]
            print(f"round {number + 1}: {name:10} {1e3 * statistics.median(steps[NUM_WARMUP:]):8.1f} ms", flush=True)
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    speed = medians["Trainer"] / medians["baseline"]
    extra = medians["monotonic"] / medians["baseline"] - 1
    print(f"baseline: {speed:.3f} × the Trainer's tokens per second; monotonic: {extra:+.1%} time a step")
    if speed < 1 or extra > 0.05:
        sys.exit(3)


def isotone_steps(args: argparse.Namespace, folder: Path, name: str) -> list[float]:
    """Return when each step of isotone's loop ended."""
    net = model(args).to(args.device)
    constraint = constrain(net, "mlp_both", args.parametrization, "absolute") if name == "monotonic" else None
    ends, now = list[float](), CLOCKS[args.clock]
    Trainer(
        net,
        rows(args),
        training(args),
        constraint=constraint,
        seed=0,
        folder=folder / "checkpoints" / name,
        metrics=folder / "metrics.jsonl",
        stop=StopFlag(),
        autocast=args.precision == "bf16",
        progress=lambda *_: ends.append(now()),
    ).run()
    return ends


def huggingface_steps(args: argparse.Namespace, folder: Path, name: str) -> list[float]:
    """Return when each step of the Hugging Face Trainer ended."""
    clock = Clock(CLOCKS[args.clock])
    packed = [{"input_ids": row, "labels": row} for row in rows(args).rows("train").astype(np.int64)]
    trainer = transformers.Trainer(
        model=model(args), args=arguments(args, folder), train_dataset=packed, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.ends


def model(args: argparse.Namespace) -> GPTNeoXForCausalLM:
    """Return a GPT-NeoX with random weights."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.length,
    )
    config.use_cache = False
    return GPTNeoXForCausalLM(config)


def rows(args: argparse.Namespace) -> RandomRows:
    return RandomRows(args.steps * args.micro_batch * args.accumulation, args.length, args.vocabulary)


def training(args: argparse.Namespace) -> Training:
    return Training(
        micro_batch=args.micro_batch, accumulation=args.accumulation, precision=args.precision, save_every_steps=10**9
    )


def arguments(args: argparse.Namespace, folder: Path | str) -> TrainingArguments:
    recipe = training(args)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.accumulation,
        num_train_epochs=1,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        bf16=args.precision == "bf16",
        use_cpu=args.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    main()
