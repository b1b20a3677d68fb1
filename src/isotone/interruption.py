"""Signals become a request to stop, which long loops read at the places where they can stop safely.

Imports nothing heavy: handlers stand before torch is loaded, since a signal in those seconds must not kill.
"""

import os
import signal
from types import FrameType

from isotone.errors import Stopped

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""What asks for a safe stop."""


class StopFlag:
    """A request to stop, made by a signal, a budget or a caller.

    Attributes:
        requested: why to stop (a signal's name, or the text given to ``request``), or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupts = 0

    def install(self) -> None:
        """Catch ``SIGNALS``, and let through those that were held back while the process started."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stands."""
        self.requested = self.requested or reason

    def check(self, what: str) -> None:
        """Raise if a stop is requested; call where everything done so far is saved.

        Raises:
            Stopped: names the reason and what was under way.
        """
        if self.requested:
            raise Stopped(f"{what} stopped safely ({self.requested})")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os.write(2, b"\nsecond interrupt: leaving at once; the last checkpoint is intact\n")
                os._exit(130)
        self.request(signal.Signals(number).name)
