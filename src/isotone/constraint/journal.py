"""What a start that takes long has made so far: a kill costs it one step, and a signal ends it soon.

A step fits the modules of a network that read the same, behind those before it. So whoever begins again brings back
what is kept, and goes on with the next step: the same weights, bit for bit, as without an interruption.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from isotone import records

_MODULES, _NOTES = "modules.safetensors", "notes.json"


class Bar(Protocol):
    """Where it is said how far the work is."""

    def update(self, done: int, text: str = "") -> None:
        """Say how much is done in all."""


class _NoBar:
    def update(self, done: int, text: str = "") -> None:
        pass


class Journal:
    """Modules as a start leaves them, a folder for those that are made together.

    Attributes:
        progress: shows how far it is, of a total and a unit.
    """

    def __init__(
        self,
        folder: Path | None = None,
        check: Callable[[], None] = lambda: None,
        progress: Callable[[int, str], AbstractContextManager[Bar]] = lambda total, unit: nullcontext(_NoBar()),
    ):
        """Keep modules below a folder; without one nothing is kept, and all of it is one piece of work.

        Args:
            folder: of this start alone: whoever changes what decides it gives another one.
            check: raises where the work is to be left.
            progress: shows how far it is.
        """
        self._folder, self._check, self.progress = folder, check, progress
        self._begun = False

    def part(self, name: str) -> "Journal":
        """Return the journal of another pass over the same modules."""
        return Journal(self._folder and self._folder / name, self._check, self.progress)

    def check(self) -> None:
        """Leave if that is asked for; call wherever the work may be left.

        A process does at least one step, or one with too little time for it would begin it again and again.
        """
        if self._begun:
            self._check()

    @torch.no_grad()
    def restore(self, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        """Bring modules to what was kept of them and return the notes; None, and nothing done, where nothing was.

        Args:
            modules: those that are made together, by full path.
        """
        if self._folder is None or not (folder := self._of(modules)).exists():
            return None
        try:
            records.verify_directory(folder)
            kept = records.tensors_from_file(folder / _MODULES)
        except records.CorruptError:  # made anew: it costs time alone
            records.remove_directory(folder)
            return None
        for name, module in modules.items():
            for key, value in module.state_dict().items():
                value.copy_(kept[f"{name}.{key}"])
        notes: dict[str, Any] = records.read_json(folder / _NOTES)
        return notes

    def keep(self, modules: Mapping[str, nn.Module], notes: Mapping[str, Any] | None = None) -> None:
        """Write modules down as they are now, with notes that JSON can hold without loss."""
        self._begun = True
        if self._folder is None:
            return
        tensors = {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
        files = {_MODULES: records.tensors_to_bytes(tensors), _NOTES: json.dumps(dict(notes or {})).encode()}
        records.publish_directory(self._of(modules), files)

    def _of(self, modules: Mapping[str, nn.Module]) -> Path:
        assert self._folder is not None
        return self._folder / next(iter(modules))
