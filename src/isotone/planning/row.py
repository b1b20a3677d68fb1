"""One row of a plan: what is expected of a resource, its limit, and whether that leaves room."""

from dataclasses import dataclass, replace
from typing import Any

MARGIN = 0.10
"""Share of a limit that must be left: as much as a computed peak of memory may be too low."""


@dataclass(frozen=True)
class Row:
    """What a stage is expected to take of a resource.

    Attributes:
        stage: name of the stage; ``critical path`` and ``total`` for the whole.
        resource: time, time limit (what a job asks for), host memory, device memory, disk, device time.
        expected: seconds or bytes; None: not known.
        limit: seconds or bytes; None: no limit is known.
        safe: whether the margin suffices; None: not checked.
        origin: how the expected figure came about: measured, stated, computed, estimated or assumed.
        advice: what would make an unsafe row safe.
    """

    stage: str
    resource: str
    expected: float | None
    limit: float | None
    safe: bool | None = None
    origin: str = ""
    advice: str = ""

    @property
    def margin(self) -> float | None:
        """Share of the limit that is left, (limit − expected)/limit; negative beyond the limit, None if not known."""
        if self.expected is None or not self.limit:
            return None
        return (self.limit - self.expected) / self.limit

    @property
    def is_time(self) -> bool:
        """Whether figures are seconds; else they are bytes."""
        return self.resource in ("time", "time limit", "device time")

    def advised(self, advice: str) -> "Row":
        """Return the row with its advice."""
        return replace(self, advice=advice)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON."""
        return {
            "stage": self.stage,
            "resource": self.resource,
            "expected": self.expected,
            "limit": self.limit,
            "margin": None if self.margin is None else round(self.margin, 4),
            "safe": self.safe,
            "unit": "seconds" if self.is_time else "bytes",
            "origin": self.origin,
            "advice": self.advice,
        }


def judged(
    stage: str, resource: str, expected: float, limit: float | None, origin: str, firm: bool | None = True
) -> Row:
    """Return a row with its verdict.

    Args:
        stage: as in ``Row``, as are the other arguments.
        resource: resource.
        expected: expected figure.
        limit: limit.
        origin: origin.
        firm: True: the figure counts; False: it is a lower bound, so it can only show what does not fit; None: it is
            assumed, and nothing is concluded from it.
    """
    row = Row(stage, resource, expected, limit, None, origin)
    if row.margin is None or firm is None:
        return row
    fits = row.margin >= MARGIN if firm else row.margin >= 0
    return replace(row, safe=fits if firm or not fits else None)
