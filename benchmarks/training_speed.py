"""Measure tokens per second of a baseline step, a monotonic step and a step of the Hugging Face Trainer.

    python benchmarks/training_speed.py

The three train the same GPT-NeoX on the same rows with the same batch, precision and optimizer, one step each in turns,
so that a machine that slows down slows all of them; figures are medians. Exits with 3 if isotone's baseline is slower
than the Trainer beyond noise (2 %), or the monotonic step takes more than 5 % longer than the baseline's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
NOISE = 0.02  # by which the ratios of two runs on a shared machine differed
NUM_WARMUP = 2  # steps that are not counted: allocators and caches fill


class RandomRows:
    """Packed rows of random tokens."""

    fingerprint = "random"

    def __init__(self, num_rows: int, length: int, vocabulary: int):
        self._train = np.random.default_rng(0).integers(0, vocabulary, (num_rows, length), dtype=np.uint16)

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of ``train``; no other split has any."""
        return self._train if split == "train" else self._train[:0]


class Turns:
    """Lets threads work in turns, one step each, and times their steps: what slows the machine slows all of them."""

    def __init__(self, names: Sequence[str], now: Callable[[], float]):
        self._ring, self._now = list(names), now
        self._batons = {name: threading.Semaphore(0) for name in names}
        self._began: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def run(self, work: Mapping[str, Callable[[Callable[[], None]], None]]) -> dict[str, list[float]]:
        """Run all functions, each of which calls what it is given after every step; return seconds of each step."""
        with ThreadPoolExecutor(len(work)) as pool:
            futures = [pool.submit(self._take_part, name, function) for name, function in work.items()]
            self._batons[self._ring[0]].release()
            for future in futures:
                future.result()
        return self.seconds

    def _take_part(self, name: str, function: Callable[[Callable[[], None]], None]) -> None:
        self._wait(name)
        try:
            function(lambda: self._step_ended(name))
        finally:
            after = self._next(name)
            self._ring.remove(name)
            self._batons[after].release()

    def _step_ended(self, name: str) -> None:
        self.seconds[name].append(self._now() - self._began[name])
        self._batons[self._next(name)].release()
        self._wait(name)

    def _wait(self, name: str) -> None:
        self._batons[name].acquire()
        self._began[name] = self._now()

    def _next(self, name: str) -> str:
        return self._ring[(self._ring.index(name) + 1) % len(self._ring)]


class StepEnd(TrainerCallback):
    """Calls a function after each step of the Hugging Face Trainer."""

    def __init__(self, step_ended: Callable[[], None]):
        self._step_ended = step_ended

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Call it."""
        self._step_ended()


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
    parser.add_argument("--steps", type=int, default=30, help="steps of each; the first two are not counted")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.device = resolve_device(args.device)
    args.precision = resolve_precision(args.precision, args.device)
    print("both:", json.dumps(vars(args)))
    print("isotone:", training(args).model_dump_json())
    with tempfile.TemporaryDirectory() as folder:
        print("Trainer:", json.dumps({k: v for k, v in arguments(args, folder).to_dict().items() if k in SHOWN}))
    report(measure(args), args.micro_batch * args.accumulation * args.length)


SHOWN = ("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "max_grad_norm", "bf16",
         "lr_scheduler_type", "learning_rate", "weight_decay", "torch_compile", "dataloader_num_workers")  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds of every counted step, by name."""
    with tempfile.TemporaryDirectory() as folder:
        work = {
            "Trainer": partial(huggingface_steps, args, Path(folder) / "Trainer"),
            "baseline": partial(isotone_steps, args, Path(folder), None),
            "monotonic": partial(isotone_steps, args, Path(folder), args.parametrization),
        }
        seconds = Turns(list(work), CLOCKS[args.clock]).run(work)
    return {name: times[NUM_WARMUP:] for name, times in seconds.items()}


def report(seconds: dict[str, list[float]], tokens: int) -> None:
    """Print the figures; exit with 3 if they are not those that are promised."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:10} {tokens / median:9.0f} tokens/s, {1e3 * median:8.1f} ms a step")
    speed = medians["Trainer"] / medians["baseline"]
    extra = statistics.median(m / b for m, b in zip(seconds["monotonic"], seconds["baseline"], strict=True)) - 1
    print(f"baseline: {speed:.3f} × the Trainer's tokens per second; monotonic: {extra:+.1%} time a step")
    if speed < 1 - NOISE or extra > 0.05:
        sys.exit(3)


def isotone_steps(
    args: argparse.Namespace, folder: Path, parametrization: str | None, step_ended: Callable[[], None]
) -> None:
    """Train with isotone's loop."""
    net = model(args).to(args.device)
    Trainer(
        net,
        rows(args),
        training(args),
        constraint=constrain(net, "mlp_both", parametrization, "absolute") if parametrization else None,
        seed=0,
        folder=folder / "checkpoints" / str(parametrization),
        metrics=folder / f"{parametrization}.jsonl",
        stop=StopFlag(),
        autocast=args.precision == "bf16",
        progress=lambda *_: step_ended(),
    ).run()


def huggingface_steps(args: argparse.Namespace, folder: Path, step_ended: Callable[[], None]) -> None:
    """Train with the Hugging Face Trainer."""
    packed = [{"input_ids": row, "labels": row} for row in rows(args).rows("train").astype(np.int64)]
    trainer = transformers.Trainer(
        model=model(args), args=arguments(args, folder), train_dataset=packed, callbacks=[StepEnd(step_ended)]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


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
