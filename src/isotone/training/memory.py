"""The micro-batch that fits: halved when memory runs out, durably recorded before the retry.

The effective batch never changes. Sums are taken in another order with another micro-batch, so results are equal bit
for bit for the same history of micro-batches only, and the history is kept.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import psutil

from isotone import records
from isotone.errors import IsotoneError

_CGROUP = Path("/sys/fs/cgroup")
_NEAR_LIMIT = 0.9
_WATCH_S = 15.0
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory, on any device, from other errors of torch."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)
    )


class MicroBatchLedger:
    """The history of one arm's micro-batch, in a folder that all arms of a run share.

    Args:
        folder: holds one file an arm, ``micro_batch.ARM.jsonl``.
        arm: the arm's name.
    """

    def __init__(self, folder: Path | str, arm: str):
        self.folder, self.arm = Path(folder), arm
        self._lines = records.JsonLines(self.folder / f"micro_batch.{arm}.jsonl")

    def history(self) -> list[dict[str, Any]]:
        """Return this arm's changes, oldest first: step from which it holds, micro_batch, reason."""
        return self._lines.read()

    def at(self, step: int, first: int) -> int:
        """Return the micro-batch of a step; ``first`` is the one that the arm began with."""
        return next((e["micro_batch"] for e in reversed(self.history()) if e["step"] <= step), first)

    def halve(self, step: int, current: int, reason: str) -> int:
        """Record that from ``step`` on the micro-batch is half of ``current``, and return it.

        Raises:
            IsotoneError: it is 1 already.
        """
        if current == 1:
            raise IsotoneError(
                f"arm {self.arm}, step {step}: not enough memory for one row ({reason}); set training."
                f"gradient_checkpointing: true, or a shorter data.sequence_length"
            )
        self._lines.append({"step": step, "micro_batch": current // 2, "reason": reason})
        return current // 2

    def note_processes(self, step: int, current: int, num_processes: int, parallel: str) -> None:
        """Record how many processes share the work from ``step`` on, where it is not what it was before.

        Their sums are taken in another order, so their history is part of the micro-batch's.
        """
        noted = [entry for entry in self.history() if "processes" in entry]
        before = (noted[-1]["processes"], noted[-1]["parallel"]) if noted else (1, None)
        now = (num_processes, parallel if num_processes > 1 else None)
        if now != before or (noted and noted[-1]["step"] > step):
            reason = f"shared by {num_processes} processes" if num_processes > 1 else "one process"
            place = {"processes": now[0], "parallel": now[1]}
            self._lines.append({"step": step, "micro_batch": current, **place, "reason": reason})

    def follow_other_arms(self, step: int, current: int) -> int:
        """Take over, from ``step`` on, a smaller micro-batch that another arm had to take, and return what holds."""
        for file in sorted(self.folder.glob("micro_batch.*.jsonl")):
            arm = file.name.removeprefix("micro_batch.").removesuffix(".jsonl")
            smallest = min((e["micro_batch"] for e in records.JsonLines(file).read()), default=current)
            if arm != self.arm and smallest < current:
                self._lines.append({"step": step, "micro_batch": smallest, "reason": f"as for arm {arm}"})
                current = smallest
        return current


class Attempt:
    """The durable trace of a process at work, from which the next one tells whether this one died of memory.

    A kill for lack of memory is a SIGKILL like any other, and an ordinary SIGKILL must not change a bit of the result.
    So it is taken for one only with evidence: the control group's count of such kills rose since the attempt began, or
    the attempt's memory had come near the limit; and only if it made no progress.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._began: dict[str, Any] = {}
        self._watched_at = -math.inf

    def why_last_died_of_memory(self, step: int) -> str | None:
        """Return the evidence that the attempt before this one was killed for memory without progress, or None.

        Args:
            step: step of the checkpoint that is there now.
        """
        if not self.path.exists():
            return None
        last = records.read_json(self.path)
        if last["step"] != step:
            return None
        before, now = last["oom_kills"], oom_kills()
        if before is not None and now is not None and last["control_group"] == control_group() and now > before:
            return "the process was killed for memory (its control group counted it)"
        if last["memory"] >= _NEAR_LIMIT * last["limit"]:
            return f"the process was killed at {last['memory'] / 1e9:.1f} of {last['limit'] / 1e9:.1f} GB"
        return None

    def begin(self, step: int) -> None:
        """Write the trace of this process, which begins at ``step``."""
        self._began = {"step": step, "oom_kills": oom_kills(), "control_group": control_group()}
        self._write()

    def watch(self) -> None:
        """Write how much memory this process holds, unless that was just done; call where it holds most."""
        if time.monotonic() - self._watched_at >= _WATCH_S:
            self._write()
            self._watched_at = time.monotonic()

    def _write(self) -> None:
        records.write_json(self.path, {**self._began, "memory": memory(), "limit": memory_limit()})

    def end(self) -> None:
        """Remove the trace: this process ends on its own."""
        self.path.unlink(missing_ok=True)


def memory() -> int:
    """Return the memory that this process holds, in bytes, without mapped files, which can be dropped at any time."""
    held = psutil.Process().memory_info()
    return held.rss - getattr(held, "shared", 0)


def memory_limit() -> int:
    """Return the memory that this process may use, in bytes: the machine's, or its control group's where lower."""
    limits = [psutil.virtual_memory().total]
    for file in (_group_folder() / "memory.max", _CGROUP / "memory/memory.limit_in_bytes"):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def oom_kills() -> int | None:
    """Return how many processes of this control group were killed for memory; None where nobody counts."""
    for file in (_group_folder() / "memory.events", _CGROUP / "memory/memory.oom_control"):
        if file.is_file():
            for line in file.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return None


def control_group() -> str:
    """Return the name of this process's control group and of the machine's boot: counts compare within both only."""
    parts = [Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/cgroup")]
    return " ".join(part.read_text().strip() for part in parts if part.is_file())


def _group_folder() -> Path:
    """Return the version 2 control group's folder of this process."""
    file = Path(f"/proc/{os.getpid()}/cgroup")
    lines = file.read_text().splitlines() if file.is_file() else []
    name = next((line[3:] for line in lines if line.startswith("0::")), "/")
    inner = _CGROUP / name.lstrip("/")
    return inner if inner.is_dir() else _CGROUP
