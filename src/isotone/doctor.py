"""Checks, offline and in about a minute, whether isotone's promises hold on this machine; a row each."""

import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from isotone import environment, records
from isotone.errors import BlockedError, CheckFailedError, IsotoneError

NEEDED_DISK_BYTES = 2 * 2**30
"""What the bundled run and its checkpoints need, with room."""
NEEDED_MEMORY_BYTES = 3 * 2**30
"""What the bundled run is allowed to use."""

_KILL_AT_STEP = 13  # between two saves, so that work is lost and must be done again
_LARGEST_NATS = 5.0  # the bundled model, trained on this text, is far below; an untrained one is at ln 4096 = 8.3
_START_S = 300.0  # a slower start of Python and torch, on a machine with much else to do, is taken for none


class DoctorError(IsotoneError):
    """A check found what must not be."""


@dataclass(frozen=True)
class Finding:
    """One row of doctor's table."""

    check: str
    holds: bool
    text: str
    seconds: float


def run_doctor(folder: Path = Path("runs"), say: Callable[[str], None] = print) -> list[Finding]:
    """Make all checks and print a row each.

    Args:
        folder: where runs will be; the file system under it is tested in a temporary folder that is removed again.
        say: prints a line.

    Raises:
        CheckFailedError: names the checks that say no.
    """
    findings = []
    say(f"isotone doctor · {environment.versions()['isotone']} · {sys.version.split()[0]} · {folder.absolute()}")
    with _scratch(folder) as scratch:
        for name, check in CHECKS.items():
            finding = examine(name, check, Path(scratch))
            findings.append(finding)
            say(f"{'ok  ' if finding.holds else 'FAIL'}  {name:14}  {finding.text}  ({finding.seconds:.1f} s)")
    if failed := [finding.check for finding in findings if not finding.holds]:
        raise CheckFailedError(f"doctor: {', '.join(failed)}: see the rows marked FAIL")
    say("everything holds")
    return findings


def examine(name: str, check: Callable[[Path], str], scratch: Path) -> Finding:
    """Make one check; whatever it raises is what the row says."""
    began = time.monotonic()
    try:
        holds, text = True, check(scratch)
    except Exception as error:  # any fault of a check is its finding
        holds, text = False, " ".join(f"{type(error).__name__}: {error}".split())
    return Finding(name, holds, text, time.monotonic() - began)


def _scratch(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    """Return a temporary folder on the file system that runs will be on."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        return tempfile.TemporaryDirectory(prefix=".isotone-doctor-", dir=nearest)
    except OSError as error:
        raise CheckFailedError(
            f"doctor: {nearest} cannot be written ({error.strerror}); go to another folder"
        ) from error


# --- the checks: each returns what it found, or raises ----------------------------------------------------------------


def check_platform(scratch: Path) -> str:
    """Linux or macOS, and enough memory."""
    environment.require_platform()
    total = environment.memory_bytes()
    if total < NEEDED_MEMORY_BYTES:
        raise DoctorError(f"{total / 2**30:.1f} GiB of memory; the bundled run needs {NEEDED_MEMORY_BYTES / 2**30:.0f}")
    return f"{sys.platform}, {environment.cpu_cores()} cores, {total / 2**30:.1f} GiB of memory"


def check_configuration(scratch: Path) -> str:
    """Every preset is valid, is read back as it was written, and the seed in the environment is one."""
    from isotone.config_io import dump_yaml, list_presets, load_experiment, resolve_seed

    names = [preset.name for preset in list_presets()]
    for name in names:
        experiment = load_experiment(name)
        path = scratch / f"{name}.yaml"
        records.write_text(path, dump_yaml(experiment))
        if load_experiment(path) != experiment:
            raise DoctorError(f"preset {name} is not read back as it was written")
    return f"{len(names)} presets valid, seed {resolve_seed(load_experiment('pocket'))}"


def check_imports(scratch: Path) -> str:
    """Every module of isotone can be imported, and the packages that decide figures are there."""
    import isotone

    modules = [module.name for module in pkgutil.walk_packages(isotone.__path__, "isotone.")]
    for name in modules:
        if not name.endswith("__main__"):
            import_module(name)
    found = environment.versions()
    if absent := [name for name, version in found.items() if version == "absent"]:
        raise DoctorError(f"not installed: {', '.join(absent)}; install isotone again with its constraints.txt")
    return f"{len(modules)} modules, torch {found['torch']}, transformers {found['transformers']}"


def check_file_system(scratch: Path) -> str:
    """Files are replaced in one step, torn folders are noticed, and there is room."""
    file, folder = scratch / "file", scratch / "published"
    records.write_text(file, "old")
    with open(file) as reader:
        records.write_text(file, "new")
        if (reader.read(), file.read_text()) != ("old", "new"):
            raise DoctorError("a rename changed an open file; this file system cannot replace files in one step")
    records.publish_directory(folder, {"a": b"x" * 4096})
    os.truncate(folder / "a", 4095)
    try:
        records.verify_directory(folder)
    except records.CorruptError:
        free = environment.free_disk_bytes(scratch)
        if free < NEEDED_DISK_BYTES:
            raise DoctorError(f"{free / 1e9:.1f} GB free; {NEEDED_DISK_BYTES / 1e9:.1f} GB are needed") from None
        return f"atomic rename, sync, torn files noticed, {free / 1e9:.0f} GB free"
    raise DoctorError("a truncated file was taken for a whole one")


def check_lease(scratch: Path) -> str:
    """A second writer is turned away, and the lease of a killed one is taken over."""
    from isotone.pipeline.lease import lease

    path = scratch / "lease.json"
    code = (
        "import sys, time; from pathlib import Path; from isotone.pipeline.lease import lease\n"
        "with lease(Path(sys.argv[1]), 'the other'): print('held', flush=True); time.sleep(120)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        _await(other, "held")
        try:
            with lease(path, "doctor's node"):
                raise DoctorError("two processes held the same lease")
        except BlockedError:
            pass
    finally:
        _kill(other)
    with lease(path, "doctor's node"):
        return "a second writer is turned away, a killed one's lease is taken over"


def check_device(scratch: Path) -> str:
    """The device computes, deterministically, what the CPU computes."""
    import torch

    from isotone import determinism

    device = determinism.resolve_device("auto")
    determinism.prepare(seed=0, threads=determinism.resolve_threads(None), device=device)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64)
    product = (a.float().to(device) @ b.float().to(device)).cpu()
    if not torch.equal(product, (a.float().to(device) @ b.float().to(device)).cpu()):
        raise DoctorError(f"{device} gives two results for one product")
    if (product - (a @ b)).abs().max() > 1e-3:
        raise DoctorError(f"{device} multiplies matrices wrongly (largest error {(product - (a @ b)).abs().max():.1e})")
    return environment.gpu_line()


def check_bundled(scratch: Path) -> str:
    """The bundled model and corpus are there, whole, and belong together."""
    import torch

    from isotone.data.bible import web_bible
    from isotone.models import load_model, load_tokenizer
    from isotone.scoring import token_nll

    model, tokenizer = load_model("pocket"), load_tokenizer("pocket")
    ids_BL = tokenizer(next(web_bible()).text, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nats = token_nll(model, ids_BL).mean().item()
    if not nats < _LARGEST_NATS:
        raise DoctorError(f"the bundled model reads its corpus at {nats:.2f} nats a token: its files are not its own")
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {nats:.2f} nats a token on Genesis 1"


def check_determinism(scratch: Path) -> str:
    """Two trainings with one seed give the same weights, optimizer and metrics."""
    first, second = (_rehearse(scratch / name) for name in ("first", "second"))
    if first != second:
        raise DoctorError("two trainings with the same seed differ")
    return "two trainings with one seed are equal bit for bit"


def check_resume(scratch: Path) -> str:
    """A training killed by SIGKILL and started again ends where an uninterrupted one does."""
    from isotone.determinism import resolve_device

    command = [sys.executable, "-m", "isotone.rehearsal", scratch / "killed", resolve_device("auto"), _KILL_AT_STEP]
    killed = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    try:
        _await(killed, "holding")
    finally:
        _kill(killed)
    if not list((scratch / "killed" / "checkpoints" / "arm").glob("step-*")):
        raise DoctorError("a training that was killed left no checkpoint")
    if _rehearse(scratch / "killed") != _rehearse(scratch / "whole"):
        raise DoctorError("a training that was killed and resumed differs from an uninterrupted one")
    return f"killed after step {_KILL_AT_STEP}, resumed, equal bit for bit to an uninterrupted training"


def check_monotonicity(scratch: Path) -> str:
    """The constraint holds after a real step, is certified, and a single wrong sign is found."""
    import torch
    from transformers import ArceeConfig, ArceeForCausalLM

    from isotone.constraint import certify, constrain, fold

    torch.manual_seed(0)
    config = ArceeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        hidden_act="relu",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = ArceeForCausalLM(config).eval()
    constraint = constrain(model, "mlp_both", "softplus", "absolute")
    optimizer = torch.optim.AdamW(constraint.trainable(model).values(), lr=0.1)
    constraint.attach(optimizer)
    ids_BL = torch.arange(32).reshape(2, 16)
    model(ids_BL).logits.square().mean().backward()
    optimizer.step()
    verdict = certify(fold(model)).verdict
    if verdict != "strict":
        raise DoctorError(f"a constrained ReLU model is certified {verdict}, not strict")
    with torch.no_grad():
        model.get_parameter(constraint.names[0])[0, 0] = -1e-6
    if (verdict := certify(model).verdict) != "violated":
        raise DoctorError(f"a weight with the wrong sign was certified {verdict}")
    return "the constraint holds after a step, is certified strict, and one wrong sign is found"


CHECKS: dict[str, Callable[[Path], str]] = {
    "platform": check_platform,
    "configuration": check_configuration,
    "imports": check_imports,
    "file system": check_file_system,
    "lease": check_lease,
    "device": check_device,
    "bundled model": check_bundled,
    "determinism": check_determinism,
    "resume": check_resume,
    "monotonicity": check_monotonicity,
}
"""What is checked, in this order."""


# --- processes -------------------------------------------------------------------------------------------------------


def _rehearse(folder: Path) -> str:
    from isotone.determinism import resolve_device
    from isotone.rehearsal import rehearse

    return rehearse(folder, resolve_device("auto"))


def _await(process: "subprocess.Popen[str]", word: str) -> None:
    """Wait until a process has said a word; one that takes too long is ended."""
    timer = threading.Timer(_START_S, process.kill)
    timer.start()
    try:
        if not any(line.strip() == word for line in process.stdout or ()):
            raise DoctorError(f"the process to be killed ended by itself, or did not start in {_START_S:.0f} s")
    finally:
        timer.cancel()


def _kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
