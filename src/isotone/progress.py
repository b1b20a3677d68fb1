"""Shows how far long work has come: a bar with the time left on a terminal, one plain line an interval in a log."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SPEED_WINDOW_S = 600.0  # one batch of documents may take longer than rich's default of 30 s


class ProgressBar:
    """What ``progress`` yields; report to it as often as convenient."""

    def __init__(
        self, title: str, total: int, unit: str, interval_s: float, rich_progress: "RichProgress", stream: TextIO
    ):
        self._title, self._total, self._interval_s = title, total, interval_s
        self._progress, self._stream = rich_progress, stream
        self._units = f"{unit}es" if unit.endswith(("s", "x", "ch", "sh")) else f"{unit}s"
        self._task: TaskID = rich_progress.add_task(title, total=total, unit=self._units, text="")
        self._text = ""
        self._began_s = self._printed_s = rich_progress.get_time()

    def update(self, done: int, text: str = "") -> None:
        """Say how much is done in all (a resumed run begins above 0) and, as text, what is worth watching."""
        self._text = text
        self._progress.update(self._task, completed=done, text=text)
        now_s = self._progress.get_time()
        if self._progress.disable and now_s - self._printed_s >= self._interval_s and done < self._total:
            self._printed_s = now_s
            left_s = self._progress.tasks[0].time_remaining
            self._print("" if left_s is None else f", about {format_duration(left_s)} left")

    def set(self, done: int, total: int, text: str | None = None) -> None:
        """Say how much is done of how much, where the total is known only once the work has begun."""
        self._total = total
        self._progress.update(self._task, total=total)
        self.update(done, self._text if text is None else text)

    def close(self) -> None:
        """Leave the last state behind: as the standing bar, or as a line that says how long it took."""
        if self._progress.disable:
            taken = format_duration(self._progress.get_time() - self._began_s)
            self._print(f" in {taken}" if self._done >= self._total else f" after {taken}, not finished")

    @property
    def _done(self) -> int:
        return int(self._progress.tasks[0].completed)

    def _print(self, timing: str) -> None:
        share = f" ({100 * self._done // self._total} %)" if self._total and self._done < self._total else ""
        text = f" · {self._text}" if self._text else ""
        print(
            f"{self._title}: {self._done}/{self._total} {self._units}{share}{timing}{text}",
            file=self._stream,
            flush=True,
        )


@contextlib.contextmanager
def progress(
    title: str,
    total: int,
    *,
    unit: str = "step",
    interval_s: float = 15.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressBar]:
    """Show the progress of one piece of work while the block runs; bars are not nested.

    Args:
        title: what is under way, such as "train baseline".
        total: units of work in all; see ``ProgressBar.set`` where that is not known yet.
        unit: singular name of what is counted; it is put in the plural.
        interval_s: seconds between two lines where the stream is no terminal.
        stream: where to write; stderr unless given.
        clock: seconds from any origin; tests give their own.
    """
    stream = stream or sys.stderr
    shown = stream.isatty() and os.environ.get("TERM") != "dumb"
    rich_progress = _rich_progress(stream, shown, clock)
    bar = ProgressBar(title, total, unit, interval_s, rich_progress, stream)
    try:
        with rich_progress:
            if shown:
                rich_progress.console.show_cursor(True)  # a kill must not leave the terminal without one
            yield bar
    finally:
        bar.close()


def _rich_progress(stream: TextIO, shown: bool, clock: Callable[[], float]) -> "RichProgress":
    from rich import progress as parts
    from rich.console import Console

    def plain(field: str, **options: Any) -> parts.TextColumn:
        return parts.TextColumn(field, markup=False, **options)

    return parts.Progress(
        plain("{task.description}"),
        parts.BarColumn(bar_width=24),
        parts.MofNCompleteColumn(),
        plain("{task.fields[unit]}"),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
        plain("left"),
        plain("{task.fields[text]}"),
        console=Console(file=stream),
        refresh_per_second=4,
        speed_estimate_period=_SPEED_WINDOW_S,
        get_time=clock,
        disable=not shown,
        # rich would print what goes to a piped stdout on the terminal instead
        redirect_stdout=sys.stdout.isatty(),
    )


def format_duration(seconds: float) -> str:
    """Return seconds as people say them: 45 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
