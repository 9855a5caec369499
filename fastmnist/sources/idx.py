"""IDX files, the format of the MNIST database (Y. LeCun, C. Cortes, C. Burges), raw or gzipped.

Four bytes of magic (two zeros, the type, the number of dimensions), one big-endian uint32 per dimension, the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastmnist.errors import DataError

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMENSIONS = 8
MAX_READ = 1 << 24  # bytes


class IdxFile:
    """An IDX file with a checked header; its values are read in blocks, so that any size fits in memory.

    Args:
        path: the file; a name that ends in .gz is unzipped on the way.
        dtype: the numpy type that its values must have.
        ndim: the number of dimensions that it must have.

    Raises:
        DataError: it is missing, no IDX file, or of another type or number of dimensions.
    """

    def __init__(self, path: Path, dtype: str = "u1", ndim: int = 1) -> None:
        self.path = path
        with self._open() as file:
            self.dtype, self.shape = self._read_header(file)
        if self.dtype != np.dtype(dtype) or len(self.shape) != ndim:
            raise DataError(
                f"{path}: holds {len(self.shape)}-dimensional {self.dtype} where {ndim}-dimensional "
                f"{np.dtype(dtype)} is needed; is it the right file?"
            )

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Arrays (rows, *shape[1:]), the last one shorter."""
        row_size = self.dtype.itemsize * math.prod(self.shape[1:])
        with self._open() as file:
            self._read_header(file)
            for start in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - start)
                content = _read(file, count * row_size)
                if len(content) != count * row_size:
                    size = start * row_size + len(content)
                    raise DataError(
                        f"{self.path}: has {size:,} bytes of values where its header {self.shape} asks for "
                        f"{self.shape[0] * row_size:,}; it is cut short or its header is wrong: fetch it again"
                    )
                yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
            if file.read(1):
                raise DataError(
                    f"{self.path}: has more than the {self.shape[0] * row_size:,} bytes of values that its header "
                    f"{self.shape} announces; its header is wrong: fetch it again"
                )

    def read(self) -> np.ndarray:
        """All values."""
        return np.concatenate(list(self.blocks(self.shape[0])))

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        opener: Any = gzip.open if self.path.suffix == ".gz" else open
        with _data_errors(self.path), opener(self.path, "rb") as file:
            yield file

    def _read_header(self, file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
        magic = file.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES:
            raise DataError(
                f"{self.path}: starts with {magic.hex() or 'nothing'} where an IDX file has 0000, a type and a number "
                "of dimensions; it is not an IDX file: fetch it again"
            )
        ndim = magic[3]
        sizes = file.read(4 * ndim)
        if not 1 <= ndim <= MAX_DIMENSIONS or len(sizes) < 4 * ndim:
            raise DataError(f"{self.path}: its header gives {ndim} dimensions and is cut short or wrong")
        shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
        if not all(shape):
            raise DataError(f"{self.path}: its header gives the empty shape {shape}; fetch it again")
        return np.dtype(IDX_TYPES[magic[2]]), shape


def checksum(path: Path) -> str:
    """CRC-32 and size of a file's bytes on disk."""
    found, size = 0, 0
    with _data_errors(path), open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            found, size = zlib.crc32(chunk, found), size + len(chunk)
    return f"{found:08x}-{size}"


def _read(file: IO[bytes], size: int) -> bytes:
    """`size` bytes or what is left; in parts, so that a lying header reserves no memory."""
    parts = []
    while size > 0 and (part := file.read(min(size, MAX_READ))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@contextmanager
def _data_errors(path: Path) -> Iterator[None]:
    """Turns the errors of opening, reading and unzipping into a DataError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unzipped ({error}); it is cut short or damaged: fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
