"""IDX files, against numpy; the files are encoded by conftest's own writer."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.errors import DataError
from fastmnist.sources.idx import IDX_TYPES, IdxFile, checksum

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def an_array(code: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits of the dtype, without the not-a-numbers that compare unequal to themselves."""
    dtype = np.dtype(IDX_TYPES[code])
    bits = np.random.default_rng(code).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    array = bits.view(dtype)[..., 0]
    return np.nan_to_num(array) if dtype.kind == "f" else array


READS = [lambda file: list(file.blocks(2)), IdxFile.read]


def a_header(code: int, *shape: int) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, code, len(shape), *shape)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("code", sorted(IDX_TYPES))
@given(shape=SHAPES)
def test_reads_what_numpy_wrote_for_every_type(scratch, write_idx, code, suffix, shape):
    array = an_array(code, shape)
    file = IdxFile(write_idx(scratch() / f"values{suffix}", array), IDX_TYPES[code], len(shape))
    assert file.shape == shape
    assert file.dtype == np.dtype(IDX_TYPES[code])
    np.testing.assert_array_equal(file.read(), array, strict=False)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@given(rows=st.integers(1, 12), count=st.integers(1, 9))
def test_blocks_of_any_size_are_the_array_in_order(scratch, write_idx, suffix, rows, count):
    array = an_array(0x0C, (count, 3, 2))
    blocks = list(IdxFile(write_idx(scratch() / f"values{suffix}", array), ">i4", 3).blocks(rows))
    assert [len(block) for block in blocks] == [rows] * (count // rows) + [count % rows] * bool(count % rows)
    np.testing.assert_array_equal(np.concatenate(blocks), array)


def test_checksum_tells_files_of_different_bytes_apart(tmp_path, write_idx):
    ones, twos = np.ones((4, 4), np.uint8), np.full((4, 4), 2, np.uint8)
    first, same, other = (
        checksum(write_idx(tmp_path / name, array))
        for name, array in (("first", ones), ("same", ones), ("other", twos))
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"\0\0\x08",
        b"\x89PNG\r\n\x1a\n" * 4,
        b"\0\x01\x08\x01\0\0\0\x01\0",  # the first two bytes are zeros
        b"\0\0\x0a\x01\0\0\0\x01\0",  # a type that there is not
        b"\0\0\x08\0\0\0\0\x01\0",  # no dimension
        b"\0\0\x08\x02\0\0\0\x01",  # the second size is missing
        b"\0\0\x08\xff" + b"\0\0\0\x01" * 255,
        a_header(0x08, 0),
        a_header(0x08, 3, 0),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_no_idx_file_is_refused_by_name(tmp_path, content, suffix):
    path = tmp_path / f"values{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match="values"):
        IdxFile(path)


@pytest.mark.parametrize(
    ("dtype", "ndim", "needed"), [("u1", 1, "1-dim"), (">i4", 2, "2-dimensional >i4"), ("i1", 2, "int8")]
)
def test_other_type_or_dimensions_are_refused_naming_both(tmp_path, write_idx, dtype, ndim, needed):
    path = write_idx(tmp_path / "values", np.ones((3, 2), np.uint8))
    with pytest.raises(DataError) as error:
        IdxFile(path, dtype, ndim)
    assert all(text in str(error.value) for text in (str(path), "2-dimensional uint8", needed))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@given(kept=st.integers(0, 19), rows=st.integers(1, 6))
def test_fewer_values_than_the_header_announces_are_refused_naming_both_sizes(scratch, suffix, kept, rows):
    content = a_header(0x08, 5, 4) + bytes(range(kept))
    path = scratch() / f"values{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    for read in (lambda: list(IdxFile(path, "u1", 2).blocks(rows)), IdxFile(path, "u1", 2).read):
        with pytest.raises(DataError) as error:
            read()
        assert all(text in str(error.value) for text in (str(path), f"{kept} bytes", "20"))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_more_values_than_the_header_announces_are_refused(tmp_path, suffix, read):
    content = a_header(0x08, 5, 4) + bytes(21)
    path = tmp_path / f"values{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=r"values.*20"):
        read(IdxFile(path, "u1", 2))


@pytest.mark.parametrize("shape", [(65535, 65535, 65535), (2**32 - 1,) * 3, (2**31, 2**31, 4), (1, *(2**32 - 1,) * 7)])
def test_sizes_that_no_memory_holds_are_refused(tmp_path, shape):
    path = tmp_path / "values"
    path.write_bytes(a_header(0x08, *shape) + bytes(100))
    for read in READS:
        with pytest.raises(DataError, match="values"):
            read(IdxFile(path, "u1", len(shape)))


def a_gzipped_file(path, write_idx) -> bytes:
    array = np.random.default_rng(0).integers(0, 256, (10, 9), np.uint8)
    return write_idx(path, array).read_bytes()


@pytest.mark.parametrize("read", READS)
def test_a_gzipped_file_cut_at_any_byte_is_refused(scratch, write_idx, read):
    path = scratch() / "values.gz"
    content = a_gzipped_file(path, write_idx)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"values\.gz"):
            read(IdxFile(path, "u1", 2))


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_gzipped_file_gives_the_same_values_or_is_refused(scratch, write_idx, position, bit):
    path = scratch() / "values.gz"
    content = bytearray(a_gzipped_file(path, write_idx))
    whole = IdxFile(path, "u1", 2).read()
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        values = IdxFile(path, "u1", 2).read()
    except DataError as error:
        assert "values.gz" in str(error)  # noqa: PT017  # some bits, as those of the time stamp, do not matter
    else:
        np.testing.assert_array_equal(values, whole)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "missing", tmp_path / "missing.gz", tmp_path):
        with pytest.raises(DataError, match=path.name):
            IdxFile(path)
