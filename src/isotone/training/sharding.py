"""A model, its masters and its checkpoints divided over processes: FSDP2, and torch's distributed checkpoints.

A sharded checkpoint holds the folders ``model/`` and ``optimizer/`` with safetensors files, one or more a process; the
header of each file says where in the whole tensor its pieces lie. torch.distributed.checkpoint plans who writes what
and who reads what; the bytes go through the store, which syncs and hashes them.
"""

import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from isotone import records
from isotone.constraint import ARCHITECTURES
from isotone.errors import IsotoneError
from isotone.training.distributed import Team


def shard(model: nn.Module, constraint: Any, team: Team) -> None:
    """Divide a model's parameters, and the masters of its constraint, over the processes (FSDP2, 2304.11277).

    Each block is gathered when it computes and divided again behind it. Gradients are summed, not averaged.

    Args:
        model: changed in place; the same in all processes.
        constraint: its constraint, or None.
        team: the processes.
    """
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (team.size,))
    architecture = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""))  # a gate moves no block
    blocks = [
        b
        for stack in (architecture.stacks if architecture else ())
        for b in model.get_submodule(stack.blocks).children()
    ]
    for module in (*blocks, model):  # a root that stays whole after validation would hide its shards
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    if constraint is not None:
        constraint.follow(dict(model.named_parameters()), _divided_as)


def _divided_as(master: Tensor, weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return distribute_tensor(master, weight.device_mesh, weight.placements, src_data_rank=None)  # each has the whole


# --- checkpoints -----------------------------------------------------------------------------------------------------


def write_shards(aside: Path, kind: str, tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, dict[str, Any]]:
    """Write this process's part of named tensors to ``aside/kind/``; return the entries for the manifest.

    Args:
        aside: the folder that was begun for the checkpoint.
        kind: what the tensors are: ``model`` or ``optimizer``.
        tensors: the same names in all processes; what is not divided is written by one of them.
        file_bytes: bytes of whole tensors after which every process begins another file.

    Raises:
        IsotoneError: a process could not write; the same in all.
    """
    writer = dcp.HuggingFaceStorageWriter(str(aside / kind), _files(tensors, file_bytes), save_distributed=True)
    writer.fs = store = _Store()
    writer.sync_files = False  # the store does that
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except dcp.api.CheckpointException as error:
        causes = [wrapped[0] for wrapped in error.failures.values()]
        raise next((c for c in causes if isinstance(c, IsotoneError)), error) from error
    return {f"{kind}/{name}": entry for name, entry in store.entries.items()}


def read_shards(files: list[Path], targets: Mapping[str, Tensor], what: str) -> None:
    """Fill tensors, divided or whole, from safetensors files, which hold shards or whole tensors.

    Each process reads only what its part of the targets needs, without communication.

    Raises:
        CorruptError: names the first tensor that does not fit; nothing was read.
    """
    reader = _reader(files)
    saved = reader.read_metadata().state_dict_metadata
    for name in sorted(targets.keys() | saved.keys()):
        if name not in saved or name not in targets:
            raise records.CorruptError(f"{what}: {name} is {'missing' if name in targets else 'unknown to this model'}")
        found, target = saved[name], targets[name]
        assert isinstance(found, TensorStorageMetadata)
        if (found.size, found.properties.dtype) != (target.shape, target.dtype):
            raise records.CorruptError(
                f"{what}: {name} is {found.properties.dtype} {list(found.size)}, "
                f"expected {target.dtype} {list(target.shape)}"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process: as intended
        dcp.load(dict(targets), storage_reader=reader, no_dist=True)


def read_whole(files: list[Path]) -> dict[str, Tensor]:
    """Return the tensors whose shards some files hold, each in one piece on the CPU."""
    saved = _reader(files).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in saved.items()
        if isinstance(found, TensorStorageMetadata)
    }
    read_shards(files, tensors, str(files[0].parent))
    return tensors


def _reader(files: list[Path]) -> dcp.HuggingFaceStorageReader:
    reader = dcp.HuggingFaceStorageReader(str(files[0].parent))
    reader.fs = _Store(files)
    return reader


class _Store(FileSystem):
    """Where torch finds its files and writes them: what it writes goes to the one store."""

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._files = files
        self.entries: dict[str, dict[str, Any]] = {}

    @override
    def ls(self, path: Any) -> list[str]:
        return [str(file) for file in self._files]

    @contextmanager
    @override
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        stream = _Parts()
        yield stream
        self.entries[Path(path).name] = records.write_part(path, _reproducible(b"".join(stream.parts)))


class _Parts(io.RawIOBase):
    """Keeps what is written as it came."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    @override
    def write(self, data: Any) -> int:
        self.parts.append(data)
        return len(data)

    @override
    def tell(self) -> int:
        return sum(map(len, self.parts))


def _reproducible(file: bytes) -> list[bytes | memoryview]:
    """Put the metadata of a safetensors file, which the library writes in random order, in the order of its keys."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, memoryview(file)[end:]]


def _files(tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, int]:
    """Number the files, from 1, that hold named tensors."""
    numbers: dict[str, int] = {}
    number, held = 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if held and held + size > file_bytes:
            number, held = number + 1, 0
        numbers[name] = number
        held += size
    return numbers
