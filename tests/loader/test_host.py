"""Host memory: buffers that are reused, and batches that share none of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastmnist.loader.host import LEAST_KEPT, BufferPool, tensor_maker
from fastmnist.loader.loader import DTYPES
from tests.loader.batches import SHAPE, assert_same_batches, copied

pytestmark = pytest.mark.usefixtures("work_is_shared_among_threads")


@pytest.mark.parametrize(
    "part",
    [
        lambda images: images[3:5],
        lambda images: images.numpy(),
        lambda images: images.numpy()[2],
        lambda images: images.untyped_storage(),
        lambda images: images.view(torch.int8),
        torch.Tensor.detach,
    ],
    ids=["slice", "array", "slice of array", "storage", "other dtype", "detached"],
)
def test_whatever_shares_a_batchs_memory_keeps_it(open_loader, part):
    loader = open_loader()
    held, copies = [], []
    for images, _ in itertools.chain(loader, loader):
        held.append(part(images))
        copies.append(held[-1].tolist())
        del images
    assert len(held) > LEAST_KEPT
    assert [one.tolist() for one in held] == copies


def test_memory_of_dropped_batches_is_used_again(open_loader):
    loader = open_loader(drop_last=True)
    addresses = [images.data_ptr() for _ in range(5) for images, _ in loader]
    assert len(addresses) == 50
    assert len(set(addresses)) <= 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_each_batch_is_a_tensor_of_its_own(open_loader, dtype, threads):
    loader = open_loader(dtype=dtype, threads=threads)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            held = list(loader)
        for tensor in itertools.chain(*held):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor._is_view()
            before = [other._version for other in itertools.chain(*held)]
            tensor.add_(1)
            changed = [other._version for other in itertools.chain(*held)]
            assert sum(changed) == sum(before) + 1
        if dtype.is_floating_point:
            weight = torch.ones((), dtype=dtype, requires_grad=True)
            held[0][0].mul_(weight).sum().backward()
            assert weight.grad is not None


def test_a_later_batch_changed_in_place_breaks_no_backward_pass(open_loader):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SHAPE[0] * SHAPE[1], 10))
    batches = iter(open_loader(dtype=torch.float32))
    (images, labels), (more_images, more_labels) = next(batches), next(batches)
    loss = torch.nn.functional.cross_entropy(net(images), labels)
    more_images.add_(1)
    more_labels[:5] = 3
    loss.backward()


def test_a_batch_saved_takes_the_room_of_a_batch(open_loader, tmp_path):
    images, labels = next(iter(open_loader(dtype=torch.float32)))
    torch.save((images, labels), tmp_path / "batch.pt")
    assert (tmp_path / "batch.pt").stat().st_size < 2 * (images.nbytes + labels.nbytes) + 4000
    assert_same_batches([torch.load(tmp_path / "batch.pt", weights_only=True)], [(images, labels)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", ["stream", "resident"])
def test_inference_mode_ends_with_its_block(open_loader, dtype, placement):
    batches = iter(open_loader(dtype=dtype, placement=placement))
    with torch.inference_mode():
        next(batches)
    for tensor in itertools.chain(*batches):
        assert not tensor.is_inference()


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_default_device_moves_nothing(open_loader, dtype):
    expected = copied(open_loader(dtype=dtype))
    with torch.device("meta"):
        found = list(open_loader(dtype=dtype))
    assert_same_batches(found, expected)


def test_a_pool_keeps_no_more_than_its_most():
    pool = BufferPool(4, (3, 1, 1), torch.float16)
    taken = [pool.take(4) for _ in range(3 * LEAST_KEPT)]
    assert len({rows.ctypes.data for rows, _ in taken}) == len(taken)
    assert len(pool) == LEAST_KEPT
    kept = {rows.ctypes.data for rows, _ in taken[-LEAST_KEPT:]}
    taken.clear()
    assert {pool.take(4)[0].ctypes.data for _ in range(3 * LEAST_KEPT)} == kept


@pytest.mark.parametrize("count", [4, 3])
def test_a_pool_hands_out_the_same_memory_as_array_and_tensor(count):
    for dtype in DTYPES:
        rows, array = BufferPool(4, (5, 3, 2), dtype).take(count)
        images = tensor_maker(dtype)(array)
        assert rows.shape == (count, 30)
        assert images.shape == (count, 2, 5, 3)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == dtype
        assert rows.__array_interface__["data"][0] == images.data_ptr()
