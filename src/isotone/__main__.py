"""The entry point: handlers and environment first, then the command line, then one line for what went wrong."""

import io
import os
import sys

_AT_LENGTH = ("run", "sweep", "doctor", "evaluate", "attack")
"""Commands whose work is saved when a signal comes, and goes on when they are given again."""


def main() -> None:
    """Run the command line and exit with the code that the contract promises."""
    for stream in (sys.stdout, sys.stderr):  # a locale that lacks a character must not end a run that is complete
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries draw bars into logs, too; progress is isotone's own
    from isotone.interruption import StopFlag

    stop = StopFlag()
    if len(sys.argv) > 1 and sys.argv[1] in _AT_LENGTH:
        from isotone.reexec import ensure_environment

        ensure_environment()  # replaces the process if the environment must change before Python starts
        stop.install()
    from isotone.cli import run_command_line

    _leave(run_command_line(sys.argv[1:], stop))


def _leave(code: int) -> None:
    """Exit; one of several processes at once, since torch's threads can abort an interpreter that is being taken down.

    Everything is written by then, and a launcher takes the abort of one for a failure of all.
    """
    if any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
