"""The one store: every durable write of isotone goes through here, and is complete or absent.

A file is written to a hidden sibling, synced, renamed, and its folder synced; a folder is written to a hidden sibling
with a manifest of sizes and hashes, synced, renamed, and read back. A reader therefore finds the old state or the new
one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from isotone.errors import DiskFullError, IsotoneError, UnwritableError

MANIFEST = "manifest.json"
FORMAT = 1
"""Number of the folder format, written into every manifest; a higher one is refused."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_FOLDER = {errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_UNREADABLE = {errno.EIO, errno.ESTALE}


class CorruptError(IsotoneError):
    """A published folder or file is not what was written: torn, truncated or changed."""


# --- files -----------------------------------------------------------------------------------------------------------


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace a file in one step.

    Raises:
        DiskFullError: no space or quota left; the old file is intact.
        UsageError: the folder cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    with _storage_errors(path):
        make_folder(path.parent)
        try:
            _write_synced(aside, data)
            os.replace(aside, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is told; the next write replaces what is left
                aside.unlink()
            raise
        sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Replace a text file (UTF-8) in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Replace a JSON file in one step; NaN and infinities are refused (ValueError), they are not JSON."""
    write_bytes(path, dump_json(value))


def dump_json(value: Any) -> bytes:
    """Return a value as the bytes that ``write_json`` writes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def dump_json_lines(values: Iterable[Mapping[str, Any]]) -> bytes:
    """Return objects as the bytes of a JSON lines file, one a line."""
    return b"".join(json.dumps(v, ensure_ascii=False, allow_nan=False).encode() + b"\n" for v in values)


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        CorruptError: it is not JSON.
        FileNotFoundError: it is not there.
    """
    data = Path(path).read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON ({error}); remove it and run again") from error


class JsonLines:
    """A log of JSON objects, one a line, that grows durably and forgives a torn last line.

    A line is torn if it lacks its newline, or, after a loss of power, if what was to be in it is not.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; a torn last one is left out.

        Raises:
            CorruptError: a line before the last is not JSON.
        """
        return [json.loads(line) for line in self._whole_lines()]

    def append(self, *values: Mapping[str, Any]) -> None:
        """Add lines in one write and sync them; a torn end is cut off first."""
        with _storage_errors(self.path):
            make_folder(self.path.parent)
            data = dump_json_lines(values)
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                with contextlib.suppress(OSError):  # several nodes write one log; not every file system can lock
                    fcntl.lockf(descriptor, fcntl.LOCK_EX)
                end = self._end_of_last_line(descriptor)
                os.ftruncate(descriptor, end)
                os.lseek(descriptor, end, os.SEEK_SET)
                _write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if new:
                sync_folder(self.path.parent)

    def truncate(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the lines that ``keep`` accepts (used to forget what lies beyond the checkpoint resumed from)."""
        lines = self._whole_lines()
        kept = [line for line in lines if keep(json.loads(line))]
        if len(kept) < len(lines):
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))

    def _whole_lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        if lines and not _is_json(lines[-1]):
            lines.pop()
        for number, line in enumerate(lines, 1):
            if not _is_json(line):
                raise CorruptError(f"{self.path}, line {number}, is not valid JSON; set the file aside and run again")
        return lines

    @staticmethod
    def _end_of_last_line(descriptor: int) -> int:
        end = _after_newline(descriptor, os.fstat(descriptor).st_size)
        start = _after_newline(descriptor, end - 1)
        return end if end and _is_json(os.pread(descriptor, end - start, start)) else start


def _after_newline(descriptor: int, end: int, block: int = 1 << 16) -> int:
    """Return the position after the last newline before ``end``; 0 if there is none."""
    while end > 0:
        start = max(0, end - block)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# --- folders ---------------------------------------------------------------------------------------------------------


def publish_directory(path: Path | str, files: Mapping[str, bytes | Iterable[bytes]]) -> None:
    """Write a folder that is complete or absent, with a manifest of its files' sizes and hashes.

    The order is: sibling with a fixed name (a leftover of a kill is swept) → files synced → manifest synced → sibling
    synced → rename → parent synced → sizes and hashes read back.

    Args:
        path: the folder.
        files: contents by name; what does not fit in memory comes as an iterable of parts, consumed in the order of
            the names (free space is then not known to suffice beforehand: see ``require_free_space``).

    Raises:
        DiskFullError: no space or quota left; nothing was published.
        FileExistsError: the folder is there already.
        CorruptError: what was read back is not what was written.
    """
    path = Path(path)
    aside = begin_directory(path, sum(len(data) for data in files.values() if isinstance(data, bytes)))
    try:
        with _storage_errors(path):
            entries = {name: _write_hashed(aside / name, data) for name, data in files.items()}
        finish_directory(path, entries)
    except IsotoneError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    verify_directory(path)


def begin_directory(path: Path | str, num_bytes: int) -> Path:
    """Make the hidden sibling in which several processes write the parts of a folder, and return it.

    ``publish_directory`` does all of it in one process. Here each process calls ``write_part`` for its own files, and
    when all are done, one calls ``finish_directory``.

    Raises:
        DiskFullError: there is not enough space for so many bytes.
        FileExistsError: the folder is there already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(path)
    with _storage_errors(path):
        make_folder(path.parent)
        sweep_directory(_aside(path))
        require_free_space(path.parent, int(1.2 * num_bytes))
        _aside(path).mkdir()
    return _aside(path)


def write_part(path: Path | str, data: bytes | Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync one file of a folder that is not finished; return its entry in the manifest."""
    with _storage_errors(Path(path)):
        return _write_hashed(Path(path), data)


def finish_directory(path: Path | str, entries: Mapping[str, dict[str, Any]]) -> None:
    """Give a folder that was begun its manifest and its name; nothing is read back.

    Args:
        path: the folder.
        entries: what ``write_part`` returned, by name relative to the folder.
    """
    path = Path(path)
    aside = _aside(path)
    with _storage_errors(path):
        _write_synced(aside / MANIFEST, dump_json({"format": FORMAT, "files": dict(entries)}))
        for folder in sorted({(aside / name).parent for name in entries} - {aside}):
            sync_folder(folder)
        sync_folder(aside)
        os.rename(aside, path)
        sync_folder(path.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def verify_directory(path: Path | str, *, hashes: bool = True) -> None:
    """Check a published folder against its manifest.

    Args:
        path: the folder.
        hashes: read every byte; otherwise only presence and sizes are checked.

    Raises:
        CorruptError: names the first file that is missing or different.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise CorruptError(f"{path} has no {MANIFEST}: it was not written to its end")
    try:
        for file, expected in _manifest_entries(path):
            if not file.is_file():
                raise CorruptError(f"{file} is missing")
            if file.stat().st_size != expected["size"]:
                raise CorruptError(f"{file} has {file.stat().st_size} bytes, {expected['size']} were written")
            if hashes and sha256_file(file) != expected["sha256"]:
                raise CorruptError(f"{file} does not have the hash that was written")
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise CorruptError(f"{file} cannot be read ({error.strerror})") from error


def _manifest_entries(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files of a published folder with their entries in its manifest."""
    data = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(data)
        intact = dump_json(manifest) == data  # any changed byte shows, also one that is JSON still
        entries = [(path / name, {"size": e["size"], "sha256": e["sha256"]}) for name, e in manifest["files"].items()]
        number = manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path / MANIFEST} is not what was written") from error
    if not intact:
        raise CorruptError(f"{path / MANIFEST} is not what was written")
    if number != FORMAT:
        raise CorruptError(f"{path} has format {number!r}; this isotone reads format {FORMAT}")
    return entries


def remove_directory(path: Path | str) -> None:
    """Remove a folder so that a kill in between leaves no half of it under its name."""
    path = Path(path)
    doomed = path.with_name(f".{path.name}.removed")
    sweep_directory(doomed)
    with _storage_errors(path):
        os.rename(path, doomed)
    sweep_directory(doomed)


def sweep_directory(path: Path | str) -> None:
    """Remove what a kill left behind; nothing happens where it is not there."""
    path = Path(path)
    with _storage_errors(path):
        if path.exists():
            shutil.rmtree(path)


def set_aside(path: Path | str) -> Path:
    """Rename a file or folder to NAME.set-aside-1 (-2, …) beside it and return the new path."""
    path = Path(path)
    number = 1
    while (target := path.with_name(f"{path.name}.set-aside-{number}")).exists():
        number += 1
    with _storage_errors(path):
        os.rename(path, target)
        sync_folder(path.parent)
    return target


def require_free_space(folder: Path | str, num_bytes: int) -> None:
    """Refuse to begin a write that cannot end.

    Raises:
        DiskFullError: fewer than ``num_bytes`` are free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DiskFullError(
            f"{folder} has {free / 1e6:.1f} MB free, {num_bytes / 1e6:.1f} MB are needed; free space and run again"
        )


# --- hashes and tensors ----------------------------------------------------------------------------------------------


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file, in hex, in constant memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def tensors_to_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialize named tensors as safetensors."""
    from safetensors.torch import save

    return save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, dict(metadata) if metadata else None)


def tensors_from_file(path: Path | str, device: str = "cpu") -> dict[str, Any]:
    """Read the named tensors of a safetensors file.

    Raises:
        CorruptError: it is not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path), device=device)
    except SafetensorError as error:
        raise CorruptError(f"{path} is not a whole safetensors file ({error})") from error


# --- system calls ----------------------------------------------------------------------------------------------------


def make_folder(path: Path | str) -> None:
    """Make a folder and the folders above it, each with a durable name.

    Raises:
        UsageError: it cannot be made there.
    """
    path = Path(path)
    with _storage_errors(path):
        if path.is_dir():
            return
        make_folder(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError as error:  # a file has the name
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        sync_folder(path.parent)


@contextlib.contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Hold a lock file while the block runs; it waits for whoever holds it.

    Raises:
        UsageError: the folder cannot be written.
    """
    from filelock import FileLock

    path = Path(path)
    lock = FileLock(path)
    with _storage_errors(path):
        make_folder(path.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sync_folder(path: Path | str) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    _write_hashed(path, data)


def _write_hashed(path: Path, data: bytes | Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a file; return its entry in the manifest."""
    size, digest = 0, hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for part in [data] if isinstance(data, bytes) else data:
            _write_all(descriptor, part)
            size += len(part)
            digest.update(part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:  # a write may be short
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"no space left while writing {path}; what stood before is intact: free space and run again"
            ) from error
        if error.errno in _READ_ONLY | _NO_FOLDER:
            raise UnwritableError(
                f"{path} cannot be written ({error.strerror}); choose another folder with --out"
            ) from error
        raise IsotoneError(f"{path} could not be written ({error.strerror}); what stood before is intact") from error
