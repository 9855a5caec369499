"""Batches of any loader: any structure of tensors, and epochs without an end."""

from collections import OrderedDict, namedtuple

import pytest
import torch

from fastmnist.errors import DataError
from fastmnist.measure.batches import BatchCount, Epochs, length_of, with_tensors

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
