"""Starts Python again where its environment must be set before it starts: string hashing and cuBLAS's workspace."""

import os
import signal
import sys

from isotone.interruption import SIGNALS

ENVIRONMENT = {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What determinism needs in the environment; values that the user has set are respected."""


def ensure_environment() -> None:
    """Replace this process by one with ``ENVIRONMENT`` in place; return at once where it is there already.

    A signal that arrives in between is neither lost nor deadly: it is held back over the start and delivered when
    ``StopFlag.install`` lets signals through.
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if not missing:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
