"""How fast a machine is: measured here and kept, or stated in the site profile; and it says which."""

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from isotone import records
from isotone.cluster import Device
from isotone.config import Experiment
from isotone.planning.shape import ModelShape

UTILIZATION = 0.4
"""Share of a stated peak that is reached, unless the profile says otherwise."""


@dataclass(frozen=True)
class Rates:
    """Rates of a machine for one model; None: not known.

    Attributes:
        train: operations a second of forward and backward passes over weights.
        evaluate: operations a second of passes that score whole texts, in fp32.
        attack: operations a second of attacks, in fp32.
        optimizer: entries a second that an optimizer step updates.
        load: bytes of weights a second that are read into memory.
        save: bytes a second that are written, synced, read back and hashed.
        pack: bytes of text a second that are tokenized, compared and packed.
        tokenizer_s: seconds to load the tokenizer.
        vocabulary_s: seconds to find out what attacks may write.
        start_s: seconds until a process has imported everything.
        baseline: bytes of memory that it holds once it has computed something small.
    """

    train: float | None = None
    evaluate: float | None = None
    attack: float | None = None
    optimizer: float | None = None
    load: float | None = None
    save: float | None = None
    pack: float | None = None
    tokenizer_s: float | None = None
    vocabulary_s: float | None = None
    start_s: float | None = None
    baseline: float | None = None


REFERENCE = Rates(
    optimizer=4e8,
    load=2e8,
    save=2e8,
    pack=1e6,
    tokenizer_s=0.5,
    vocabulary_s=1.5,
    start_s=4.0,
    baseline=450_000_000,
)
"""What a processor does beside the model, where it was not measured: orders of magnitude, and rows say "assumed"."""


def stated(device: Device) -> Rates:
    """Return the rates that a profile states for a device: its peak × its utilization.

    Evaluation and attacks compute in fp32 without TF32 (determinism.py), for which a device has a peak of its own.
    """
    share = UTILIZATION if device.utilization is None else device.utilization
    train = 1e12 * device.peak_tflops * share if device.peak_tflops else None
    fp32 = 1e12 * device.peak_tflops_fp32 * share if device.peak_tflops_fp32 else None
    return Rates(train=train, evaluate=fp32, attack=fp32)


def rates_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where measured rates are kept: $XDG_CACHE_HOME/isotone/rates.json, else below ~/.cache."""
    folder = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".cache"
    return Path(folder) / "isotone" / "rates.json"


def rates_key(experiment: Experiment, shape: ModelShape, device: str, precision: str, threads: int) -> str:
    """Return what measured rates belong to: machine, device, threads, model, and the sizes of batches."""
    sizes = [getattr(shape, key) for key in ("model_type", "vocabulary", "hidden", "layers", "query", "key")]
    protocol, training = experiment.attacks.protocol, experiment.training
    batches: list[int | None] = [training.micro_batch, experiment.data.row_length, training.gradient_checkpointing]
    batches += [protocol.length, experiment.evaluation.batch_size, experiment.evaluation.context]
    text = records.hash_json([sizes, shape.intermediate, batches, experiment.model.attention, shape.source])
    return f"{platform.node()} {device} {precision} {threads} threads {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def measured(key: str, environment: Mapping[str, str] = os.environ) -> Rates | None:
    """Return what was measured for a key; None where nothing was."""
    path = rates_file(environment)
    found = records.read_json(path).get(key) if path.is_file() else None
    known = {field.name for field in fields(Rates)}
    return Rates(**{name: value for name, value in found.items() if name in known}) if found else None


def keep(key: str, rates: Rates, environment: Mapping[str, str] = os.environ) -> Path:
    """Add measured rates to what is kept, and return the file."""
    path = rates_file(environment)
    kept = records.read_json(path) if path.is_file() else {}
    records.write_json(path, {**kept, key: asdict(rates)})
    return path
