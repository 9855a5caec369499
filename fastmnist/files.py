"""Files that appear whole or not at all, and files that one process at a time has open."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastmnist.errors import FastmnistError


@contextmanager
def replacing(path: Path, hint: str = "name another folder") -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for writing; syncs and renames it when the block ends without an error.

    Temporary files that killed processes left of the same file are removed first.

    Raises:
        FastmnistError: the folder cannot be written or the disk is full; nothing is left behind, and the file that was
            there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(path.parent, path.name)
        with _temporary(path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)  # while it is locked, so that nobody takes it for an orphan
            finally:
                with suppress(OSError):
                    os.unlink(file.name)
    except OSError as error:
        raise FastmnistError(f"{path}: cannot be written: {error.strerror or error}; {hint}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all; raises FastmnistError as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def remove_orphans(folder: Path, name: str | None = None) -> None:
    """Deletes what `replacing` left in `folder` when its process was killed, of the file `name` or of all files.

    A process number says little: it is given again, and means nothing on another machine. A writer holds a lock on its
    temporary file, so one that can be locked has no writer any more.
    """
    stem = "*" if name is None else glob.escape(name)
    for path in folder.glob(f".{stem}.[0-9]*-{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError), open(path, "r+b") as file:
            if lock(file):
                path.unlink()


def lock(file: BinaryIO) -> bool | None:
    """Locks an open file until it is closed or its process ends: False when another has it, None where no locks are."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # of a file system without them
        return None
    return True


def open_alone(path: Path, taken: str) -> BinaryIO:
    """Opens a file to read and write, and makes it where it is missing, unless another process has it open so.

    Its owner may delete it before closing it.

    Raises:
        FastmnistError: another process has it; `taken` is the message. OSError: it cannot be opened.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if lock(file) is False:
                raise FastmnistError(taken)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # as below
        except BaseException:
            file.close()
            raise
        file.close()  # its owner finished and deleted it between the two calls above


def _temporary(path: Path) -> BinaryIO:
    """A new file beside `path`, locked."""
    while True:
        file = open(path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"), "x+b")  # noqa: SIM115
        if lock(file) is not False and os.path.exists(file.name):
            return file
        file.close()  # another process took it for an orphan before it was locked
