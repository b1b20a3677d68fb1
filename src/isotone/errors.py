"""The kinds of error, each with the exit code that a script may rely on.

A message is one line that says what is wrong, where (file and key), and what to do. The command line prints it without
a traceback, unless ``--debug`` is given.
"""


class IsotoneError(Exception):
    """Something failed; what was finished before stays.

    Attributes:
        told: another process, which works together with this one, prints the message.
    """

    exit_code = 1
    told = False


class UsageError(IsotoneError):
    """The command, the configuration or what it points at (model, corpus, folder) cannot be used as it is."""

    exit_code = 2


class UnwritableError(UsageError):
    """A folder cannot be written to: another one can, and so may this one be later."""


class DivergedError(IsotoneError):
    """A training's loss or gradient is not finite: another attempt, in the same bits, ends in the same way."""


class CheckFailedError(IsotoneError):
    """A check that was asked for says no: doctor, certify, plan."""

    exit_code = 3


class BlockedError(IsotoneError):
    """What a stage needs is missing or stale, or another process holds it."""

    exit_code = 4


class Stopped(IsotoneError):  # noqa: N818 - not an error: the safe end of a partial run
    """The run stopped at a safe place and can be continued by running the same command again."""

    exit_code = 75


class DiskFullError(Stopped):
    """No space left: the last checkpoint is intact; free space and run again."""
