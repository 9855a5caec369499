"""Files that appear whole or not at all."""

from __future__ import annotations

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

    Raises:
        FastmnistError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FastmnistError(f"{path}: cannot be written: {error.strerror or error}; {hint}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file whole or not at all; raises FastmnistError as `replacing` does."""
    with replacing(path) as file:
        file.write(content)
