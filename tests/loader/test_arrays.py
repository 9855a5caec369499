"""Samples in memory: arrays of the caller's, and several files as one, batch for batch as from a file."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader import arrays
from fastmnist.loader.loader import Loader
from tests.loader.batches import COUNT, MOVES, SHAPE, assert_same_batches, copied, joined

pytestmark = pytest.mark.usefixtures("work_is_shared_among_threads")

FORMS = {
    "numpy": lambda images, labels: (images, labels),
    "torch": lambda images, labels: (torch.from_numpy(images), torch.from_numpy(labels)),
    "with channels": lambda images, labels: (images[..., None], labels.astype(np.uint8).tolist()),
    "columns first": lambda images, labels: (np.asfortranarray(images), labels),
    "of planes": lambda images, labels: (torch.from_numpy(images)[:, None].permute(0, 2, 3, 1), labels),
}
SETTINGS = {
    "bytes": {},
    "floats, 3 threads": {"dtype": torch.float32, "threads": 3},
    "resident": {"dtype": torch.bfloat16, "placement": "resident", "indices": range(5, 90)},
    "augmented": {"dtype": torch.float32, "augment": MOVES, "seed": 2, "rank": 1, "world_size": 2},
    "balanced": {"balanced": True},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_arrays_give_the_batches_of_a_file(samples, open_loader, options):
    _, images, labels = samples
    expected = copied(itertools.chain(*[open_loader(**options)] * 2))
    for form in FORMS.values():
        with Loader.from_arrays(*form(images, labels), split="train", batch_size=10, device="cpu", **options) as loader:
            assert_same_batches(itertools.chain(loader, loader), expected)
            assert loader.file.class_names == open_loader().file.class_names


def test_contiguous_arrays_are_not_copied(samples):
    images = samples[1].copy()
    for same in (images, torch.from_numpy(images)):
        loader = Loader.from_arrays(same, samples[2], device="cpu", batch_size=COUNT, shuffle=False)
        images[3] += 1
        assert torch.equal(next(iter(loader))[0][:, 0], torch.from_numpy(images))


def test_arrays_keep_a_loaders_contract(samples, open_loader):
    _, images, labels = samples

    def make(labels=labels, **options):
        return Loader.from_arrays(images, labels, batch_size=10, device="cpu", **options)

    loader, same = make(), make()
    for _ in itertools.islice(loader, 4):
        pass
    state = loader.state_dict()
    same.load_state_dict(state)
    with pickle.loads(pickle.dumps(loader)) as copy:
        assert copy.state_dict() == state
        assert_same_batches(copy, copied(same))
    for other in (make(labels[::-1]), open_loader()):
        with pytest.raises(DataError, match="file"):
            other.load_state_dict(state)
    assert [chunk.rows.tolist() for chunk in make(shuffle=False).chunks(5)][1] == list(range(50, 100))
    np.testing.assert_array_equal(loader.file.images(np.array([7, 3]))[..., 0], images[[7, 3]])
    [(image, label)] = loader.dataset.__getitems__([7])
    assert (image[0].tolist(), int(label)) == (images[7].tolist(), labels[7])
    held = next(batches := iter(same))
    kept = copied([held])
    same.close()
    assert_same_batches([held], kept)
    for use in (lambda: next(batches), lambda: iter(same), lambda: same.get([1]), lambda: pickle.dumps(same)):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_arrays_are_normalised_by_their_own_moments_if_they_are_for_training(samples):
    path, images, labels = samples
    with Beton(path) as file:
        assert Loader.from_arrays(images, labels, split="train", dtype=torch.float32).moments == file.moments
    with pytest.raises(ConfigError, match="moments"):
        Loader.from_arrays(images, labels, dtype=torch.float32)
    assert Loader(path, dtype=torch.float32, moments=arrays.Arrays(images[:9], labels[:9])).moments != file.moments


@pytest.mark.parametrize(
    "wrong",
    [
        (np.zeros((4, 5, 5), np.float32), range(4)),
        (torch.zeros(4, 5, 5), range(4)),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), range(4)),
        (np.zeros((4, 25), np.uint8), range(4)),
        (np.zeros((0, 5, 5), np.uint8), []),
        (np.zeros((4, 5, 5), np.uint8), range(3)),
        (np.zeros((4, 5, 5), np.uint8), [0, 1, -1, 2]),
        (np.zeros((4, 5, 5), np.uint8), [0.5] * 4),
        (np.zeros((4, 5, 5), np.uint8), None),
        ([[[0]]], [0]),
    ],
)
def test_what_are_no_images_with_labels_is_refused(wrong):
    with pytest.raises(DataError, match="arrays: "):
        Loader.from_arrays(*wrong)


def test_arrays_have_no_pages(samples):
    with pytest.raises(ConfigError, match="quasi_random"):
        Loader.from_arrays(*samples[1:], order="quasi_random")


# Several files


@pytest.fixture(scope="module")
def three(scratch, write_small_beton):
    """(paths, images, labels) of files of 40, 70 and 20 samples."""
    folder, images, labels = scratch(), [], []
    paths = [folder / f"{name}.beton" for name in "abc"]
    for seed, (path, count) in enumerate(zip(paths, (40, 70, 20), strict=True)):
        found = write_small_beton(path, count, SHAPE, classes=3, class_names="xyz", page_size=512, seed=seed)
        images.append(found[0])
        labels.append(found[1])
    return paths, np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32, "augment": MOVES}, {"indices": range(30, 120)}])
def test_several_files_are_as_one_with_their_samples_after_one_another(three, options):
    paths, images, labels = three
    one = Loader.from_arrays(images, labels, split="train", batch_size=16, device="cpu", **options)
    with Beton(paths[1]) as opened, Loader([paths[0], opened, str(paths[2])], 16, device="cpu", **options) as loader:
        assert_same_batches(loader.chunks(), one.chunks())
        with pickle.loads(pickle.dumps(loader)) as copy:
            assert_same_batches(copy, one)
        loader.close()
        opened.check_open()
    assert loader.file.class_names == ("x", "y", "z")


def test_a_mix_draws_the_files_in_its_shares(three):
    paths, weights = three[0], np.arange(130) % 2
    for given in (None, weights):
        with Loader(paths, 9000, device="cpu", mix=[0.5, 0.2, 0.3], epoch_samples=9000, weights=given) as loader:
            [(_, _, rows)] = loader.chunks()
            with pickle.loads(pickle.dumps(loader)) as copy:
                assert torch.equal(next(copy.chunks()).rows, next(loader.chunks()).rows)
        expected = np.repeat([0.5 / 40, 0.2 / 70, 0.3 / 20], [40, 70, 20]) * (1 if given is None else 2 * weights)
        seen = np.bincount(rows, minlength=130)
        assert not seen[expected == 0].any()
        assert stats.chisquare(seen[expected > 0], 9000 * expected[expected > 0]).pvalue > 1e-3
    with Loader(paths, mix=[0, 1, 0], device="cpu", replacement=False, epoch_samples=70) as loader:
        assert sorted(joined(loader.chunks())[2].tolist()) == list(range(40, 110))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mix": [0.5, 0.2, 0.2]}, "0.2"),
        ({"mix": [1.5, -0.5, 0]}, "-0.5"),
        ({"mix": [0.5, 0.5]}, "each file: 3"),
        ({"mix": [np.nan, 0.5, 0.5]}, "nan"),
        ({"mix": "abc"}, "abc"),
        ({"mix": [0.5, 0.3, 0.2], "balanced": True}, "balanced"),
        ({"mix": [0.5, 0.3, 0.2], "indices": range(100)}, "0.2"),
        ({"mix": [0.5, 0.3, 0.2], "shuffle": False}, "sequential"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(three, options, named):
    with pytest.raises(ConfigError, match=named):
        Loader(three[0], device="cpu", **options)
    with pytest.raises(ConfigError, match="each file: 1"):
        Loader(three[0][0], device="cpu", mix=[0.5, 0.5])


def test_files_that_do_not_fit_each_other_or_the_memory_are_refused(three, tmp_path, write_small_beton, monkeypatch):
    write_small_beton(tmp_path / "shape.beton", 5, (4, 4), classes=3, class_names="xyz")
    write_small_beton(tmp_path / "names.beton", 5, SHAPE, classes=3, class_names="xyw")
    for name, named in (("shape", r"image_shape: \(6, 5, 1\) and \(4, 4, 1\)"), ("names", "class_names: .*w")):
        with pytest.raises(ConfigError, match=rf"a\.beton and .*{name}\.beton differ in {named}"):
            Loader([*three[0], tmp_path / f"{name}.beton"])
    with pytest.raises(DataError, match=r"missing\.beton"):
        Loader([three[0][0], tmp_path / "missing.beton"])
    for wrong, named in (([], "empty"), ([three[0][0], 3], "int")):
        with pytest.raises(ConfigError, match=named):
            Loader(wrong)
    monkeypatch.setattr(arrays, "available_memory", lambda: 3000)
    with pytest.raises(ConfigError, match="memory"):
        Loader(three[0])
