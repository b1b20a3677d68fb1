"""What one process may spend on training: epochs, read as an exact fraction, and minutes."""

import math
import time
from collections.abc import Callable
from fractions import Fraction


class Budget:
    """Epochs and minutes of one process; share one between arms, or give each its own.

    A budget of X epochs ends after ceil(X × steps per epoch) optimizer steps, so n budgets of 1/n always finish an
    epoch. The minutes count from when the budget is made.

    Args:
        max_epochs: None: no limit.
        max_minutes: None: no limit.
        clock: seconds from any origin; tests give their own.
    """

    def __init__(
        self,
        max_epochs: Fraction | None = None,
        max_minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_epochs, self.max_minutes = max_epochs, max_minutes
        self._clock, self._began_s = clock, clock()
        self._epochs_spent = Fraction(0)

    def spend(self, num_steps: int, steps_per_epoch: int) -> None:
        """Count optimizer steps that were made."""
        self._epochs_spent += Fraction(num_steps, steps_per_epoch)

    def why_exhausted(self, steps_per_epoch: int, needed_s: float) -> str | None:
        """Return which limit forbids another step, or None.

        Args:
            steps_per_epoch: optimizer steps of one epoch.
            needed_s: seconds that the next step and the save after it may take at worst.
        """
        if self.max_epochs is not None:
            allowed = math.ceil(self.max_epochs * steps_per_epoch)
            if self._epochs_spent * steps_per_epoch >= allowed:
                return f"budget of {float(self.max_epochs):g} epochs"
        left_s = self.seconds_left()
        # the first step is free: a process that may never begin would make no progress however often it is started
        if left_s is not None and self._epochs_spent and left_s < 2 * needed_s:
            return f"budget of {self.max_minutes:g} minutes"
        return None

    def seconds_left(self) -> float | None:
        """Return what is left of the minutes, in seconds; None where there is no limit."""
        if self.max_minutes is None:
            return None
        return 60 * self.max_minutes - (self._clock() - self._began_s)
