"""The curve of a training: one line a step and one a validation, the same with and without interruption."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from isotone import records

_FLUSH_S = 2.0  # lines wait in memory so long at most: what lies beyond a checkpoint is computed again anyway
_log = logging.getLogger(__name__)


class MetricsLog:
    """JSON lines that are durable before the checkpoint they lead to, and forgotten beyond the one resumed from.

    Args:
        path: the file; holds no times, which would differ between equal runs.
    """

    def __init__(self, path: Path | str):
        self._lines = records.JsonLines(path)
        self._pending: list[dict[str, float]] = []
        self._flushed_at = time.monotonic()

    def record(self, step: int, **values: float) -> None:
        """Add a line about a step."""
        self._pending.append({"step": step, **values})
        if time.monotonic() - self._flushed_at >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Make all lines durable; call before a checkpoint is published."""
        if self._pending:
            self._lines.append(*self._pending)
        self._pending, self._flushed_at = [], time.monotonic()

    def resume(self, step: int, validated: Iterable[int]) -> None:
        """Forget all lines that the checkpoint of a step does not know.

        Args:
            step: the checkpoint's step.
            validated: steps whose validations the checkpoint knows.
        """
        known = set(validated)
        self._lines.truncate(lambda line: line["step"] in known if "validation_nll" in line else line["step"] <= step)
        found = sum("validation_nll" not in line for line in self._lines.read())
        if found != step:
            _log.warning("%s has %d of the %d steps so far: its curve has a hole", self._lines.path, found, step)
