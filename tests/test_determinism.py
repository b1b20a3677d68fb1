"""The same seed gives the same streams; the environment is set before Python starts, and no signal is lost then."""

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from isotone import determinism
from isotone.errors import UsageError


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.random()), random.random()


def test_streams_are_a_function_of_seed_purpose_and_position() -> None:
    determinism.seed_streams(1, "train", 5, 0)
    first = draws()
    draws()
    determinism.seed_streams(1, "train", 5, 0)
    assert draws() == first
    for arguments in ((2, "train", 5, 0), (1, "other", 5, 0), (1, "train", 6, 0), (1, "train", 5, 1), (1, "train", 5)):
        determinism.seed_streams(*arguments)  # type: ignore[arg-type]
        assert draws() != first


def test_keys_do_not_depend_on_the_process() -> None:
    assert determinism.stream_key(42, "train", 7) == 8161364119560165585


def test_fingerprint_tells_streams_apart() -> None:
    determinism.seed_streams(1, "train", 0)
    first = determinism.streams_fingerprint()
    determinism.seed_streams(1, "train", 0)
    assert determinism.streams_fingerprint() == first
    random.random()
    assert determinism.streams_fingerprint() != first


def test_prepare_demands_deterministic_kernels() -> None:
    threads = torch.get_num_threads()
    try:
        determinism.prepare(0, threads=1, device="cpu")
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 1
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_a_device_that_is_not_there_is_refused() -> None:
    missing = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in [name for name, there in missing.items() if not there]:
        with pytest.raises(UsageError, match=f"{device} is not available here; available: .*cpu"):
            determinism.resolve_device(device)
    assert determinism.resolve_device("cpu") == "cpu"


@pytest.mark.parametrize(("feature", "precision"), [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")])
def test_bf16_is_chosen_where_the_cpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, feature: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True})
    assert determinism.resolve_precision("auto", "cpu") == precision
    assert determinism.resolve_precision("auto", "mps") == "fp32"


def test_what_is_asked_for_is_what_is_resolved() -> None:
    assert determinism.resolve_precision("bf16", "cpu") == "bf16"
    assert determinism.resolve_threads(3) == 3
    assert determinism.resolve_threads(None) >= 1


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")}
    return subprocess.run(
        [sys.executable, "-c", code], env=bare | environment, capture_output=True, text=True, check=False
    )


SHOW = (
    "import os, sys; from isotone.reexec import ensure_environment; ensure_environment();"
    "print(os.environ['PYTHONHASHSEED'], os.environ['CUBLAS_WORKSPACE_CONFIG'], sys.flags.hash_randomization)"
)


def test_environment_is_set_before_python_starts() -> None:
    assert run_python(SHOW).stdout.split() == ["0", ":4096:8", "0"]


def test_what_the_user_has_set_is_respected() -> None:
    assert run_python(SHOW, PYTHONHASHSEED="7", CUBLAS_WORKSPACE_CONFIG=":16:8").stdout.split()[:2] == ["7", ":16:8"]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_signal_during_the_restart_is_delivered_after_it(name: str) -> None:
    """The signal is sent between the block and the exec; the new process finds it pending and stops safely."""
    code = (
        "import os, signal; from isotone import reexec; from isotone.interruption import StopFlag\n"
        f"real = os.execve; os.execve = lambda *a: (os.kill(os.getpid(), signal.{name}), real(*a))\n"
        "reexec.ensure_environment(); stop = StopFlag(); stop.install(); print(stop.requested)"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, name), done.stderr


def test_number_of_signals_handled_is_that_promised() -> None:
    from isotone.interruption import SIGNALS

    assert {s.name for s in SIGNALS} == {"SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"}
    assert signal.SIGKILL not in SIGNALS
