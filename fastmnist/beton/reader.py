"""Reader of `.beton` files: memory-mapped, and checked before anything of them is used."""

from __future__ import annotations

import json
import mmap
import os
import weakref
import zlib
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np

from fastmnist.beton.format import (
    ALLOCATION,
    FIELD,
    FIELD_METADATA,
    FORMAT_VERSION,
    HEADER,
    INT_FIELD,
    INTEGRITY_MAGIC,
    MARKER,
    MAX_FIELDS,
    MAX_SIDE,
    NDARRAY_ARGUMENTS,
    NDARRAY_FIELD,
    TYPE_NAMES,
    Integrity,
    damaged,
)
from fastmnist.beton.moments import Moments
from fastmnist.errors import DataError
from fastmnist.files import read_at

Verify = Literal["size", "full"]
LAST_BYTES = 4096  # read to see whether the file is still whole


class Beton:
    """A `.beton` file of N samples, open for reading: a uint8 image of one fixed shape and an integer label each.

    fastmnist or FFCV wrote it (an NDArrayField of uint8 and an IntField, in either order).

    >>> import fastmnist
    >>> images = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)  # (N, H, W)
    >>> file = fastmnist.Beton(fastmnist.write_beton("two.beton", images, [7, 2]))
    >>> len(file), file.image_shape, file.labels
    (2, (4, 3, 1), array([7, 2]))
    >>> file.images(np.array([1])).shape  # (n, H, W, C)
    (1, 4, 3, 1)

    Args:
        path: the file.
        verify: "size" checks the file's length and every address; "full" also checks every byte against the checksums
            (FFCV's own files have none: there the allocation table is checked).

    Attributes:
        data: (file size,) uint8, the whole file, memory-mapped read-only.
        offsets: (N,) int64, where each image starts in `data`.
        labels: (N,) int64.
        image_shape: (H, W, C). stored_shape: as the file describes it, (H, W) or (H, W, C).
        descriptor: of the open file, for reads that bypass the map.
        image_field, label_field: the fields' names, for FFCV's pipelines.
        integrity: the block that our own writer adds, of integrity_size bytes; None for a file that FFCV wrote.
        head_size, data_start, table_start: where header and metadata end, and where pages and allocation table begin.

    Raises:
        DataError: the file is missing, unreadable, cut short, damaged, or of another layout.
    """

    def __init__(self, path: str | os.PathLike[str], verify: Verify = "size") -> None:
        if verify not in ("size", "full"):
            raise ValueError(f'verify is "size" or "full", not {verify!r}')
        self.path = Path(path)
        self._absolute = self.path.absolute()
        try:
            with open(self.path, "rb") as file:
                self._read(file)
                self._keep_descriptor(file)
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file; fastmnist compile writes one") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        if verify == "full":
            self.verify_content()

    def _read(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        self.file_size = size
        header = self._read_array(file, HEADER, 1, "the header")[0]
        if header["version"] != FORMAT_VERSION:
            raise DataError(
                f"{self.path}: not a .beton of version {FORMAT_VERSION} (its first bytes say {header['version']}); "
                "fastmnist compile and FFCV 1.0 write that version"
            )
        num_fields, self.page_size = int(header["num_fields"]), int(header["page_size"])
        self.num_samples, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        if not 1 <= num_fields <= MAX_FIELDS or self.page_size & (self.page_size - 1) or not self.page_size:
            raise damaged(self.path, f"the header names {num_fields} fields, pages of {self.page_size} bytes")
        # Every count comes from the file: it is checked against the file's size before it sizes anything.
        expected = table + self.num_samples * ALLOCATION.itemsize
        if size != expected:
            raise damaged(self.path, f"it has {size:,} bytes where its header asks for {expected:,}")
        fields = self._read_array(file, FIELD, num_fields, "the field descriptors")
        row, self.image_field, self.label_field = self._parse_fields(fields)
        samples = self._read_array(file, row, self.num_samples, "the metadata")
        self.head_size = file.tell()
        self.table_start = table
        self.labels = samples["label"].astype(np.int64)
        self.offsets = samples["image"].astype(np.int64)
        self.integrity = self._read_integrity(file, fields)
        self.data_start = self.integrity.data_start if self.integrity else self.head_size
        self._check_offsets()
        self._check_labels()
        self.closed = False
        self.data: np.ndarray = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def _keep_descriptor(self, file: BinaryIO) -> None:
        """Keeps the mapped file open, to tell it later from the file at the path."""
        self.descriptor = os.dup(file.fileno())
        self._release = weakref.finalize(self, os.close, self.descriptor)
        self._changed = os.fstat(self.descriptor).st_mtime_ns

    def check_unchanged(self) -> None:
        """Raises DataError when the file was deleted, replaced, cut or rewritten since it was opened.

        Reading a map beyond the end of its file kills the process (SIGBUS): callers check before they begin.
        """
        self.check_open()
        advice = "open it again, or compile it again (fastmnist compile)"
        try:
            there = os.stat(self._absolute)
        except OSError as error:
            what = "was deleted" if isinstance(error, FileNotFoundError) else f"cannot be reached ({error.strerror})"
            raise DataError(f"{self.path} {what} while it was open; {advice}") from None
        here = os.fstat(self.descriptor)
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise DataError(f"{self.path} was replaced by another file while it was open; {advice}")
        if here.st_size != self.file_size:
            raise DataError(
                f"{self.path} had {self.file_size:,} bytes when it was opened and has {here.st_size:,} now; {advice}"
            )
        try:
            end = memoryview(bytearray(LAST_BYTES))
            count = read_at(self.descriptor, end, max(self.file_size - LAST_BYTES, 0))
        except OSError as error:
            raise DataError(f"{self.path}: its end cannot be read: {error.strerror}; {advice}") from None
        if count != min(LAST_BYTES, self.file_size):
            raise DataError(f"{self.path}: {count} of its last {LAST_BYTES} bytes can be read; {advice}")
        if here.st_mtime_ns != self._changed:
            self._check_rewritten(advice)
            self._changed = here.st_mtime_ns

    def _check_rewritten(self, advice: str) -> None:
        """Raises DataError unless the file was merely touched, as its checksums then show."""
        written = f"{self.path} was written to while it was open"
        if self.integrity is None:
            raise DataError(f"{written}, and has no checksums that tell what changed; {advice}")
        try:
            with Beton(self._absolute, "full") as now:
                same = now.fingerprint == self.fingerprint
        except DataError as error:
            raise DataError(f"{written}: {error}") from None
        if not same:
            raise DataError(f"{written}; {advice}")

    def identity(self) -> tuple[Path, str]:
        """(absolute path, fingerprint): `open_again`'s arguments in another process."""
        self.check_open()
        return self._absolute, self.fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return open_again, self.identity()

    def _read_array(self, file: BinaryIO, dtype: np.dtype[Any], count: int, what: str) -> np.ndarray:
        size = dtype.itemsize * count
        end = file.tell() + size
        if end > self.file_size:
            raise damaged(self.path, f"it ends at byte {self.file_size:,}, within {what} (to byte {end:,})")
        return np.frombuffer(file.read(size), dtype)

    def _parse_fields(self, fields: np.ndarray) -> tuple[np.dtype[Any], str, str]:
        """The metadata row's dtype and the names of the image and the label field."""
        types = [int(f["type_id"]) for f in fields]
        if sorted(types) != [INT_FIELD, NDARRAY_FIELD]:
            names = ", ".join(TYPE_NAMES.get(t, f"type {t}") for t in types)
            raise DataError(
                f"{self.path}: holds {names}; fastmnist reads one NDArrayField (uint8 images) and one IntField (labels)"
            )
        image, label = fields[types.index(NDARRAY_FIELD)], fields[types.index(INT_FIELD)]
        dtype, shape = self._parse_image_type(image["arguments"].tobytes())
        if dtype != "|u1" or len(shape) not in (2, 3) or not all(0 < n <= MAX_SIDE for n in shape):
            raise DataError(f"{self.path}: its images are {shape} of {dtype}; fastmnist reads (H, W[, C]) uint8")
        self.stored_shape = shape
        self.image_shape = (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)
        self.image_size = int(np.prod(self.image_shape))
        columns = {NDARRAY_FIELD: "image", INT_FIELD: "label"}
        row = np.dtype([(columns[t], FIELD_METADATA[t]) for t in types])
        return row, image["name"].decode("ascii", "replace"), label["name"].decode("ascii", "replace")

    def _parse_image_type(self, arguments: bytes) -> tuple[str, tuple[int, ...]]:
        head = np.frombuffer(arguments, NDARRAY_ARGUMENTS, 1)[0]
        start, length = NDARRAY_ARGUMENTS.itemsize, int(head["type_length"])
        try:
            [(_, dtype)] = json.loads(arguments[start : start + length])
        except (ValueError, TypeError):
            raise damaged(self.path, "the description of its images cannot be read") from None
        return str(dtype), tuple(int(n) for n in np.trim_zeros(head["shape"], "b"))

    def _read_integrity(self, file: BinaryIO, fields: np.ndarray) -> Integrity | None:
        arguments = fields[fields["type_id"] == INT_FIELD]["arguments"][0]
        if not arguments.any():
            return None  # FFCV wrote it
        marker = np.frombuffer(arguments.tobytes(), MARKER, 1)[0]
        if marker["magic"] != INTEGRITY_MAGIC:
            raise damaged(self.path, "the label field's description holds bytes that no writer puts there")
        offset, size = int(marker["offset"]), int(marker["size"])
        if offset != self.head_size or offset + size > self.file_size:
            raise damaged(self.path, f"its integrity block is said to be at bytes {offset} to {offset + size}")
        self._integrity_end = offset + size
        self.integrity_size = size
        block = Integrity.unpack(file.read(size), self.path)
        if block.file_size != self.file_size:
            raise damaged(self.path, f"it has {self.file_size:,} bytes where {block.file_size:,} were written")
        if block.data_start + len(block.page_checksums) * self.page_size != self.table_start:
            raise damaged(self.path, "its pages and its allocation table do not meet")
        if len(block.mean) != self.image_shape[2]:
            raise damaged(self.path, f"it has statistics of {len(block.mean)} channels")
        return block

    def _check_offsets(self) -> None:
        first, last = self.data_start, self.table_start - self.image_size
        outside = np.flatnonzero((self.offsets < first) | (self.offsets > last))
        if len(outside):
            sample = int(outside[0])
            raise damaged(self.path, f"sample {sample} lies at byte {self.offsets[sample]}, outside {first}..{last}")
        # A reader of pages would miss the rest of a sample that straddles two.
        straddling = np.flatnonzero(self.offsets % self.page_size > self.page_size - self.image_size)
        if len(straddling):
            sample = int(straddling[0])
            raise damaged(
                self.path,
                f"sample {sample}, from byte {self.offsets[sample]} on, straddles two pages of {self.page_size} bytes",
            )

    def _check_labels(self) -> None:
        if not self.num_samples:
            raise DataError(f"{self.path}: holds no sample; write it from a source that has images")
        names = self.integrity.class_names if self.integrity else ()
        upper = len(names) or np.iinfo(np.int64).max
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= upper))
        if len(wrong):
            sample = int(wrong[0])
            allowed = f"0 to {upper - 1}" if names else "0 or more"
            raise damaged(self.path, f"sample {sample} has label {self.labels[sample]}, outside {allowed}")

    def verify_content(self) -> str:
        """Checks every byte against the checksums; returns a sentence on what was checked.

        Raises:
            DataError: names the part that differs: a page by number and bytes, or the head, gap or table.
        """
        self.check_unchanged()
        data = self.data
        table = data[self.table_start :].view(ALLOCATION)
        block = self.integrity
        if block is not None:
            self._compare("header and metadata", data[: self.head_size], block.head_checksum)
            if data[self._integrity_end : block.data_start].any():
                raise damaged(self.path, "the gap before its first page is not empty")
            pages = data[block.data_start : self.table_start].reshape(-1, self.page_size)
            for number, (page, checksum) in enumerate(zip(pages, block.page_checksums, strict=True)):
                start = block.data_start + number * self.page_size
                self._compare(f"page {number} (from byte {start:,})", page, int(checksum))
            self._compare("allocation table", data[self.table_start :], block.table_checksum)
        wrong_size = bool((table["size"] != self.image_size).any())
        if wrong_size or not np.array_equal(np.sort(table["ptr"].astype(np.int64)), np.sort(self.offsets)):
            raise damaged(self.path, "its allocation table and its metadata name different places")
        if block is None:
            return f"{self.num_samples:,} samples; every address is right; no checksums (FFCV's own writer)"
        pages_text = f"{len(block.page_checksums)} pages"
        return f"{self.num_samples:,} samples; {pages_text}, header, metadata and table match their checksums"

    def _compare(self, what: str, content: np.ndarray, expected: int) -> None:
        actual = zlib.crc32(content.data)
        if actual != expected:
            raise damaged(self.path, f"{what}: checksum {actual:08x} where {expected:08x} was written")

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class; for FFCV's files the numbers from 0 to the highest label."""
        if self.integrity and self.integrity.class_names:
            return self.integrity.class_names
        return tuple(str(n) for n in range(int(self.labels.max()) + 1))

    @property
    def split(self) -> str:
        """As it was written; "" where no split was named."""
        return self.integrity.split if self.integrity else ""

    @cached_property
    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), each one float per channel, of pixel values scaled to [0, 1]; for FFCV's files one pass."""
        if self.integrity is not None:
            return self.integrity.mean, self.integrity.std
        sums = Moments(self.image_shape[2])
        for start in range(0, self.num_samples, 4096):
            sums.add(self.images(np.arange(start, min(start + 4096, self.num_samples))))
        return sums.result()

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: for our files all bytes, for FFCV's labels and size."""
        checksum = zlib.crc32(self.integrity.pack() if self.integrity else self.data[: self.head_size].tobytes())
        return f"{self.file_size}-{checksum:08x}"

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Copies of the images at `indices` (n,) int: (n, H, W, C) uint8. One by one: batches come from Loader."""
        self.check_unchanged()
        size = self.image_size
        images = [self.data[at : at + size] for at in self.offsets[indices]]
        return np.array(images, np.uint8).reshape(-1, *self.image_shape)

    def __len__(self) -> int:
        return self.num_samples

    def close(self) -> None:
        """Closes the file; arrays taken from `data` keep the map alive until they are gone."""
        self.closed = True
        self._release()
        self.data = np.empty(0, np.uint8)

    def check_open(self) -> None:
        """Raises RuntimeError when the file was closed: the kernels do not check where they read."""
        if self.closed:
            raise RuntimeError(f"{self.path} was closed; open it again")

    def __enter__(self) -> Beton:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_again(path: Path, fingerprint: str) -> Beton:
    """Opens the same file in another process.

    Raises:
        DataError: there is no file at `path`, or another one.
    """
    file = Beton(path)
    if file.fingerprint != fingerprint:
        file.close()
        raise DataError(f"{path} is {file.fingerprint}, not the file {fingerprint} that was sent here")
    return file
