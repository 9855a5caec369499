"""Layout of a `.beton` file: sizes, offsets, and the bytes around its pages."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import BinaryIO

import numpy as np

from fastmnist.beton.format import (
    ALLOCATION,
    FIELD,
    FORMAT_VERSION,
    HEADER,
    INT_FIELD,
    INTEGRITY_MAGIC,
    MARKER,
    NDARRAY_ARGUMENTS,
    NDARRAY_FIELD,
    Integrity,
)
from fastmnist.beton.moments import Moments

PAGE_SIZE = 1 << 21  # bytes; the least that FFCV's writer takes, and the size of a huge page
SAMPLE = np.dtype([("image", "<u8"), ("label", "<i8")])
ROWS = 1 << 16  # of a table, made at a time: millions at once would fill memory
CHECKSUM_SIZE = 4  # bytes of one page's checksum in the integrity block


@dataclass(frozen=True)
class Layout:
    """A file of `count` samples; sizes and offsets are in bytes.

    >>> layout = Layout(count=60_000, image_shape=(28, 28))
    >>> layout.per_page, layout.num_pages, layout.data_start, layout.file_size
    (2674, 23, 2097152, 51771648)

    image_shape: (H, W) or (H, W, C), uint8. page_size: at least an image (see `page_size_for`). The texts go into the
    integrity block.
    """

    count: int
    image_shape: tuple[int, ...]
    page_size: int = PAGE_SIZE
    dataset: str = ""
    split: str = ""
    class_names: tuple[str, ...] = ()
    source: str = ""

    @property
    def channels(self) -> int:
        return self.image_shape[2] if len(self.image_shape) == 3 else 1

    @property
    def image_size(self) -> int:
        return math.prod(self.image_shape)

    @property
    def per_page(self) -> int:
        """Samples per page; none straddles two."""
        return self.page_size // self.image_size

    @property
    def num_pages(self) -> int:
        return -(-self.count // self.per_page)

    @property
    def block_start(self) -> int:
        """Start of the integrity block, behind header, descriptors and metadata."""
        return HEADER.itemsize + 2 * FIELD.itemsize + self.count * SAMPLE.itemsize

    @cached_property
    def block_size(self) -> int:
        return len(self._blank.pack()) + self.num_pages * CHECKSUM_SIZE

    @property
    def data_start(self) -> int:
        return -(-(self.block_start + self.block_size) // self.page_size) * self.page_size

    @property
    def table_start(self) -> int:
        return self.data_start + self.num_pages * self.page_size

    @property
    def file_size(self) -> int:
        return self.table_start + self.count * ALLOCATION.itemsize

    def write_around(self, file: BinaryIO, labels: np.ndarray, checksums: Iterable[int], moments: Moments) -> None:
        """Writes all but the pages and the zeros before them: allocation table, header, metadata, integrity block.

        labels: (n,) int64, repeated until there are `count`. checksums: CRC-32 of each page. moments: of all images.
        """
        file.seek(self.table_start)
        table_checksum = _write(file, self._table())
        file.seek(0)
        head_checksum = _write(file, self._head(labels))
        mean, std = moments.result()
        integrity = replace(
            self._blank,
            mean=mean,
            std=std,
            page_checksums=np.fromiter(checksums, np.uint32, self.num_pages),
            file_size=self.file_size,
            data_start=self.data_start,
            head_checksum=head_checksum,
            table_checksum=table_checksum,
        )
        file.write(integrity.pack())

    @property
    def _blank(self) -> Integrity:
        """The integrity block of no pages: its texts alone."""
        return Integrity(
            dataset=self.dataset,
            split=self.split,
            class_names=self.class_names,
            source=self.source,
            mean=(0.0,) * self.channels,
            std=(1.0,) * self.channels,
            page_checksums=np.zeros(0, np.uint32),
            file_size=0,
            data_start=0,
            head_checksum=0,
            table_checksum=0,
        )

    def _addresses(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers, addresses) of the samples, uint64, ROWS at a time."""
        for start in range(0, self.count, ROWS):
            number = np.arange(start, min(start + ROWS, self.count), dtype=np.uint64)
            page, place = number // self.per_page, number % self.per_page
            yield number, self.data_start + page * self.page_size + place * self.image_size

    def _table(self) -> Iterator[bytes]:
        for number, addresses in self._addresses():
            yield _rows(ALLOCATION, sample_id=number, ptr=addresses, size=np.full(len(number), self.image_size))

    def _head(self, labels: np.ndarray) -> Iterator[bytes]:
        yield self._descriptors()
        for number, addresses in self._addresses():
            yield _rows(SAMPLE, image=addresses, label=labels[number % len(labels)])

    def _descriptors(self) -> bytes:
        header = np.zeros((), HEADER)
        header["version"], header["num_fields"] = FORMAT_VERSION, 2
        header["page_size"], header["num_samples"] = self.page_size, self.count
        header["alloc_table_ptr"] = self.table_start

        described = np.zeros((), NDARRAY_ARGUMENTS)
        described["shape"][: len(self.image_shape)] = self.image_shape
        dtype = json.dumps(np.dtype("u1").descr).encode()
        described["type_length"] = len(dtype)
        marker = np.zeros((), MARKER)
        marker["magic"], marker["offset"], marker["size"] = INTEGRITY_MAGIC, self.block_start, self.block_size

        fields = np.zeros(2, FIELD)
        contents = (
            (NDARRAY_FIELD, b"image", described.tobytes() + dtype),
            (INT_FIELD, b"label", marker.tobytes()),
        )
        for descriptor, (type_id, name, arguments) in zip(fields, contents, strict=True):
            descriptor["type_id"], descriptor["name"] = type_id, name
            descriptor["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
        return header.tobytes() + fields.tobytes()


def page_size_for(image_shape: tuple[int, ...], page_size: int = PAGE_SIZE) -> int:
    """`page_size`, doubled until an image fits; raises ValueError when it is no power of 2."""
    if page_size <= 0 or page_size & (page_size - 1):
        raise ValueError(f"page_size is a power of 2, not {page_size}")
    while page_size < math.prod(image_shape):
        page_size *= 2
    return page_size


def _rows(dtype: np.dtype[np.void], **columns: np.ndarray) -> bytes:
    rows = np.zeros(len(next(iter(columns.values()))), dtype)
    for name, column in columns.items():
        rows[name] = column
    return rows.tobytes()


def _write(file: BinaryIO, parts: Iterable[bytes]) -> int:
    """Writes the parts and returns their CRC-32."""
    checksum = 0
    for part in parts:
        file.write(part)
        checksum = zlib.crc32(part, checksum)
    return checksum
