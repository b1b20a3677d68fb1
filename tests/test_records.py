"""Whatever interrupts a write, a reader finds the old state or the new one; what changes a file afterwards is seen."""

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isotone import records
from isotone.errors import DiskFullError, IsotoneError, UsageError

CALLS = ("open", "write", "fsync", "close", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "pread")
"""System calls that a write goes through."""

OLD, NEW = {"a": b"old a", "b": b"old b"}, {"a": b"new a" * 100, "b": b"new b"}


def replace_file(folder: Path) -> None:
    records.write_bytes(folder / "file", b"new" * 1000)


def file_state(folder: Path) -> str:
    return {b"old": "old", b"new" * 1000: "new"}[(folder / "file").read_bytes()]


def publish_folder(folder: Path) -> None:
    records.publish_directory(folder / "step-2", NEW)
    records.remove_directory(folder / "step-1")


def folder_state(folder: Path) -> str:
    """Return the newest valid folder: what a resume would use."""
    for name, files in (("step-2", NEW), ("step-1", OLD)):
        if (folder / name).exists():
            records.verify_directory(folder / name)
            assert {n: (folder / name / n).read_bytes() for n in files} == files
            return {"step-2": "new", "step-1": "old"}[name]
    raise AssertionError("neither the old folder nor the new one")


def append_lines(folder: Path) -> None:
    records.JsonLines(folder / "log").append({"n": 1, "text": "x" * 50}, {"n": 2})


def log_state(folder: Path) -> str:
    """Return old or new; of two lines appended at once the first may stand alone."""
    numbers = [line["n"] for line in records.JsonLines(folder / "log").read()]
    assert numbers in ([0], [0, 1], [0, 1, 2])
    return "new" if len(numbers) == 3 else "old"


WRITES = {
    "file": (replace_file, file_state),
    "folder": (publish_folder, folder_state),
    "log": (append_lines, log_state),
}


@pytest.fixture(params=WRITES)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable, Callable]:
    """A folder with an old state, the write that replaces it, and the reader that names what it finds."""
    return set_up(tmp_path / "store"), *WRITES[request.param]


def set_up(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    records.write_bytes(folder / "file", b"old")
    records.publish_directory(folder / "step-1", OLD)
    records.JsonLines(folder / "log").append({"n": 0})
    return folder


class Fault:
    """Replaces the system calls of the store; the n-th one meets ``fault``."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, fault: Callable[[str, Callable, tuple, dict], object]):
        self.count = 0
        for name in CALLS:
            real = getattr(os, name)
            patch.setattr(os, name, self._wrap(name, real, number, fault))

    def _wrap(self, name: str, real: Callable, number: int, fault: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            self.count += 1
            return fault(name, real, args, kwargs) if self.count == number else real(*args, **kwargs)

        return call


def count_calls(folder: Path, action: Callable[[Path], None]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, 0, lambda *_: None)
        action(folder)
    return fault.count


def error_of(action: Callable[[Path], None], folder: Path) -> Exception | None:
    try:
        action(folder)
    except Exception as error:
        return error
    return None


def die(name: str, real: Callable, args: tuple, kwargs: dict) -> None:
    if name == "write":  # in the middle of it
        real(args[0], args[1][: len(args[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], None]) -> int:
    """Run something in a process of its own; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_kill_at_every_system_call_leaves_old_or_new(write: tuple[Path, Callable, Callable]) -> None:
    folder, action, state = write
    total = count_calls(folder, action)
    assert total > 4
    seen = []
    for number in range(1, total + 1):
        set_up(folder)

        def killed(number: int = number) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Fault(patch, number, die)
                action(folder)

        assert os.WTERMSIG(in_child(killed)) == signal.SIGKILL
        seen.append(state(folder))
        if seen[-1] == "old":  # what the kill left behind is in nobody's way
            action(folder)
            assert state(folder) == "new"
    assert {"old", "new"} == set(seen) or action is append_lines
    assert seen == sorted(seen, reverse=True)  # never back from new to old


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=["ENOSPC", "EDQUOT", "EIO"])
def test_error_at_every_system_call_leaves_old_or_new(write: tuple[Path, Callable, Callable], number: int) -> None:
    folder, action, state = write

    def fail(name: str, real: Callable, args: tuple, kwargs: dict) -> None:
        if name == "close":
            real(*args, **kwargs)
        raise OSError(number, os.strerror(number), str(args[0]))

    for call in range(1, count_calls(folder, action) + 1):
        set_up(folder)
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, call, fail)
            raised = error_of(action, folder)
        assert raised is None or isinstance(raised, IsotoneError)
        if state(folder) == "old":
            assert isinstance(raised, DiskFullError) == (number != errno.EIO)
            action(folder)
            assert state(folder) == "new"


def test_short_writes_are_continued(write: tuple[Path, Callable, Callable], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, action, state = write
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:7])))
    action(folder)
    assert state(folder) == "new"


class UnsyncedDisk:
    """Notes what would be on the disk if power failed now: contents and lists of names as of their last sync."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder = folder
        self.contents: dict[int, bytes] = {}  # by inode
        self.names: dict[int, dict[str, int]] = {}  # by inode of the folder
        self.snapshots: list[dict[Path, bytes | None]] = []
        self.retired = 0
        for path in (folder, *folder.rglob("*")):
            self._note(path)
        for name in ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> object:
            if name in ("unlink", "rmdir"):
                self._retire(os.stat(args[0], dir_fd=kwargs.get("dir_fd"), follow_symlinks=False).st_ino)
            result = real(*args, **kwargs)
            if name == "fsync":
                self._note(Path(os.readlink(f"/proc/self/fd/{args[0]}")))
            self.snapshots += [self._nothing_unsynced(self.folder.stat().st_ino, Path()), self._all_names()]
            return result

        return call

    def _note(self, path: Path) -> None:
        if path.is_dir():
            self.names[path.stat().st_ino] = {child.name: child.stat().st_ino for child in path.iterdir()}
        else:
            self.contents[path.stat().st_ino] = path.read_bytes()

    def _retire(self, inode: int) -> None:
        """A removed inode's number comes again; what still names it on the disk goes on under another."""
        self.retired += 1
        other = -self.retired
        for table in (self.contents, self.names):
            if inode in table:
                table[other] = table.pop(inode)  # type: ignore[index, assignment]
        for names in self.names.values():
            names.update({name: other for name, number in names.items() if number == inode})

    def _nothing_unsynced(self, inode: int, path: Path) -> dict[Path, bytes | None]:
        found: dict[Path, bytes | None] = {}
        for name, child in self.names[inode].items():
            if child in self.names:
                found |= {path / name: None, **self._nothing_unsynced(child, path / name)}
            else:
                found[path / name] = self.contents.get(child, b"")
        return found

    def _all_names(self) -> dict[Path, bytes | None]:
        """All names arrived, but no content that was not synced."""
        return {
            p.relative_to(self.folder): None if p.is_dir() else self.contents.get(p.stat().st_ino, b"")
            for p in self.folder.rglob("*")
        }

    @staticmethod
    def restore(snapshot: dict[Path, bytes | None], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path, content in sorted(snapshot.items()):
            if content is None:
                (folder / path).mkdir()
            else:
                (folder / path).write_bytes(content)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the names of open files from /proc")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_loss_of_power_leaves_old_or_new(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = set_up(tmp_path / "store")
    action, state = WRITES[kind]
    with monkeypatch.context() as patch:
        disk = UnsyncedDisk(folder, patch)
        action(folder)
    states = []
    for snapshot in disk.snapshots:
        UnsyncedDisk.restore(snapshot, tmp_path / "after")
        states.append(state(tmp_path / "after"))
    assert set(states) == {"old", "new"}
    assert states[-2:] == ["new", "new"]  # durable once the call has returned


def test_new_folders_have_durable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = records.sync_folder

    def note(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(records, "sync_folder", note)
    records.write_bytes(tmp_path / "a" / "b" / "file", b"x")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


# --- what changes afterwards -----------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> Path:
    rng = random.Random(0)
    files = {name: rng.randbytes(size) for name, size in (("model", 3000), ("state", 40), ("empty", 0))}
    records.publish_directory(tmp_path / "step", files)
    return tmp_path / "step"


def test_any_flipped_bit_is_detected(published: Path) -> None:
    rng = random.Random(1)
    files = [p for p in published.iterdir() if p.stat().st_size]
    for _ in range(300):
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
        good = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(records.CorruptError, match=str(published)):
            records.verify_directory(published)
        file.write_bytes(good)
    records.verify_directory(published)


def test_any_truncation_is_detected(published: Path) -> None:
    rng = random.Random(2)
    files = [p for p in published.iterdir() if p.stat().st_size]
    for _ in range(60):
        file = rng.choice(files)
        good = file.read_bytes()
        file.write_bytes(good[: rng.randrange(len(good))])
        with pytest.raises(records.CorruptError, match=str(published)):
            records.verify_directory(published)
        file.write_bytes(good)


def test_a_deleted_file_is_named(published: Path) -> None:
    for file in list(published.iterdir()):
        good = file.read_bytes()
        file.unlink()
        with pytest.raises(records.CorruptError, match=file.name):
            records.verify_directory(published)
        file.write_bytes(good)


def test_an_unreadable_file_counts_as_corrupt(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(records, "sha256_file", fail)
    with pytest.raises(records.CorruptError, match="cannot be read"):
        records.verify_directory(published)


def test_a_format_of_the_future_is_refused(published: Path) -> None:
    manifest = records.read_json(published / records.MANIFEST)
    records.write_json(published / records.MANIFEST, {**manifest, "format": 2})
    with pytest.raises(records.CorruptError, match="format 2"):
        records.verify_directory(published)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_folder_is_never_overwritten(published: Path) -> None:
    with pytest.raises(FileExistsError):
        records.publish_directory(published, {"a": b""})


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DiskFullError, match="free space and run again"):
        records.publish_directory(tmp_path / "step", {"a": b"x" * 101})
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_the_users_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match="--out"):
        records.write_bytes(tmp_path / "file", b"x")


def test_a_file_where_a_folder_should_be_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(UsageError, match=r"runs is no folder.*--out"):
        records.write_bytes(tmp_path / "runs/name/seed-1/config.yaml", b"x")


def test_setting_aside_keeps_every_copy(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / "step").mkdir()
        assert records.set_aside(tmp_path / "step").name == f"step.set-aside-{number}"


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_hash_of_json_ignores_the_order_of_keys() -> None:
    assert records.hash_json({"a": 1, "b": [1, 2]}) == records.hash_json({"b": [1, 2], "a": 1})
    assert records.hash_json({"a": [1, 2]}) != records.hash_json({"a": [2, 1]})


@pytest.mark.parametrize("torn", [b'{"n": 2, "te', b'{"n": 2, "te\n', b"\0\0\0\n", b"\n"])
def test_a_torn_last_line_is_forgiven_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    log = records.JsonLines(tmp_path / "log")
    log.append({"n": 0}, {"n": 1})
    with open(log.path, "ab") as file:
        file.write(torn)
    assert [line["n"] for line in log.read()] == [0, 1]
    log.append({"n": 2})
    assert [line["n"] for line in log.read()] == [0, 1, 2]
    assert log.path.read_bytes().count(b"\n") == 3


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b'{"n": 0}\nx\n{"n": 2}\n')
    with pytest.raises(records.CorruptError, match="line 2"):
        records.JsonLines(tmp_path / "log").read()


def test_lines_longer_than_a_block_are_found(tmp_path: Path) -> None:
    log = records.JsonLines(tmp_path / "log")
    for number in range(3):
        log.append({"n": number, "text": "x" * 200_000})
    assert [line["n"] for line in log.read()] == [0, 1, 2]


def test_truncation_keeps_what_is_accepted_byte_for_byte(tmp_path: Path) -> None:
    log = records.JsonLines(tmp_path / "log")
    log.append(*({"n": n, "x": 0.1 * n} for n in range(5)))
    before = log.path.read_bytes().splitlines(keepends=True)
    log.truncate(lambda line: line["n"] < 3)
    assert log.path.read_bytes() == b"".join(before[:3])


def test_tensors_return_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "c": torch.tensor(3.0), "t": torch.randn(4, 3).T}
    records.write_bytes(tmp_path / "x.safetensors", records.tensors_to_bytes(tensors))
    found = records.tensors_from_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(records.CorruptError, match="safetensors"):
        records.tensors_from_file(tmp_path / "x.safetensors")


def test_json_is_readable_and_stable(tmp_path: Path) -> None:
    records.write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text() == '{\n "b": 1,\n "a": "é"\n}\n'
    assert json.loads((tmp_path / "x.json").read_text()) == records.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(records.CorruptError, match="not valid JSON"):
        records.read_json(tmp_path / "x.json")
