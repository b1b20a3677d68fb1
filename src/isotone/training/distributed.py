"""The processes that train one arm together: what they decide in common, and how their gradients become one.

Everything that leaves a trace (files, records, leases) is done by process 0, and all learn how it went: they go on
together, or end together with the same exit code. A team of one process does the work itself and never communicates.
"""

import datetime
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from isotone.errors import IsotoneError, Stopped, UsageError
from isotone.interruption import StopFlag
from isotone.launch import World

T = TypeVar("T")
PATIENCE = datetime.timedelta(minutes=30)
"""How long processes wait for each other: longer than the slowest save, shorter than for ever."""
BUCKET_BYTES = 64 << 20
"""Gradients that travel together: few messages, and little memory beside the gradients."""

_GO, _STOP, _OUT_OF_MEMORY = range(3)
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


class LostPeerError(Stopped):
    """Another process of the training ended or no longer answers; the last checkpoint is intact: run again."""


class PeerOutOfMemoryError(MemoryError):
    """Another process ran out of memory, so this one repeats its part of the step with it."""


class Team:
    """The processes that train one arm together; every method is called by all of them, in the same order.

    Args:
        world: who this process is among them.
    """

    def __init__(self, world: World | None = None):
        self.rank, self.size = (world.rank, world.size) if world else (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Let process 0 do ``work``; return its result, or raise its error, in all."""
        if self.size == 1:
            return work()
        result: Any = None
        error: BaseException | None = None
        if self.is_first:
            try:
                result = work()
            except Exception as raised:
                error = raised
        told = [(result, _for_others(error))]
        self._communicate(lambda: dist.broadcast_object_list(told, src=0))
        if error is not None:
            raise error
        if told[0][1] is not None:
            raise _told(told[0][1])
        return told[0][0]

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Do ``work`` in process 0 and, when it is done there, in the others, which find what it left."""
        done: list[T] = []
        self.first(lambda: done.append(work()))
        return done[0] if done else work()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of their numbers."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._communicate(lambda: dist.all_gather_object(values, value))
        return values

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, the same bits in each."""
        if self.size > 1:
            self._communicate(lambda: dist.all_reduce(value))
        return value

    def share_of(self, rows_BL: Tensor) -> Tensor:
        """Return this process's rows of a batch that the number of processes divides."""
        return rows_BL.chunk(self.size)[self.rank]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes, in the order of the parameters.

        torch's DistributedDataParallel is not used: it communicates within the backward pass, where a process that
        runs out of memory strands the others, while here all agree on the outcome of the passes first. What it could
        hide behind the last micro-batch is one exchange a step.
        """
        if self.size == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = self.total(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def require_equal(self, tensors: Iterable[Tensor], what: str) -> None:
        """Refuse to go on where replicas that must hold the same bits do not.

        Raises:
            IsotoneError: they differ.
        """
        if self.size == 1:
            return
        sums = torch.stack([t.detach().sum(dtype=torch.float64).cpu() for t in tensors])
        lowest, highest = sums.clone(), sums.clone()
        self._communicate(lambda: dist.all_reduce(lowest, dist.ReduceOp.MIN))
        self._communicate(lambda: dist.all_reduce(highest, dist.ReduceOp.MAX))
        if not torch.equal(lowest, highest):
            raise self.once(
                IsotoneError(
                    f"{what} differ between the processes, which must hold the same; are their devices and software "
                    f"alike? The last checkpoint is intact"
                )
            )

    def stop_flag(self, own: StopFlag) -> Any:
        """Return a flag like ``own`` that is requested in all processes once it is in any."""
        return own if self.size == 1 else _SharedStop(self, own)

    def say_out_of_memory(self) -> None:
        """Tell the others, which wait for an answer to whether to go on, that this process needs a smaller part."""
        if self.size > 1:
            self._vote(_OUT_OF_MEMORY)

    def agree(self) -> None:
        """Wait until all have come so far.

        Raises:
            PeerOutOfMemoryError: one has not: all do the same work again.
        """
        if self.size > 1 and self._vote(_GO) == _OUT_OF_MEMORY:
            raise PeerOutOfMemoryError("out of memory in another process")

    def once(self, error: IsotoneError) -> IsotoneError:
        """Return an error that all processes are about to raise, to be printed by process 0 alone."""
        error.told = not self.is_first
        return error

    def lost_peer(self, error: BaseException) -> LostPeerError | None:
        """Return what to say where an error means that another process is gone, None where it means something else."""
        text = str(error).lower()
        if isinstance(error, LostPeerError):
            return error
        if self.size == 1 or not isinstance(error, RuntimeError):
            return None
        if isinstance(error, dist.DistError) or any(word in text for word in _LOST):
            return LostPeerError(
                f"process {self.rank} of {self.size} lost another one ({text.splitlines()[0][:120]}); "
                f"the last checkpoint is intact: run the same command again"
            )
        return None

    def _vote(self, code: int) -> int:
        votes = torch.tensor(code)
        self._communicate(lambda: dist.all_reduce(votes, dist.ReduceOp.MAX))
        return int(votes)

    def _communicate(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise self.lost_peer(error) or error from error


ALONE = Team()
"""The team of a single process."""


class _SharedStop:
    """A stop flag whose every reading is a question to all processes."""

    def __init__(self, team: Team, own: StopFlag):
        self._team, self._own = team, own

    @property
    def requested(self) -> str | None:
        """Why to stop, the same None in all; the words are this process's own where it was the one asked."""
        mine = self._own.requested
        answer = self._team._vote(_STOP if mine else _GO)
        if answer == _OUT_OF_MEMORY:
            raise PeerOutOfMemoryError("out of memory in another process")
        return None if answer == _GO else mine or "asked of another process"

    def request(self, reason: str) -> None:
        """Ask for a stop of all."""
        self._own.request(reason)


def start_team(world: World, device: str) -> Team:
    """Bring the processes of a world together.

    Args:
        world: who this process is.
        device: the resolved device; on ``cuda`` each process takes the one of its number on the host.

    Raises:
        UsageError: the device cannot be shared out.
        LostPeerError: the others did not come.
    """
    team = Team(world)
    if team.size == 1:
        return team
    if device not in ("cpu", "cuda"):
        raise team.once(UsageError(f"runtime.device: {device} trains in one process only; start one"))
    if device == "cuda":
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{world.address}:{world.port}",
        rank=world.rank,
        world_size=world.size,
        timeout=PATIENCE,
    )
    if not team.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one voice; errors are still heard
    return team


def end_team() -> None:
    """Take leave of the others, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(gradients: list[Tensor]) -> Iterable[list[Tensor]]:
    """Group gradients that follow each other, of one dtype, up to ``BUCKET_BYTES``."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _for_others(error: BaseException | None) -> tuple[type[IsotoneError], str] | None:
    if error is None:
        return None
    if isinstance(error, IsotoneError):
        return type(error), str(error)
    return IsotoneError, f"process 0 failed: {type(error).__name__}: {error}"


def _told(outcome: tuple[type[IsotoneError], str]) -> IsotoneError:
    kind, message = outcome
    error = kind(message)
    error.told = True
    return error
