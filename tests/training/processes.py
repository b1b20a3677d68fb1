"""Several real processes that train together: forked, so that each starts in no time, and talking over gloo."""

import os
import signal
import socket
import traceback
from collections.abc import Callable

import isotone.training.sharding  # noqa: F401 - here, or every process that is forked imports it anew
from isotone.errors import IsotoneError
from isotone.launch import World
from isotone.training.distributed import Team, end_team, start_team


def together(size: int, work: Callable[[Team], object], timeout_s: int = 60) -> list[int]:
    """Do ``work`` in so many processes at once; return their exit codes, −N for a signal, by their numbers."""
    port = _free_port()
    children = [_child(World(rank, size, rank, "127.0.0.1", port), work, timeout_s) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _child(world: World, work: Callable[[Team], object], timeout_s: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(timeout_s)  # a process that waits for ever must fail the test
        team = start_team(world, "cpu")
        work(team)
        end_team()
        code = 0
    except IsotoneError as error:
        print(f"process {world.rank}: {error}")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
