"""A signal at a place that a test chooses: what cannot be timed from outside."""

from isotone.interruption import StopFlag


class StopAt(StopFlag):
    """Is requested from its n-th reading on: a signal at every place where one is noticed."""

    def __init__(self, number: int):
        self.number, self.count = number, 0

    @property
    def requested(self) -> str | None:  # type: ignore[override]
        self.count += 1
        return "SIGUSR1" if self.count >= self.number else None
