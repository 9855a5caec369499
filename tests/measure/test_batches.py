"""Batches of any loader: any structure of tensors, and epochs without an end."""

from collections import OrderedDict, namedtuple
from functools import partial

import pytest
import torch

from fastmnist.errors import ConfigError, DataError
from fastmnist.measure.batches import BatchCount, Epochs, length_of, step_of_batch, with_tensors

Pair = namedtuple("Pair", "images labels")


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (lambda images, labels: images, 8),
        (lambda images, labels: [images, labels], 8),
        (Pair, 8),
        (lambda images, labels: OrderedDict(images=images, more={"labels": labels}, name="x"), 8),
        (lambda images, labels: (images, labels.sum()), 0),
        (lambda images, labels: ("no tensor", 3), 0),
        (lambda images, labels: None, 0),
    ],
)
def test_any_structure_of_tensors(make, length):
    batch = make(torch.zeros(8, 4), torch.arange(8))
    kept = with_tensors(batch, torch.clone)
    assert type(kept) is type(batch)
    assert str(kept) == str(batch)
    assert length_of(batch) == length


def test_epochs_follow_each_other():
    epochs = Epochs([1, 2], before_start=lambda: begun.append(len(epochs.starts)))
    begun = []
    assert [next(epochs) for _ in range(5)] == [1, 2, 1, 2, 1]
    epochs.end_epoch()
    assert next(epochs) == 1
    assert begun == [0, 1, 2, 3]
    assert len(epochs.starts) == 4


@pytest.mark.parametrize("empty", [[], iter(())])
def test_a_loader_without_a_batch(empty):
    with pytest.raises(DataError, match=type(empty).__name__):
        next(Epochs(empty))


def test_a_generator_has_one_epoch():
    epochs = Epochs(number for number in range(2))
    assert (next(epochs), next(epochs)) == (0, 1)
    with pytest.raises(DataError, match=r"generator .*second time"):
        next(epochs)


def test_a_partial_batch_counts_as_its_share():
    whole, single = BatchCount(8), BatchCount(None)
    for count in (whole, single):
        for size in (8, 8, 2):
            count.add(torch.zeros(size))
    assert (whole.batches, single.batches) == (2.25, 3)


class Trainer:
    def __call__(self, images, labels):
        return images, labels

    def step(self, batch):
        return tuple(batch)


def of_pair(images, labels, *, scale=1):
    return images, labels


@pytest.mark.parametrize(
    "step",
    [
        of_pair,
        Trainer(),
        Trainer().step,
        partial(of_pair, scale=2),
        lambda batch, scale=1: batch,
        lambda *batch: batch[0],
        tuple,
    ],
)
@pytest.mark.parametrize("kind", [tuple, Pair._make])
def test_a_step_takes_a_batch_or_images_and_labels(step, kind):
    assert step_of_batch(step)(kind((1, 2))) == (1, 2)


@pytest.mark.parametrize("step", [lambda: None, lambda a, b, c: None, lambda *, batch: None, partial(of_pair, 1, 2)])
def test_a_step_that_takes_neither(step):
    with pytest.raises(ConfigError, match=r"step\(batch\) or a step\(images, labels\)"):
        step_of_batch(step)


@pytest.mark.parametrize("batch", [[1, 2, 3], {"images": 1, "labels": 2}, torch.zeros(2), None])
def test_a_batch_that_is_no_pair(batch):
    with pytest.raises(ConfigError, match=type(batch).__name__):
        step_of_batch(of_pair)(batch)
