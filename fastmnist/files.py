"""Atomic file writes, files with an exclusive lock, and reads at an offset, on POSIX and on Windows."""

from __future__ import annotations

import glob
import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastmnist.errors import FastmnistError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

OPEN_FILES_STAY = fcntl is None  # Windows neither renames nor deletes a file that is open
LOCKED_BYTE = 1 << 30  # on Windows, which keeps others from reading what is locked: beyond a small file's end
_reading = threading.Lock()


@contextmanager
def replacing(path: Path, hint: str = "name another folder") -> Iterator[BinaryIO]:
    """A temporary file beside `path`, synced and renamed to `path` if the block succeeds.

    First removes temporary files of `path` from killed processes.

    Raises:
        FastmnistError: the folder cannot be written or the disk is full. An earlier file stays, the temporary one goes;
            the message ends with `hint`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(path.parent, path.name)
        with _temporary(path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if OPEN_FILES_STAY:
                    file.close()
                os.replace(file.name, path)  # still locked, so that no other process removes it as an orphan
            finally:
                remove(file, file.name)  # if it was not renamed
    except OSError as error:
        raise FastmnistError(f"{path}: cannot be written: {error.strerror or error}; {hint}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file atomically; raises FastmnistError as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: str | Path | None, content: Any) -> None:
    """Writes `content` as indented JSON; without a path, nothing."""
    if path is not None:
        write_bytes(Path(path), (json.dumps(content, indent=2) + "\n").encode())


def remove_orphans(folder: Path, name: str | None = None) -> None:
    """Deletes temporary files that killed processes left in `folder`: those of the file `name`, or all.

    A writer locks its temporary file, so one that can be locked is an orphan. A process number would not tell: numbers
    are reused, and mean nothing on another machine.
    """
    stem = "*" if name is None else glob.escape(name)
    for path in folder.glob(f".{stem}.[0-9]*-{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError), open(path, "r+b") as file:
            if lock(file):
                remove(file, path)


def remove(file: BinaryIO, path: str | Path) -> None:
    """Deletes an open, locked file, if it is there, and closes it; elsewhere than on Windows in this order."""
    try:
        if OPEN_FILES_STAY:
            file.close()
    finally:
        with suppress(OSError):
            os.unlink(path)
        file.close()


def read_at(descriptor: int, memory: memoryview, offset: int) -> int:
    """Reads a file's bytes from `offset` on into `memory`, in any thread; returns their number, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [memory], offset)
    with _reading:  # Windows: all threads share one position
        os.lseek(descriptor, offset, os.SEEK_SET)
        content = os.read(descriptor, len(memory))
    memory[: len(content)] = content
    return len(content)


def lock(file: BinaryIO) -> bool | None:
    """Locks an open file until it is closed or the process ends.

    Returns:
        False if another process holds the lock, None if the file system has no locks.
    """
    if fcntl is None:
        return _lock_on_windows(file.fileno())
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return None
    return True


def _lock_on_windows(descriptor: int) -> bool | None:
    import msvcrt

    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # typeshed: on Windows alone
    except PermissionError:
        return False
    except OSError:
        return None
    finally:
        os.lseek(descriptor, at, os.SEEK_SET)
    return True


def open_alone(path: Path, taken: str) -> BinaryIO:
    """Opens a file for reading and writing under an exclusive lock; creates it if it is missing.

    The process that holds the lock may delete the file before closing it.

    Raises:
        FastmnistError: another process holds the lock; `taken` is the message.
        OSError: the file cannot be opened.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if lock(file) is False:
                raise FastmnistError(taken)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # deleted, as below
        except BaseException:
            file.close()
            raise
        file.close()  # its holder deleted it between opening and locking: try again


def _temporary(path: Path) -> BinaryIO:
    """A new, locked file beside `path`."""
    while True:
        file = open(path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"), "x+b")  # noqa: SIM115
        if lock(file) is not False and os.path.exists(file.name):
            return file
        file.close()  # another process removed it as an orphan before it was locked
