"""Checkpoints: folders of safetensors and JSON that are complete or absent, and which of them are kept and chosen.

A checkpoint ``step-00001200/`` holds ``model.safetensors`` (masters of constrained weights, the rest as it is),
``optimizer.safetensors``, ``state.json`` (position, histories, identity) and the manifest of the store. The
starting point ``step-00000000/`` has no optimizer. A save in the middle of a validation is called
``step-00001200.unvalidated/``. Where the model is divided over processes, folders ``model/`` and ``optimizer/`` with
each one's shards stand in the place of the two files.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isotone import records
from isotone.errors import IsotoneError, UsageError
from isotone.training.distributed import Team
from isotone.training.optimizer import copy_into

WEIGHTS, OPTIMIZER, STATE = "model", "optimizer", "state.json"
SHARD_BYTES = 1 << 30
"""Bytes of tensors after which a new file begins: a save needs so much memory beside the model, not twice the model."""

FORMAT, SHARDED_FORMAT = 1, 2
"""Numbers of a checkpoint's format, in state.json: written by one process, or each process's part by itself."""

_NAME = re.compile(r"step-(\d{8,})(\.unvalidated)?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are what was written.

    Attributes:
        path: its folder.
        state: contents of state.json.
    """

    path: Path
    state: dict[str, Any]

    @property
    def is_start(self) -> bool:
        """Whether it is a starting point: weights alone."""
        return not any(self.path.glob(f"{OPTIMIZER}*"))

    def weights(self) -> dict[str, Tensor]:
        """Read what is trained."""
        return self._tensors(WEIGHTS)

    def optimizer(self) -> dict[str, Tensor]:
        """Read the optimizer's state."""
        return self._tensors(OPTIMIZER)

    def fill(self, kind: str, targets: Mapping[str, Tensor], what: str) -> None:
        """Copy tensors of a kind into existing ones, of which each process may hold a part.

        Raises:
            CorruptError: names the first tensor that does not fit; nothing was copied.
        """
        if not any(hasattr(target, "to_local") for target in targets.values()):
            copy_into(targets, self._tensors(kind), what)
            return
        from isotone.training import sharding

        folder = self.path / kind
        sharding.read_shards(sorted(folder.iterdir()) if folder.is_dir() else self._files(kind), targets, what)

    def _tensors(self, kind: str) -> dict[str, Tensor]:
        if (self.path / kind).is_dir():
            from isotone.training import sharding

            return sharding.read_whole(sorted((self.path / kind).iterdir()))
        return {name: value for file in self._files(kind) for name, value in records.tensors_from_file(file).items()}

    def _files(self, kind: str) -> list[Path]:
        return sorted(self.path.glob(f"{kind}*.safetensors"))


class CheckpointFolder:
    """All checkpoints of one arm.

    Args:
        path: the folder ``checkpoints/ARM``.
        keep_last: how many are kept beside the best one and the starting point, at least 2.
    """

    def __init__(self, path: Path | str, keep_last: int = 2):
        self.path, self.keep_last = Path(path), keep_last

    def sweep(self) -> None:
        """Remove what kills left behind: half-written and half-removed checkpoints."""
        for leftover in (*self.path.glob(".step-*.tmp"), *self.path.glob(".step-*.removed")):
            records.sweep_directory(leftover)

    def paths(self) -> list[Path]:
        """Return the checkpoints' folders, oldest first, unread."""
        found = [p for p in self.path.iterdir() if _NAME.fullmatch(p.name)] if self.path.is_dir() else []
        return sorted(found, key=_order)

    def newest(self) -> Checkpoint | None:
        """Return the newest valid checkpoint; None where training has not begun.

        A torn or corrupted one is named in a warning and set aside, and the one before it is used.

        Raises:
            IsotoneError: there are checkpoints, but none is valid.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return read_checkpoint(path)
            except records.CorruptError as error:
                aside = records.set_aside(path)
                _log.warning("checkpoint %s cannot be used: %s; set aside as %s", path.name, error, aside.name)
        broken = sorted(p.name for p in self.path.glob("step-*.set-aside-*"))
        if broken:
            raise IsotoneError(
                f"{self.path}: no checkpoint is valid ({', '.join(broken)} set aside); restore one from a backup and "
                f"rename it to its old name, or start again with --fresh"
            )
        return None

    def publish(
        self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None, state: dict[str, Any]
    ) -> Path:
        """Write a checkpoint and read it back; nothing is removed.

        Raises:
            DiskFullError: no space; the checkpoints that were there are intact.
        """
        path = self._path(step, state)
        shards = _shards(WEIGHTS, weights) | _shards(OPTIMIZER, optimizer or {})
        self.path.mkdir(parents=True, exist_ok=True)
        num_bytes = sum(t.nbytes for shard in shards.values() for t in shard.values())
        records.require_free_space(self.path, int(1.2 * num_bytes))
        files = {name: _serialized(shard) for name, shard in shards.items()}
        records.publish_directory(path, {**files, STATE: records.dump_json({"format": FORMAT, **state})})
        return path

    def publish_shards(
        self,
        team: Team,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor] | None,
        state: dict[str, Any],
    ) -> Path:
        """Do what ``publish`` does with tensors that are divided over the processes of a team, in all of them.

        Raises:
            DiskFullError: no space for one of them; the same in all.
        """
        from isotone.training import sharding

        path, kinds = self._path(step, state), {WEIGHTS: weights, **({OPTIMIZER: optimizer} if optimizer else {})}
        num_bytes = sum(t.numel() * t.element_size() for tensors in kinds.values() for t in tensors.values())
        aside = team.first(lambda: records.begin_directory(path, num_bytes))
        mine: dict[str, dict[str, Any]] = {}
        for kind, tensors in kinds.items():
            mine |= sharding.write_shards(aside, kind, tensors, SHARD_BYTES * team.size)
        parts = team.gather(mine)

        def finish() -> None:
            entries = {name: entry for part in parts for name, entry in sorted(part.items())}
            entries[STATE] = records.write_part(aside / STATE, records.dump_json({"format": SHARDED_FORMAT, **state}))
            records.finish_directory(path, entries)
            records.verify_directory(path)

        team.first(finish)
        return path

    def _path(self, step: int, state: dict[str, Any]) -> Path:
        return self.path / f"step-{step:08d}{'' if state.get('validated', True) else '.unvalidated'}"

    def prune(self, best_step: int | None) -> None:
        """Remove all but the last ``keep_last``, the best one and the starting point."""
        trained = [path for path in self.paths() if _order(path)[0] > 0]
        full = {_order(path)[0] for path in trained if _order(path)[1]}
        superseded = [p for p in trained if not _order(p)[1] and _order(p)[0] in full]
        current = [p for p in trained if p not in superseded]
        old = [p for p in current[: -self.keep_last] if _order(p)[0] != best_step]
        for path in superseded + old:
            records.remove_directory(path)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all but the named ones and the starting point; for when training is complete."""
        for path in self.paths():
            if path.name not in names and _order(path)[0] > 0:
                records.remove_directory(path)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint after checking all its files.

    Raises:
        CorruptError: names the file that is missing or different.
        UsageError: it was written by a newer isotone.
    """
    path = Path(path)
    records.verify_directory(path)
    state = records.read_json(path / STATE)
    if state.get("format") not in (FORMAT, SHARDED_FORMAT):
        raise UsageError(f"{path / STATE} has format {state.get('format')}; this isotone reads format {FORMAT}")
    return Checkpoint(path, state)


def load_weights(path: Path | str, model: nn.Module, constraint: Any = None) -> None:
    """Put a checkpoint's weights into a model of the same architecture.

    Args:
        path: the checkpoint's folder.
        model: changed in place.
        constraint: the model's constraint, of the same scope and parametrization as the checkpoint's; its masters are
            loaded and its effective weights written into the model.

    Raises:
        CorruptError: a file is not what was written, or a tensor does not fit the model.
        UsageError: the checkpoint's constraint is not the one given.
    """
    put_weights(read_checkpoint(path), model, constraint)


def put_weights(checkpoint: Checkpoint, model: nn.Module, constraint: Any = None) -> None:
    """Do what ``load_weights`` does with a checkpoint that is open."""
    saved, given = checkpoint.state.get("constraint"), describe_constraint(constraint)
    if saved != given:
        raise UsageError(f"{checkpoint.path} was saved with constraint {saved}; it is now {given}")
    targets = weights_of(model, constraint)
    checkpoint.fill(WEIGHTS, targets, f"{checkpoint.path}, weights")
    if constraint is not None:  # the scales, which are numbers; then the effective weights are written
        constraint.load_state_dict({name: targets[name] for name in constraint.state_dict()})


def weights_of(model: nn.Module, constraint: Any = None) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of a model: masters (and scales) of constrained weights, the rest as it is."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return weights if constraint is None else weights | constraint.state_dict()


def save_initial(
    folder: Path | str, model: nn.Module, constraint: Any = None, identity: Mapping[str, str] | None = None
) -> Path:
    """Publish where an arm starts, or where an arm that is not trained stands, as ``step-00000000``.

    A valid one of the same identity is left as it is; a corrupted one is set aside.

    Raises:
        UsageError: there is one of another identity.
    """
    checkpoints = CheckpointFolder(folder)
    checkpoints.sweep()
    path = checkpoints.path / f"step-{0:08d}"
    named = dict(identity or {})
    state = {"step": 0, "constraint": describe_constraint(constraint), "identity": named}
    if path.exists():
        try:
            check_identity(read_checkpoint(path), named)
            return path
        except records.CorruptError as error:
            aside = records.set_aside(path)
            _log.warning("starting point cannot be used: %s; set aside as %s", error, aside.name)
    return checkpoints.publish(0, weights_of(model, constraint), None, state)


def trainable_parameters(model: nn.Module, constraint: Any = None) -> dict[str, nn.Parameter]:
    """Return what the optimizer holds, by name: masters where weights are constrained, the rest as it is."""
    parameters = dict(model.named_parameters()) if constraint is None else constraint.trainable(model)
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def describe_constraint(constraint: Any) -> dict[str, Any] | None:
    """Return what a checkpoint says about the constraint that its masters belong to."""
    return None if constraint is None else constraint.description


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, str]) -> None:
    """Refuse to continue what belongs to another configuration or other inputs.

    A starting point that an earlier stage made names that stage's inputs; the stage's record answers for them.

    Raises:
        UsageError: names the first key that differs.
    """
    saved = checkpoint.state["identity"]
    if checkpoint.is_start and saved.keys() != identity.keys():
        return
    for key in sorted(saved.keys() | identity.keys()):
        if saved.get(key) != identity.get(key):
            raise UsageError(
                f"{checkpoint.path} was made with {key} {saved.get(key)}, now it is {identity.get(key)}; go back to "
                f"what it was, or start again with --fresh"
            )


def _shards(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the files that hold named tensors: KIND.safetensors and, past ``SHARD_BYTES``, KIND-00001.safetensors …"""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or room < tensor.nbytes:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return {f"{kind}-{i:05d}.safetensors" if i else f"{kind}.safetensors": shard for i, shard in enumerate(shards)}


def _serialized(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Serialize when the store asks, so that one file's bytes are in memory at a time."""
    yield records.tensors_to_bytes(tensors)


def _order(path: Path) -> tuple[int, bool]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not the name of a checkpoint")
    return int(match[1]), match[2] is None
