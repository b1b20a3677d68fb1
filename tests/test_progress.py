"""Long work says how far it is: a bar with the time left on a terminal, few plain lines in a log."""

import io
import os
import pty
import subprocess
import sys

import pytest

from isotone.progress import format_duration, progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_log_gets_one_line_an_interval_with_the_time_left() -> None:
    clock, log = Clock(), io.StringIO()
    with progress("train baseline", 100, interval_s=10, stream=log, clock=clock) as bar:
        for step in range(1, 101):
            clock.now_s += 1
            bar.update(step, f"loss {4 - step / 100:.2f}")
    lines = log.getvalue().splitlines()
    assert len(lines) == 10  # at 10, 20, … 90 seconds, and the end
    assert lines[0] == "train baseline: 10/100 steps (10 %), about 2 min left · loss 3.90"
    assert lines[-1] == "train baseline: 100/100 steps in 2 min · loss 3.00"


def test_time_left_of_a_resumed_run_counts_only_this_process() -> None:
    clock, log = Clock(), io.StringIO()
    with progress("train", 1000, interval_s=20, stream=log, clock=clock) as bar:
        for step in range(900, 911):  # 900 steps were done before
            clock.now_s += 2
            bar.update(step)
    assert "909/1000 steps (90 %), about 3 min left" in log.getvalue()


def test_slow_batches_have_a_time_left_too() -> None:
    clock, log = Clock(), io.StringIO()
    with progress("hotflip", 48, unit="document", interval_s=15, stream=log, clock=clock) as bar:
        for done in (8, 16, 24):
            clock.now_s += 60
            bar.update(done)
    assert log.getvalue().splitlines()[1] == "hotflip: 16/48 documents (33 %), about 4 min left"


def test_total_may_be_known_only_later() -> None:
    clock, log = Clock(), io.StringIO()
    with progress("evaluate", 1, unit="batch", interval_s=5, stream=log, clock=clock) as bar:
        for done in range(5):
            bar.set(done, 4)
            clock.now_s += 3
    assert log.getvalue().splitlines() == [
        "evaluate: 2/4 batches (50 %), about 6 s left",
        "evaluate: 4/4 batches in 15 s",
    ]


def test_stopped_work_is_not_called_finished() -> None:
    log = io.StringIO()

    def stopped() -> None:
        with progress("evaluate", 10, stream=log) as bar:
            bar.update(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert log.getvalue() == "evaluate: 4/10 steps (40 %) after 0 s, not finished\n"


def test_terminal_shows_a_bar_and_keeps_its_cursor_and_stdout_its_lines() -> None:
    program = (
        "import time\n"
        "from isotone.progress import progress\n"
        "with progress('train [b]baseline[/b]', 40) as bar:\n"
        "    for step in range(41):\n"
        "        bar.update(step, '[red]loss')\n"
        "        time.sleep(.01)\n"
        "    print('a result')\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    ran = subprocess.run([sys.executable, "-c", program], stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert ran.returncode == 0
    assert "train [b]baseline[/b]" in shown
    assert "[red]loss" in shown
    assert "40/40" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert ran.stdout == b"a result\n"


def test_module_is_light_to_import() -> None:
    program = "import sys, isotone.progress; sys.exit('rich' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
