"""Writer and reader of `.beton` files: round trips, damage, and failures that leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.beton.format import ALLOCATION, FIELD, HEADER, NDARRAY_ARGUMENTS
from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import write_beton
from fastmnist.errors import DataError, FastmnistError

TINY_PAGE = 1024


class Blocks:
    """An ImageStream of given blocks, whatever rows are asked for; a block that is an error is raised."""

    def __init__(self, shape: tuple[int, ...], *blocks: np.ndarray | BaseException) -> None:
        self.shape, self.content = shape, blocks

    def blocks(self, rows: int):
        for block in self.content:
            if isinstance(block, BaseException):
                raise block
            yield block


def assert_file_holds(path, images, labels, verify="full") -> None:
    with Beton(path, verify=verify) as file:
        assert len(file) == len(images)
        np.testing.assert_array_equal(
            file.images(np.arange(len(images))), images.reshape(len(images), *file.image_shape)
        )
        np.testing.assert_array_equal(file.labels, labels)


def raised_by_reading(path) -> DataError | None:
    """What opening and verifying the file raises; anything other than a DataError goes through."""
    try:
        with Beton(path) as file:
            file.verify_content()
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017  # every message names the file
        return error
    return None


@pytest.fixture(scope="module")
def tiny(scratch, write_small_beton):
    """A file of 5 samples of 4x4 with pages of 1,024 bytes, as bytes."""
    path = scratch() / "tiny.beton"
    write_small_beton(path, 5, (4, 4), page_size=TINY_PAGE, class_names=tuple("0123456789"), dataset="tiny")
    return path.read_bytes()


# Round trip


@given(
    count=st.integers(1, 60),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40))
    | st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 11)),  # more channels may be columns
    page_size=st.sampled_from([1, 512, 1024, 4096, 1 << 16]),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read_again(scratch, write_small_beton, count, shape, page_size, seed):
    path = scratch() / "samples.beton"
    images, labels = write_small_beton(path, count, shape, seed=seed, page_size=page_size)
    assert_file_holds(path, images, labels)
    with Beton(path) as file:
        assert file.image_shape == (shape if len(shape) == 3 else (*shape, 1))
        values = images.reshape(-1, file.image_shape[2]) / 255
        mean, std = file.moments
        np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(std, np.where(np.ptp(values, axis=0) > 0, values.std(axis=0), 1), rtol=1e-9)


@given(count=st.integers(1, 60), shape=st.tuples(*[st.integers(1, 30)] * 2), page_size=st.sampled_from([1, 512, 1024]))
def test_no_sample_straddles_a_page_and_the_table_is_in_address_order(
    scratch, write_small_beton, count, shape, page_size
):
    path = scratch() / "samples.beton"
    write_small_beton(path, count, shape, page_size=page_size)
    content = path.read_bytes()
    header = np.frombuffer(content, HEADER, 1)[0]
    table = np.frombuffer(content, ALLOCATION, offset=int(header["alloc_table_ptr"]))
    page, size = int(header["page_size"]), shape[0] * shape[1]
    assert page >= max(page_size, size)
    assert page & (page - 1) == 0
    assert (page == page_size) == (size <= page_size)  # it grows only where it must
    assert len(table) == count
    assert (table["size"] == size).all()
    assert (np.diff(table["ptr"].astype(np.int64)) >= size).all()
    assert (table["ptr"] // page == (table["ptr"] + np.uint64(size - 1)) // page).all()
    assert int(header["alloc_table_ptr"]) % page == 0
    with Beton(path) as file:
        np.testing.assert_array_equal(table["ptr"][np.argsort(table["sample_id"])], file.offsets)


def test_what_no_sample_fills_is_zeros(tmp_path, write_small_beton):
    """Pages of 1,024 bytes with 20 samples of 49 bytes each, the last page with 10."""
    write_small_beton(tmp_path / "a.beton", 50, (7, 7), page_size=TINY_PAGE)
    file = Beton(tmp_path / "a.beton")
    pages = file.data[file.integrity.data_start :][: 3 * TINY_PAGE].reshape(3, TINY_PAGE)
    assert not pages[:, 980:].any()
    assert not pages[2, 490:].any()
    assert pages[2, :490].any()


def test_a_memory_map_and_a_transposed_view_are_written_as_arrays_are(tmp_path, random_samples):
    images, labels = random_samples(20, (6, 9))
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for number, view in enumerate((mapped, mapped.transpose(0, 2, 1), mapped[:, ::-1])):
        path = write_beton(tmp_path / f"{number}.beton", view, labels, page_size=TINY_PAGE)
        assert_file_holds(path, np.array(view), labels)


def test_texts_class_names_and_fingerprint_are_kept(tmp_path, random_samples):
    images, labels = random_samples(6, (4, 4), classes=3)
    options = {"class_names": ("nought", "een", "två"), "dataset": "numbers", "split": "test", "source": "memory"}
    with Beton(write_beton(tmp_path / "a.beton", images, labels, **options)) as file:
        assert file.class_names == file.integrity.class_names == ("nought", "een", "två")
        assert (file.integrity.dataset, file.integrity.split, file.integrity.source) == ("numbers", "test", "memory")
        fingerprint = file.fingerprint
    write_beton(tmp_path / "same.beton", images, labels, **options)
    images[3, 2, 1] ^= 1
    write_beton(tmp_path / "other.beton", images, labels, **options)
    assert Beton(tmp_path / "same.beton").fingerprint == fingerprint
    assert Beton(tmp_path / "other.beton").fingerprint != fingerprint


def test_without_class_names_there_are_numbers_to_the_highest_label(tmp_path, random_samples):
    images, _ = random_samples(3, (2, 2))
    assert Beton(write_beton(tmp_path / "a.beton", images, [0, 4, 1])).class_names == tuple("01234")


def test_progress_counts_up_to_all_samples(tmp_path, write_small_beton):
    seen = []
    write_small_beton(tmp_path / "a.beton", 50, page_size=8192, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(10, 50), (20, 50), (30, 50), (40, 50), (50, 50)]


def test_a_constant_channel_has_a_spread_of_one(tmp_path):
    images = np.zeros((3, 4, 4, 2), np.uint8)
    images[..., 1] = 7
    mean, std = Beton(write_beton(tmp_path / "a.beton", images, [0, 1, 2])).moments
    assert mean == (0.0, pytest.approx(7 / 255))
    assert std == (1.0, 1.0)


# Writing: all or nothing


def test_bad_samples_are_refused_before_anything_is_written(tmp_path):
    images, labels = np.zeros((4, 5, 5), np.uint8), np.arange(4)
    cases = [
        (images.astype(np.float32), labels, {}, "float32"),
        (images.astype(np.int64), labels, {}, "int64"),
        (images[:0], labels[:0], {}, "none 0"),
        (images[:, :0], labels, {}, "none 0"),
        (images[0], labels, {}, "shape"),
        (images[..., None, None], labels, {}, "shape"),
        (images, labels[:3], {}, "4 images"),
        (images, labels[:, None], {}, "4 images"),
        (images, labels.astype(np.float64), {}, "float64"),
        (images, ["a", "b", "c", "d"], {}, "one integer"),
        (images, labels - 1, {}, "label -1 of sample 0"),
        (images, labels, {"class_names": ("a", "b", "c")}, "label 3 of sample 3 is out of range; 0 to 2"),
        (images, labels.astype(np.uint64) + np.uint64(2**63), {}, "of sample 0"),
    ]
    for bad_images, bad_labels, options, text in cases:
        with pytest.raises(DataError) as error:
            write_beton(tmp_path / "bad.beton", bad_images, bad_labels, **options)
        assert text in str(error.value)
        assert "bad.beton" in str(error.value)
    assert not list(tmp_path.iterdir())


class Pairs:
    """As a torch Dataset: images and labels by index."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index >= 3:
            raise IndexError(index)
        return np.full((8, 9), index, np.uint8), index


COLOURS = np.arange(3 * 3 * 12 * 13, dtype=np.uint32).astype(np.uint8).reshape(3, 3, 12, 13)  # (N, C, H, W)


@pytest.mark.parametrize(
    ("images", "advice"),
    [
        (torch.from_numpy(COLOURS[:, 0]), r"tensor\.cpu\(\)\.numpy\(\)"),
        (list(COLOURS[:, 0]), r"np\.stack\(images\)"),
        (Pairs(), "leave the argument labels out"),
        (iter(COLOURS), "a dataset with items by number, or a stream"),
        (COLOURS, r"images\.transpose\(0, 2, 3, 1\)"),
        (Blocks(COLOURS.shape, COLOURS), r"images\.transpose\(0, 2, 3, 1\)"),
        (COLOURS[:, 0] / np.float32(255), "np.round"),
    ],
)
def test_images_that_come_otherwise_are_refused_with_what_to_call(tmp_path, images, advice):
    with pytest.raises(DataError, match=advice):
        write_beton(tmp_path / "a.beton", images, np.arange(3))
    assert not list(tmp_path.iterdir())


def test_images_without_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="one integer per image"):
        write_beton(tmp_path / "a.beton", COLOURS[:, 0])


def test_what_the_advice_gives_is_written(tmp_path):
    for colours in (COLOURS.transpose(0, 2, 3, 1), torch.from_numpy(COLOURS).permute(0, 2, 3, 1).numpy()):
        with Beton(write_beton(tmp_path / "b.beton", colours, np.arange(3))) as file:
            np.testing.assert_array_equal(file.images(np.arange(3)), colours)


@pytest.mark.parametrize("page_size", [0, -1024, 1000, 3])
def test_a_page_size_that_is_no_power_of_two_is_refused(tmp_path, write_small_beton, page_size):
    with pytest.raises(ValueError, match=str(page_size)):
        write_small_beton(tmp_path / "bad.beton", page_size=page_size)


@pytest.mark.parametrize("shape", [(1, 65536), (65536, 1), (1, 1, 65536)])
def test_a_shape_that_cannot_be_read_again_is_not_written(tmp_path, shape):
    with pytest.raises(DataError, match="65536"):
        write_beton(tmp_path / "bad.beton", np.zeros((1, *shape), np.uint8), [0])
    assert not list(tmp_path.iterdir())


ONE = np.ones((64, 4, 4), np.uint8)  # one page of 1,024 bytes


BROKEN_STREAMS = {
    "DataError": (DataError, ONE, DataError("the source is cut short")),
    "bug": (ZeroDivisionError, ONE, ZeroDivisionError()),
    "interrupted": (KeyboardInterrupt, ONE, KeyboardInterrupt()),
    "unreadable": (FastmnistError, OSError(errno.EIO, "source unreadable")),
    "fewer images": (DataError, ONE),
    "more images": (DataError, ONE, ONE, ONE),
    "float": ((DataError, ValueError), ONE / np.float32(255), ONE),
    "int64": ((DataError, ValueError), ONE, ONE.astype(np.int64) + 256),
    "blocks within a page": ((DataError, ValueError), ONE[:20], ONE[:44], ONE),
    "a block over two pages": ((DataError, ValueError), np.concatenate([ONE, ONE])),
    "another shape": ((DataError, ValueError), ONE, ONE[:, :, :3]),
}


@pytest.mark.parametrize("stream", BROKEN_STREAMS)
@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older file"])
def test_a_stream_that_fails_or_breaks_its_word_leaves_everything_as_it_was(tmp_path, tiny, stream, older):
    path = tmp_path / "target.beton"
    if older:
        path.write_bytes(tiny)
    error, *blocks = BROKEN_STREAMS[stream]
    with pytest.raises(error):
        write_beton(path, Blocks((128, 4, 4), *blocks), np.zeros(128, int), page_size=TINY_PAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["target.beton"] * older
    assert not older or path.read_bytes() == tiny


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
@pytest.mark.parametrize("limit", [0, 5000, 8192, 12000])
def test_a_file_size_limit_of_the_system_leaves_the_older_file(tmp_path, in_a_new_process, tiny, limit):
    """The kernel refuses the bytes, some of them while the file is flushed or closed."""
    (tmp_path / "target.beton").write_bytes(tiny)
    script = """
        import resource, sys
        import numpy as np
        from fastmnist.beton.writer import write_beton
        from fastmnist.errors import FastmnistError
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        try:
            write_beton(sys.argv[1], np.ones((200, 4, 4), np.uint8), np.zeros(200, int), page_size=1024)
        except FastmnistError as error:
            print(error)
    """
    printed = in_a_new_process(script, tmp_path / "target.beton", limit)
    assert str(tmp_path / "target.beton") in printed
    assert os.strerror(errno.EFBIG) in printed
    assert [p.name for p in tmp_path.iterdir()] == ["target.beton"]
    assert (tmp_path / "target.beton").read_bytes() == tiny


def test_a_folder_that_cannot_be_made_is_named(tmp_path, write_small_beton):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FastmnistError, match=r"file/a\.beton"):
        write_small_beton(tmp_path / "file" / "a.beton")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource usage")
def test_memory_does_not_grow_with_the_file(tmp_path, in_a_new_process):
    """200 MB of images from a stream that repeats one block; what the labels and addresses need stays small."""
    script = """
        import resource, sys
        import numpy as np
        from fastmnist.beton.writer import write_beton

        COUNT, SHAPE = 3200, (256, 256)

        class Repeated:
            shape = (COUNT, *SHAPE)

            def blocks(self, rows):
                block = np.arange(rows * 256 * 256, dtype=np.uint32).astype(np.uint8).reshape(rows, *SHAPE)
                for start in range(0, COUNT, rows):
                    yield block[: COUNT - start]

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)

        write_beton(sys.argv[1], np.zeros((10, *SHAPE), np.uint8), np.zeros(10, int))
        before = peak()
        write_beton(sys.argv[1], Repeated(), np.zeros(COUNT, int))
        print(peak() - before)
    """
    path = tmp_path / "big.beton"
    grown = int(in_a_new_process(script, path)) * 1024
    assert path.stat().st_size > 200e6
    assert grown < 40e6
    path.unlink()


# Reading: whole or refused


def test_a_file_cut_at_any_length_is_refused_when_it_is_opened(tmp_path, tiny):
    path = tmp_path / "cut.beton"
    path.write_bytes(tiny)
    for length in range(len(tiny) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(DataError, match=r"cut\.beton"):
            Beton(path, verify="size")


@given(
    extra=st.binary(min_size=1, max_size=100) | st.sampled_from([bytes(ALLOCATION.itemsize), bytes(TINY_PAGE)]),
    ffcvs=st.booleans(),
)
def test_a_file_with_bytes_appended_is_refused_when_it_is_opened(scratch, tiny, extra, ffcvs):
    path = scratch() / "longer.beton"
    path.write_bytes((rewritten(tiny) if ffcvs else tiny) + extra)
    with pytest.raises(DataError, match=r"longer\.beton"):
        Beton(path, verify="size")


def test_a_flipped_bit_anywhere_is_found(tmp_path, tiny):
    """Every byte of the file, one bit of each; which bit changes from byte to byte."""
    path = tmp_path / "flipped.beton"
    path.write_bytes(tiny)
    unnoticed = []
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(tiny):
            os.pwrite(file.fileno(), bytes([byte ^ (1 << position % 8)]), position)
            if raised_by_reading(path) is None:
                unnoticed.append(position)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert not unnoticed
    assert raised_by_reading(path) is None
    assert "5 samples" in Beton(path).verify_content()


def test_any_flipped_bit_of_the_header_and_the_used_descriptor_bytes_is_found(tmp_path, tiny):
    """All eight bits of the bytes that decide how the others are read."""
    path = tmp_path / "flipped.beton"
    path.write_bytes(tiny)
    used = [k for k, byte in enumerate(tiny[: HEADER.itemsize + 2 * FIELD.itemsize]) if byte or k < HEADER.itemsize]
    with open(path, "r+b", buffering=0) as file:
        for position in used:
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([tiny[position] ^ (1 << bit)]), position)
                assert raised_by_reading(path) is not None
            os.pwrite(file.fileno(), tiny[position : position + 1], position)


@given(changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=20))
def test_changed_bytes_in_the_head_are_found_without_any_other_error(scratch, tiny, changes):
    content = bytearray(tiny)
    for position, byte in changes:
        content[position] = byte
    path = scratch() / "changed.beton"
    path.write_bytes(content)
    assert (raised_by_reading(path) is None) == (content == tiny)


def rewritten(tiny: bytes, **parts) -> bytes:
    """The file without its integrity block's address, as FFCV writes it, with other values in its head."""
    head = HEADER.itemsize
    header = np.frombuffer(tiny, HEADER, 1).copy()
    fields = np.frombuffer(tiny, FIELD, 2, head).copy()
    rows = np.frombuffer(tiny, np.dtype([("image", "<u8"), ("label", "<i8")]), 5, head + fields.nbytes).copy()
    fields["arguments"][1] = 0
    for name, value in parts.items():
        if name in HEADER.names:
            header[name] = value
        elif name in rows.dtype.names:
            rows[name][2] = value
        elif name == "dtype":
            fields["arguments"][0][NDARRAY_ARGUMENTS.itemsize :] = 0
            fields["arguments"][0][NDARRAY_ARGUMENTS.itemsize :][: len(value)] = np.frombuffer(value, np.uint8)
            fields["arguments"][0][256:264] = np.frombuffer(np.uint64(len(value)).tobytes(), np.uint8)
        elif name == "shape":
            fields["arguments"][0][:256] = np.frombuffer(np.array(value + (0,) * 28, "<u8")[:32].tobytes(), np.uint8)
        else:
            fields[name] = value
    changed = header.tobytes() + fields.tobytes() + rows.tobytes()
    return changed + tiny[len(changed) :]


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"dtype": json.dumps([["", "<f4"]]).encode()}, "<f4"),
        ({"dtype": json.dumps([["", "|u1"], ["b", "|u1"]]).encode()}, "bad"),
        ({"dtype": b"[1]"}, "bad"),
        ({"dtype": b"[null]"}, "bad"),
        ({"dtype": b"7"}, "bad"),
        ({"dtype": b"\xff\xfe"}, "bad"),
        ({"dtype": b"[" * 700}, "bad"),
        ({"shape": (16, 0, 0, 0)}, "(16,)"),
        ({"shape": (4, 0, 4, 0)}, "(4, 0, 4)"),
        ({"shape": (4, 4, 1, 1)}, "(4, 4, 1, 1)"),
        ({"shape": (2**63, 2**63, 0, 0)}, "uint8"),
        ({"type_id": [4, 4]}, "NDArrayField, NDArrayField"),
        ({"type_id": [4, 200]}, "type 200"),
        ({"type_id": [2, 1]}, "RGBImageField, IntField"),
        ({"label": -1}, "label -1"),
        ({"image": 2**63 + 5}, "sample 2"),
        ({"image": 8}, "sample 2"),
        ({"image": 10**6}, "sample 2"),
        ({"version": 1}, "version 2"),
        ({"num_fields": 0}, "0 fields"),
        ({"num_fields": 65}, "65 fields"),
        ({"num_fields": 64}, "64"),
        ({"num_samples": 2**63}, "bytes"),
        ({"num_samples": 2**63, "alloc_table_ptr": 2**63}, "bytes"),
        ({"page_size": 1000}, "1000"),
        ({"page_size": 0}, "pages of 0"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused_without_checksums_too(tmp_path, tiny, parts, named):
    path = tmp_path / "bad.beton"
    path.write_bytes(rewritten(tiny))
    assert raised_by_reading(path) is None  # FFCV's kind of file is fine until a value of it is changed
    path.write_bytes(rewritten(tiny, **parts))
    with pytest.raises(DataError) as error:
        Beton(path)
    assert named in str(error.value)


def test_an_image_that_straddles_two_pages_is_refused(tmp_path, write_small_beton):
    path = tmp_path / "a.beton"
    write_small_beton(path, 20, (4, 4), page_size=64)  # four images a page
    with Beton(path) as file:
        last_of_a_page = int(file.offsets[7])
        at = HEADER.itemsize + 2 * FIELD.itemsize + 7 * 16
    content = bytearray(path.read_bytes())
    assert content[at : at + 8] == last_of_a_page.to_bytes(8, "little")
    content[at : at + 8] = (last_of_a_page + 1).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="sample 7"):
        Beton(path)


def test_a_file_of_no_sample_is_refused(tmp_path, tiny):
    """As FFCV writes it for an empty dataset."""
    path = tmp_path / "empty.beton"
    content = rewritten(tiny, num_samples=0)
    table = int(np.frombuffer(content, HEADER, 1)[0]["alloc_table_ptr"])
    path.write_bytes(content[:table])
    with pytest.raises(DataError, match=r"empty\.beton"):
        Beton(path)


def test_an_integrity_block_of_a_later_version_asks_for_a_new_compilation(tmp_path, tiny):
    at = tiny.index(b"fastmnst", tiny.index(b"fastmnst") + 1)
    block = bytearray(tiny)
    block[at + 8] = 2
    path = tmp_path / "later.beton"
    path.write_bytes(block)
    with pytest.raises(DataError, match=r"later\.beton.*version 2.*version 1.*compile"):
        Beton(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\2\0", b"\x89PNG\r\n\x1a\n" + bytes(3000), b"\xff" * 5000, b"text" * 600]
)
def test_what_is_no_beton_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.beton"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"other\.beton"):
        Beton(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"missing\.beton.*fastmnist compile"):
        Beton(tmp_path / "missing.beton")
    with pytest.raises(DataError, match=str(tmp_path)):
        Beton(tmp_path)


@given(content=st.binary(max_size=4000), with_header=st.booleans())
def test_random_bytes_are_refused(scratch, content, with_header):
    path = scratch() / "random.beton"
    if with_header:  # one whose sizes are right, so that the fields are looked at
        header = np.zeros((), HEADER)
        header["version"], header["num_fields"], header["page_size"] = 2, 2, 1024
        header["alloc_table_ptr"] = HEADER.itemsize + len(content)
        content = header.tobytes() + content
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"random\.beton"):
        Beton(path, verify="full")


def test_the_checksum_error_names_the_page_and_both_checksums(tmp_path, tiny):
    table = int(np.frombuffer(tiny, HEADER, 1)[0]["alloc_table_ptr"])
    content = bytearray(tiny)
    content[table - TINY_PAGE] ^= 1
    path = tmp_path / "flipped.beton"
    path.write_bytes(content)
    wrong, right = (zlib.crc32(c[table - TINY_PAGE : table]) for c in (content, tiny))
    with pytest.raises(DataError, match=f"page 0 .*{wrong:08x}.*{right:08x}"):
        Beton(path, verify="full")
    Beton(path, verify="size")


def test_an_unknown_way_to_verify_is_refused(tmp_path, tiny):
    (tmp_path / "a.beton").write_bytes(tiny)
    with pytest.raises(ValueError, match="quick"):
        Beton(tmp_path / "a.beton", verify="quick")


def test_arrays_taken_from_an_open_file_stay_valid_after_it_is_closed(tmp_path, write_small_beton):
    images, _ = write_small_beton(tmp_path / "a.beton", 5, (4, 4))
    with Beton(tmp_path / "a.beton") as file:
        data, copies = file.data, file.images(np.array([3, 1]))
        at = int(file.offsets[2])
    np.testing.assert_array_equal(copies[..., 0], images[[3, 1]])
    np.testing.assert_array_equal(data[at : at + 16], images[2].ravel())
    assert not data.flags.writeable
