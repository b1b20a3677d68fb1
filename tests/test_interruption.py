"""A signal becomes a request, the first reason stands, and a second interrupt leaves at once."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from isotone.errors import Stopped
from isotone.interruption import SIGNALS, StopFlag


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    """An installed flag; the handlers before it are put back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    flag = StopFlag()
    flag.install()
    yield flag
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request(stop: StopFlag, number: signal.Signals) -> None:
    assert stop.requested is None
    os.kill(os.getpid(), number)
    assert stop.requested == number.name
    with pytest.raises(Stopped, match=f"attack stopped safely .{number.name}.") as raised:
        stop.check("attack")
    assert raised.value.exit_code == 75


def test_the_first_reason_stands(stop: StopFlag) -> None:
    stop.request("budget of 1 epochs")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested == "budget of 1 epochs"


def test_nothing_is_raised_where_nothing_is_asked(stop: StopFlag) -> None:
    stop.check("attack")


def test_a_second_interrupt_leaves_at_once() -> None:
    code = (
        "import os, signal; from isotone.interruption import StopFlag; StopFlag().install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT); print('here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); print('not here', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "here\n")
    assert "checkpoint is intact" in done.stderr


def test_handlers_need_nothing_heavy() -> None:
    code = (
        "import sys, isotone.interruption, isotone.reexec\n"
        "print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
