"""Atomic file writes, and files with an exclusive lock."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastmnist.errors import FastmnistError


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
                os.replace(file.name, path)  # still locked, so that no other process removes it as an orphan
            finally:
                with suppress(OSError):
                    os.unlink(file.name)
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
                path.unlink()


def lock(file: BinaryIO) -> bool | None:
    """Locks an open file until it is closed or the process ends.

    Returns:
        False if another process holds the lock, None if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return None
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
