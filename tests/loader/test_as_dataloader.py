"""What code that expects a DataLoader finds on a Loader: dataset, batch sampler, and an answer to each argument."""

from __future__ import annotations

import importlib.util
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastmnist.errors import ConfigError
from fastmnist.loader.as_dataloader import INSTEAD
from fastmnist.loader.loader import Loader
from tests.conftest import skip_or_fail
from tests.loader.batches import COUNT, MOVES, assert_same_batches, copied, values_of

SETTINGS = {
    "bytes": {},
    "floats": {"dtype": torch.float32},
    "resident": {"dtype": torch.bfloat16, "placement": "resident"},
    "augmented": {"dtype": torch.float32, "augment": MOVES},
    "some": {"indices": np.array([90, 3, 3, 17, 5, 40, 41, 66, 67, 68, 69, 70, 71])},
    "some, resident": {"indices": np.arange(80, 20, -3), "placement": "resident", "drop_last": True},
    "a process of two": {"rank": 1, "world_size": 2},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@settings
def test_a_dataloader_of_dataset_and_batch_sampler_hands_out_the_same_batches(open_loader, options):
    loader, same = open_loader(**options), open_loader(**options)
    for each in (loader, same):
        each.set_epoch(2)
    parts = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
    assert len(parts) == len(same)
    assert_same_batches(parts, copied(same))
    assert loader.state_dict() == same.state_dict()
    assert_same_batches(loader, same)  # of the epoch after


def test_it_goes_on_in_the_middle_of_an_epoch(open_loader):
    loader, same = open_loader(), open_loader()
    for each in (loader, same):
        each.seek(1, 4)
    assert_same_batches(DataLoader(loader.dataset, batch_sampler=loader.batch_sampler), copied(same))


def test_a_dataset_has_each_sample(open_loader, samples):
    chosen = [5, 60, 7]
    for indices in (None, chosen):
        loader = open_loader(dtype=torch.float32, indices=indices)
        rows = np.arange(COUNT) if indices is None else np.array(chosen)
        _, images, labels = samples
        expected = values_of(images[rows][..., None], loader.file.moments, torch.float32)
        found = list(loader.dataset)
        assert len(found) == len(loader.dataset) == len(rows)
        assert torch.equal(torch.stack([image for image, _ in found]), expected)
        assert [int(label) for _, label in found] == labels[rows].tolist()
        assert loader.dataset.classes == list(loader.file.class_names)
        assert torch.equal(loader.dataset[-1][0], expected[-1])
        with pytest.raises(IndexError):
            loader.dataset[len(rows)]
    assert pickle.loads(pickle.dumps(loader.dataset))[1][1] == labels[60]


def test_a_dataset_of_a_closed_loader_is_not_read(open_loader):
    loader = open_loader()
    dataset = loader.dataset
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        dataset[0]


def test_each_argument_of_dataloader_is_taken_or_answered(samples):
    own = set(inspect.signature(Loader).parameters)
    for name in set(inspect.signature(DataLoader).parameters) - own:
        with pytest.raises(ConfigError, match=f"Loader has no {name}: ") as refused:
            Loader(samples[0], **{name: None})
        assert INSTEAD[name] in str(refused.value)
    assert not own & INSTEAD.keys()
    with pytest.raises(TypeError, match="nonsense"):
        Loader(samples[0], nonsense=1)


@pytest.mark.parametrize("data", [np.zeros((3, 28, 28), np.uint8), torch.zeros(3), None])
def test_what_is_no_file_is_refused(data):
    with pytest.raises(ConfigError, match=f"no {type(data).__name__}; .*write_beton.*from_arrays"):
        Loader(data)


@pytest.mark.peers
@pytest.mark.parametrize("options", [SETTINGS["bytes"], SETTINGS["augmented"]], ids=["bytes", "augmented"])
def test_accelerate_skips_the_first_batches(open_loader, options):
    if importlib.util.find_spec("accelerate") is None:
        skip_or_fail("peers", "accelerate is not installed; pip install '.[peers]'")
    from accelerate import skip_first_batches

    loader, same = open_loader(**options), open_loader(**options)
    loader.set_epoch(1)
    same.seek(1, 3)
    assert_same_batches(skip_first_batches(loader, 3), copied(same))
    assert_same_batches(loader, same)
