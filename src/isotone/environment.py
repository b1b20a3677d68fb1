"""Describes the machine and the software that made a result; imports nothing heavy until asked for the device."""

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from isotone.errors import UsageError

PACKAGES = (
    "isotone", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "scipy", "pydantic",
    "rouge-score",
)  # fmt: skip
"""Whose versions can change a figure."""


def require_platform() -> None:
    """Refuse systems on which signals and atomic renames do not mean what isotone relies on.

    Raises:
        UsageError: this is neither Linux nor macOS.
    """
    if sys.platform != "linux" and sys.platform != "darwin":
        raise UsageError(
            f"isotone runs on Linux and macOS; this is {platform.system() or sys.platform} (on Windows, use WSL 2)"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a figure; ``absent`` for one not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def cpu_cores() -> int:
    """Return the number of cores that this process may use: affinity and, on Linux, the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        share, _, period = quota.read_text().partition(" ")
        if share != "max":
            cores = min(cores, max(1, round(int(share) / int(period))))
    return cores


def free_disk_bytes(folder: Path | str) -> int:
    """Return the free bytes of the file system that holds a folder (or, before it exists, its nearest parent)."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    import psutil

    return psutil.virtual_memory().total


def gpu_line() -> str:
    """Return the line that is logged before a job that may use a GPU: name, memory and driver, or why there is none."""
    import torch

    if torch.cuda.is_available():
        number = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(number)
        return f"GPU {number}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {_driver()}"
    if torch.backends.mps.is_available():
        return f"GPU: Apple {platform.machine()} (mps), memory shared with the CPU"
    return f"no GPU: running on the CPU ({platform.machine()}, {cpu_cores()} cores, {torch.get_num_threads()} threads)"


def provenance(folder: Path | str) -> dict[str, Any]:
    """Return what a record says about the machine that made it, JSON-able.

    Args:
        folder: the run directory, whose free space is told.
    """
    import torch

    return {
        "packages": versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": gpu_line(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "free_disk_bytes": free_disk_bytes(folder),
    }


def _driver() -> str:
    """Return the NVIDIA driver's version, from its own library if installed (extra ``gpu``), else from the kernel."""
    try:
        import pynvml
    except ImportError:
        kernel = Path("/proc/driver/nvidia/version")
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", kernel.read_text()) if kernel.is_file() else None
        return found[1] if found else "unknown"
    pynvml.nvmlInit()
    version = pynvml.nvmlSystemGetDriverVersion()
    pynvml.nvmlShutdown()
    return version
