"""Measures a machine's rates with the experiment's own model; run in a process of its own, for it imports torch.

python -m isotone.planning.measure --help    reads an experiment as JSON, prints the rates as JSON
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isotone import records
from isotone.config import BIBLE_PAIRS, Data, Experiment
from isotone.errors import IsotoneError, UsageError
from isotone.models.sources import resolve_source
from isotone.planning.flops import forward_flops, gradient_flops, training_flops
from isotone.planning.rates import Rates
from isotone.planning.shape import read_shape
from isotone.planning.work import LONGEST_WINDOW

if TYPE_CHECKING:
    from torch import nn

MOST_FLOPS = {"cpu": 1e12}
"""Operations of one measured pass at most: longer batches are cut, so that a large model can be measured, too."""

MIN_S = 1.0
"""Seconds that each rate is measured for, at least, after one pass that is not counted."""


def measure(experiment: Experiment, device: str, precision: str, threads: int, clock: str = "wall") -> Rates:
    """Measure in another process, and return what it found.

    Raises:
        UsageError: the model does not fit into memory here, or cannot be read.
    """
    command = [sys.executable, "-m", "isotone.planning.measure", "--device", device, "--precision", precision]
    command += ["--threads", str(threads), "--clock", clock]
    done = subprocess.run(command, input=experiment.model_dump_json(), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"--measure: {reason}")
    return Rates(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Read an experiment from the standard input and print its rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of a machine that others use")
    args = parser.parse_args()
    try:
        print(json.dumps(asdict(Meter(Experiment.model_validate_json(sys.stdin.read()), args).rates())))
    except IsotoneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


SAMPLE_BYTES = 1_000_000
"""Text that packing is measured on."""


class Meter:
    """Times the parts of a run, each for about a second."""

    def __init__(self, experiment: Experiment, args: argparse.Namespace):
        import psutil

        import isotone.pipeline.runner
        import isotone.pipeline.stages.hotflip
        import isotone.pipeline.stages.train
        import isotone.pipeline.stages.triggers  # noqa: F401 - what a stage imports, for its time and memory
        from isotone import determinism

        self.experiment, self.shape = experiment, read_shape(experiment.model)
        self.now = time.process_time if args.clock == "cpu" else time.perf_counter
        process = psutil.Process()
        self.start_s = time.process_time() if args.clock == "cpu" else time.time() - process.create_time()
        self.device, self.low = args.device, args.precision != "fp32"
        determinism.prepare(0, args.threads, args.device)
        self._warm_up()
        self.baseline = process.memory_info().rss

    def rates(self) -> Rates:
        """Return all rates."""
        self._require_memory()
        tokenizer_s, vocabulary_s, pack = self._tokenizer()
        model, load = self._load()
        model.to(self.device)
        save = self._save()
        evaluate = self._evaluate(model)
        attack = evaluate if self.shape.encoder_layers else self._attack(model)  # passes over whole pairs, both
        train, optimizer = self._train(model)
        return Rates(
            train=train,
            evaluate=evaluate,
            attack=attack,
            optimizer=optimizer,
            load=load,
            save=save,
            pack=pack,
            tokenizer_s=tokenizer_s,
            vocabulary_s=vocabulary_s,
            start_s=self.start_s,
            baseline=self.baseline,
        )

    def _warm_up(self) -> None:
        """Run what is run, on next to nothing, so that its code is in memory."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from isotone.scoring import token_nll

        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=self.device in ("cpu", "cuda"))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.low):
            token_nll(model, torch.randint(64, (2, 16), device=self.device)).sum().backward()
        optimizer.step()

    def _require_memory(self) -> None:
        import psutil

        needed, free = 20 * self.shape.num_parameters, psutil.virtual_memory().available
        if self.device == "cpu" and needed > free:
            raise UsageError(
                f"{self.shape.source} needs {needed / 1e9:.0f} GB to be measured; {free / 1e9:.0f} are free"
            )

    def _timed(self, work: Callable[[], object]) -> float:
        """Return the median of a work's seconds."""
        work()
        self._wait()
        times: list[float] = []
        while sum(times) < MIN_S:
            began = self.now()
            work()
            self._wait()
            times.append(self.now() - began)
        return statistics.median(times)

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def _load(self) -> tuple["nn.Module", float | None]:
        """Return the model, with its own weights where they are here (then timed), else with random ones."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        from isotone.models import load_model

        config = self.experiment.model
        if resolve_source(config.source, config.gguf_file).local:
            began = self.now()
            model = load_model(config.source, gguf_file=config.gguf_file, attention=config.attention)
            return model, 4 * self.shape.num_parameters / (self.now() - began)
        sizes = {key: value for key, value in self.shape.config.items() if key not in ("model_type", "dtype")}
        made = AutoConfig.for_model(self.shape.model_type, **sizes)
        family: Any = AutoModelForSeq2SeqLM if self.shape.encoder_layers else AutoModelForCausalLM
        random: Any = family.from_config(made, attn_implementation=config.attention)
        random.config.use_cache = False
        return random.eval(), None

    def _rows(self, rows: int, length: int, factor: float = 1) -> tuple[int, int]:
        """Return a batch that is cut to ``MOST_FLOPS``."""
        most = MOST_FLOPS.get(self.device, 1e15)
        while rows > 1 and factor * forward_flops(self.shape, rows, length, length) > most:
            rows = rows // 2
        while length > 64 and factor * forward_flops(self.shape, rows, length, length) > most:
            length = length // 2
        return rows, length

    def _ids(self, rows: int, length: int) -> Any:
        import torch

        return torch.randint(self.shape.vocabulary, (rows, length), device=self.device)

    def _pairs(self, length: int) -> Any:
        """Return how rows of so many tokens lie where the model is an encoder-decoder, without padding; else None."""
        from isotone.pairs import PairLayout

        data = self.experiment.data
        return PairLayout(length * data.source_length // data.row_length, -1) if self.shape.encoder_layers else None

    def _evaluate(self, model: "nn.Module") -> float:
        import torch

        from isotone.evaluation.windows import LOGIT_ELEMENTS
        from isotone.scoring import token_nll

        config = self.experiment.evaluation
        longest = config.context or min(self.shape.context, LONGEST_WINDOW)
        if self.shape.encoder_layers:
            longest = self.experiment.data.row_length
        fits = max(1, LOGIT_ELEMENTS // (longest * self.shape.vocabulary))
        rows, length = self._rows(min(config.batch_size, fits), longest)
        ids_BL = self._ids(rows, length)
        with torch.no_grad():
            seconds = self._timed(lambda: token_nll(model, ids_BL, pairs=self._pairs(length)))
        return forward_flops(self.shape, rows, length, self._scored(length)) / seconds

    def _scored(self, length: int) -> int:
        pairs = self._pairs(length)
        return length - (1 if pairs is None else pairs.source)

    def _attack(self, model: "nn.Module") -> float:
        from isotone.attacks.scoring import Target, frozen
        from isotone.pairs import PairLayout

        config = self.experiment.attacks
        length = config.protocol.length
        rows, _ = self._rows(16, length)
        source = config.protocol.source
        pairs = PairLayout(source, -1) if source else None
        scored = slice(length - config.protocol.num_scored, length)
        ids_BL = self._ids(rows, length)
        with frozen(model):
            target = Target(model, scored, pairs=pairs)
            forward_s = self._timed(lambda: target.nats(ids_BL))
            half = max(1, rows // 2)
            gradient_s = self._timed(lambda: target.gradient(ids_BL[:half]))
        kept = config.protocol.num_scored
        forward = forward_flops(self.shape, rows, length, kept)
        # as they come in searches: about one gradient for the forwards of a batch or more
        return (forward + gradient_flops(self.shape, half, length, kept)) / (forward_s + gradient_s)

    def _train(self, model: "nn.Module") -> tuple[float, float]:
        import torch
        from torch import nn

        from isotone.scoring import token_nll
        from isotone.training.optimizer import build_optimizer

        recipe = self.experiment.training
        rows, length = self._rows(recipe.micro_batch, self.experiment.data.row_length, 3)
        ids_BL = self._ids(rows, length)
        optimizer = build_optimizer(dict(model.named_parameters()), recipe)
        model.train()
        if recipe.gradient_checkpointing:
            whole: Any = model
            enable = getattr(whole, "activation_checkpointing_enable", None) or whole.gradient_checkpointing_enable
            enable({"use_reentrant": False})

        def gradients() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.low):
                loss = token_nll(model, ids_BL, pairs=self._pairs(length)).sum() / ids_BL.numel()
            loss.backward()

        def step() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()

        train_s, step_s = self._timed(gradients), self._timed(step)
        target = self._scored(length) if self.shape.encoder_layers else None
        flops = training_flops(self.shape, rows, length, recipe.gradient_checkpointing, target)
        return flops / train_s, self.shape.num_parameters / step_s

    def _save(self) -> float:
        """Return bytes a second of a checkpoint's way: serialized, written, synced, read back and hashed."""
        import torch

        from isotone.training.checkpoint import CheckpointFolder

        num_entries = 1 << 24
        with tempfile.TemporaryDirectory() as folder:
            began = self.now()
            CheckpointFolder(Path(folder)).publish(1, {"weights": torch.zeros(num_entries)}, None, {})
            return 4 * num_entries / (self.now() - began)

    def _tokenizer(self) -> tuple[float | None, float | None, float | None]:
        """Return the seconds to load the tokenizer and to find what attacks may write, and the rate of packing.

        None where it would have to be fetched; the last one also where the corpus would.
        """
        from isotone.attacks import Vocabulary
        from isotone.models import load_tokenizer

        config = self.experiment.model
        if not resolve_source(config.source, config.gguf_file).local:
            return None, None, None
        load_tokenizer(config.source, gguf_file=config.gguf_file)  # what it imports is not counted
        began = self.now()
        tokenizer = load_tokenizer(config.source, gguf_file=config.gguf_file)
        loaded = self.now()
        Vocabulary.from_tokenizer(tokenizer, self.shape.vocabulary)
        found = self.now()
        return loaded - began, found - loaded, self._pack(tokenizer)

    def _pack(self, tokenizer: Any) -> float | None:
        """Return bytes of the corpus a second that are tokenized, compared and packed."""
        from isotone.config import WEB_BIBLE
        from isotone.data.corpora import open_corpus
        from isotone.data.packing import prepare_data
        from isotone.interruption import StopFlag

        data = self.experiment.data
        bundled = data.source in (WEB_BIBLE, BIBLE_PAIRS)
        if data.sources or not (bundled or Path(data.source).expanduser().exists()):
            return None
        with tempfile.TemporaryDirectory() as folder:
            sample, num_bytes = Path(folder) / "sample.jsonl", 0
            lines = []
            for document in open_corpus(data).read(0):
                text = " ".join(filter(None, (document.text, document.target)))
                lines.append({"text": text})
                num_bytes += len(text.encode())
                if num_bytes >= SAMPLE_BYTES:
                    break
            records.write_bytes(sample, records.dump_json_lines(lines))
            part = Data(source=str(sample), sequence_length=min(64, self.shape.context))
            began = self.now()
            prepare_data(part, tokenizer, Path(folder) / "packed", max_context=self.shape.context, stop=StopFlag())
            return num_bytes / (self.now() - began)


if __name__ == "__main__":
    main()
