"""Structures of the `.beton` file: FFCV's format, version 2, and an integrity block that FFCV does not see.

All little-endian, in this order (G. Leclerc et al., "FFCV: Accelerating Training by Removing Data Bottlenecks", CVPR
2023):

    header | one descriptor per field | one metadata row per sample | integrity block | zeros up to a page boundary |
    pages of whole samples, each padded with zeros | allocation table (sample, address, size), to the end of the file

FFCV leaves the argument bytes of an integer field empty; ours hold the address of the integrity block.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastmnist.errors import DataError

FORMAT_VERSION = 2
MAX_FIELDS = 64
MAX_SIDE = 2**16 - 1  # of an image; also the most channels
TYPE_NAMES = {0: "FloatField", 1: "IntField", 2: "RGBImageField", 3: "BytesField", 4: "NDArrayField"}
TYPE_NAMES |= {5: "JSONField", 6: "TorchTensorField", 255: "a custom field"}
INT_FIELD, NDARRAY_FIELD = 1, 4

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
NDARRAY_ARGUMENTS = np.dtype([("shape", "<u8", (32,)), ("type_length", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELD_METADATA = {NDARRAY_FIELD: "<u8", INT_FIELD: "<i8"}  # an address; the integer itself

INTEGRITY_MAGIC = b"fastmnst"
INTEGRITY_VERSION = 1
MARKER = np.dtype([("magic", "S8"), ("offset", "<u8"), ("size", "<u8")])
INTEGRITY = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("checksum", "<u4"),  # CRC-32 of the block from here to its end
        ("file_size", "<u8"),
        ("data_start", "<u8"),
        ("num_pages", "<u8"),
        ("num_channels", "<u8"),
        ("info_size", "<u8"),
        ("head_checksum", "<u4"),  # header, descriptors and metadata
        ("table_checksum", "<u4"),  # allocation table
    ]
)
CHECKSUM_START = INTEGRITY.fields["checksum"][1] + 4  # type: ignore[index]  # a structured dtype has fields


@dataclass(frozen=True)
class Integrity:
    """Integrity block: checksums, statistics and texts.

    mean, std: per channel, of pixel values scaled to [0, 1], over the whole file. source: identifies the bytes that
    the file was made from.
    """

    dataset: str
    split: str
    class_names: tuple[str, ...]
    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    page_checksums: np.ndarray = field(repr=False)  # (pages,) uint32
    file_size: int
    data_start: int
    head_checksum: int
    table_checksum: int

    def pack(self) -> bytes:
        """The block as bytes; its size depends on the texts, the channels and the number of pages alone."""
        info = json.dumps(
            {
                "dataset": self.dataset,
                "split": self.split,
                "class_names": self.class_names,
                "source": self.source,
            }
        ).encode()
        head = np.zeros((), INTEGRITY)
        head["magic"], head["version"] = INTEGRITY_MAGIC, INTEGRITY_VERSION
        head["file_size"], head["data_start"] = self.file_size, self.data_start
        head["num_pages"], head["num_channels"] = len(self.page_checksums), len(self.mean)
        head["info_size"] = len(info)
        head["head_checksum"], head["table_checksum"] = self.head_checksum, self.table_checksum
        tail = np.array([self.mean, self.std], "<f8").tobytes() + self.page_checksums.astype("<u4").tobytes() + info
        head["checksum"] = zlib.crc32(tail, zlib.crc32(head.tobytes()[CHECKSUM_START:]))
        return head.tobytes() + tail

    @classmethod
    def unpack(cls, block: bytes, path: Path) -> Integrity:
        """The block from its bytes; raises DataError naming `path` when a byte of it is wrong."""
        head = np.frombuffer(block, INTEGRITY, count=1)[0] if len(block) >= INTEGRITY.itemsize else None
        if head is None or head["magic"] != INTEGRITY_MAGIC:
            raise damaged(path, "its integrity block is missing from the place that the file names")
        if head["version"] != INTEGRITY_VERSION:
            raise DataError(
                f"{path}: its integrity block has version {head['version']}, this program reads version "
                f"{INTEGRITY_VERSION}; compile the data again with this program"
            )
        expected, actual = int(head["checksum"]), zlib.crc32(block[CHECKSUM_START:])
        if expected != actual:
            raise damaged(path, f"the integrity block's checksum is {actual:08x} where {expected:08x} was written")
        channels, pages = int(head["num_channels"]), int(head["num_pages"])
        at = INTEGRITY.itemsize
        moments = np.frombuffer(block, "<f8", 2 * channels, at).reshape(2, channels)
        checksums = np.frombuffer(block, "<u4", pages, at + moments.nbytes)
        info = json.loads(block[at + moments.nbytes + checksums.nbytes :])
        return cls(
            dataset=info["dataset"],
            split=info["split"],
            class_names=tuple(info["class_names"]),
            source=info["source"],
            mean=tuple(moments[0].tolist()),
            std=tuple(moments[1].tolist()),
            page_checksums=checksums,
            file_size=int(head["file_size"]),
            data_start=int(head["data_start"]),
            head_checksum=int(head["head_checksum"]),
            table_checksum=int(head["table_checksum"]),
        )


def damaged(path: Path, what: str) -> DataError:
    """The error for a file that has changed since it was written."""
    return DataError(f"{path} is damaged: {what}; delete it, then compile it again (fastmnist compile)")
