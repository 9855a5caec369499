"""Device memory on a machine without a GPU: a recorded stand-in for torch.cuda, whose copies come late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastmnist.beton.reader import Beton
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.device import DeviceGatherer, Finish, PinnedCopier, PlainCopier
from fastmnist.loader.host import HostGatherer, Part, SampleCopy
from fastmnist.loader.loader import Loader
from fastmnist.loader.order import EpochOrder
from tests.loader.batches import assert_same_batches, copied

COUNT, BATCH, SEED = 101, 8, 2
CPU = torch.device("cpu")


class Copy:
    """A copy that is made when the device comes to it."""

    def __init__(self, source: torch.Tensor) -> None:
        self.source, self.result, self.made = source, torch.zeros_like(source), False

    def make(self) -> None:
        if not self.made:
            self.result.copy_(self.source)
            self.made = True


class Stream:
    """Copies issued on it, and those that its further work waits for."""

    def __init__(self, device: torch.device) -> None:
        self.issued: list[Copy] = []
        self.waited: list[list[Copy]] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event.behind)

    def work(self) -> None:
        for copies in self.waited:
            for copy in copies:
                copy.make()


class Event:
    def __init__(self) -> None:
        self.behind: list[Copy] = []

    def record(self, stream: Stream) -> None:
        self.behind, stream.issued = stream.issued, []

    def synchronize(self) -> None:
        for copy in self.behind:
            copy.make()


class StandIn:
    """What of torch.cuda the loader uses; `consumer` is the current stream, `recorded` its (tensor, stream)."""

    def __init__(self) -> None:
        self.late = True
        self.consumer = Stream(CPU)
        self.recorded: list[tuple[torch.Tensor, object]] = []
        self._inside: list[Stream] = []

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._inside.append(stream)
        yield
        self._inside.pop()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = Copy(tensor)
        self._inside[-1].issued.append(copy)
        if not self.late:
            copy.make()
        return copy.result


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in, empty, to = StandIn(), torch.empty, torch.Tensor.to

    def copy_or_convert(tensor: torch.Tensor, *arguments: Any, non_blocking: bool = False, **more: Any) -> torch.Tensor:
        return stand_in.copy(tensor) if non_blocking else to(tensor, *arguments, **more)

    def without_pinning(*arguments: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return empty(*arguments, **more)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stand_in.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stand_in.consumer)
    monkeypatch.setattr(torch, "empty", without_pinning)
    monkeypatch.setattr(torch.Tensor, "to", copy_or_convert)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: stand_in.recorded.append((tensor, stream))
    )
    return stand_in


@pytest.fixture
def file(tmp_path, write_small_beton) -> Iterator[Beton]:
    write_small_beton(tmp_path / "a.beton", COUNT, (9, 7))
    with Beton(tmp_path / "a.beton") as file:
        yield file


def parts_of(file: Beton, augment: Augmentation | None = None, first: int = 0) -> Iterator[Part]:
    """Epoch 0 from batch `first` on, in parts of three batches."""
    rows = EpochOrder(np.arange(COUNT), "random", SEED).plan(0).rows
    draws = None if augment is None else augment.draw(COUNT, SEED, 0)[rows]
    whole = Part(rows, draws, file.data, file.offsets, rows)
    return (part for number, part in enumerate(whole.split(3 * BATCH)) if 3 * number >= first)


def pinned(file: Beton, finish: Finish, prefetch: int = 2) -> PinnedCopier:
    host = HostGatherer(file, BATCH, torch.uint8, None, 1)
    return PinnedCopier(host, finish, CPU, batch_size=BATCH, image_size=file.image_size, prefetch=prefetch)


def plain(file: Beton, finish: Finish) -> PlainCopier:
    return PlainCopier(HostGatherer(file, BATCH, torch.uint8, None, 1), finish, CPU)


def resident(file: Beton, finish: Finish) -> DeviceGatherer:
    return DeviceGatherer(SampleCopy(file, np.arange(COUNT)), finish, CPU, BATCH)


def expected_batches(file: Beton, first: int = 0, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    with Loader(file, BATCH, device="cpu", seed=SEED, **options) as loader:
        return copied(loader)[first:]


@pytest.mark.parametrize("prefetch", [0, 1, 3, 50])
@pytest.mark.parametrize("first", [0, 6])
def test_a_batch_is_handed_over_behind_its_copy_and_kept_for_the_consumers_stream(cuda, file, prefetch, first):
    expected = expected_batches(file, first)
    batches = pinned(file, Finish(file.image_shape, torch.uint8, None, CPU), prefetch).batches(
        parts_of(file, first=first)
    )
    number = 0
    for number, (images, labels) in enumerate(batches, 1):
        assert len(cuda.consumer.waited) == number
        assert not images.any()  # not copied yet, and nothing waits for that but the consumer's work
        cuda.consumer.work()
        (one, first_stream), (other, second_stream) = cuda.recorded[-2:]
        assert one is images
        assert other is labels
        assert first_stream is second_stream is cuda.consumer
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert_same_batches([(images, labels)], [expected[number - 1]])
    assert number == len(expected)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_pinned_memory_is_not_filled_again_before_its_copy(cuda, file, prefetch):
    """The consumer's work comes last of all."""
    expected = expected_batches(file)
    found = list(pinned(file, Finish(file.image_shape, torch.uint8, None, CPU), prefetch).batches(parts_of(file)))
    cuda.consumer.work()
    assert_same_batches(found, expected)


@pytest.mark.parametrize("memory", [pinned, plain, resident])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("augment", [None, Augmentation(2.0, 20.0, 0.2)])
def test_images_are_finished_on_the_device(cuda, file, memory, dtype, augment):
    cuda.late = False
    expected = expected_batches(file, dtype=dtype, augment=augment)
    found = list(
        memory(file, Finish(file.image_shape, dtype, augment, CPU, file.moments)).batches(parts_of(file, augment))
    )
    for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, expected_labels)
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert ((images.float() - expected_images.float()).abs() > 0.01).float().mean() <= 0.001


@pytest.mark.parametrize("memory", [plain, resident])
def test_other_memories_hand_out_the_same_bytes(file, memory):
    found = list(memory(file, Finish(file.image_shape, torch.uint8, None, CPU)).batches(parts_of(file)))
    assert_same_batches(found, expected_batches(file))


def test_resident_batches_may_be_larger(file):
    found = list(resident(file, Finish(file.image_shape, torch.uint8, None, CPU)).batches(parts_of(file), 3 * BATCH))
    expected = expected_batches(file)
    assert [len(labels) for _, labels in found] == [24, 24, 24, 24, 5]
    for part in (0, 1):
        assert torch.equal(torch.cat([batch[part] for batch in found]), torch.cat([batch[part] for batch in expected]))
