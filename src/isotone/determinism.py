"""Makes the same seed give the same bits: kernels, threads, and random streams derived from the seed and the step."""

import hashlib
import os
import random

import numpy as np
import torch

from isotone.errors import UsageError


def resolve_device(device: str) -> str:
    """Return the device to use: what was asked for, or the fastest there is for ``auto``.

    Raises:
        UsageError: the device asked for is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(device, False):
        raise UsageError(
            f"runtime.device: {device} is not available here; available: {', '.join(n for n in there if there[n])}"
        )
    return device


def resolve_threads(threads: int | None) -> int:
    """Return the number of CPU threads: what was asked for, or one for each core this process may use."""
    if threads is not None:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_precision(precision: str, device: str) -> str:
    """Return the precision of training: what was asked for, or bf16 autocast where the device is made for it."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"


def prepare(seed: int, threads: int, device: str) -> None:
    """Set everything that decides bits, for this process: call once, before the first kernel runs.

    Args:
        seed: starts the global streams, which only libraries draw from; isotone derives its own.
        threads: CPU threads of torch; the order of sums depends on it.
        device: ``cpu``, ``cuda`` or ``mps``.
    """
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")  # no TF32 behind an fp32 figure
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # it finds faults in kernels and costs a pass over memory; torch does not declare it to type checkers
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    seed_streams(seed, "start", 0)


def stream_key(seed: int, purpose: str, *position: int) -> int:
    """Return a 63-bit key for one random stream, from the seed, what it is for, and where in the work it is drawn."""
    text = "/".join(map(str, (seed, purpose, *position)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"isotone.stream").digest()) >> 1


def seed_streams(seed: int, purpose: str, *position: int) -> None:
    """Set the global streams (torch on every device, numpy, python) to a function of the arguments alone.

    Layers such as dropout draw from them and cannot be given a generator. Since they are set before every use, no state
    of theirs needs to be saved.
    """
    key = stream_key(seed, purpose, *position)
    torch.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


def streams_fingerprint() -> str:
    """Return a hash of the global CPU streams as they stand: a tripwire for other software behind the same seed."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    digest.update(repr(np.random.get_state(legacy=False)["state"]["key"].tolist()).encode())
    digest.update(repr(random.getstate()).encode())
    return digest.hexdigest()
