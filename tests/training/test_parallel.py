"""Two processes under torchrun against one: the same mathematics, one answer, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training import two_processes


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory, write_small_beton: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("small") / "a.beton"
    write_small_beton(path, 250, (8, 8))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def both(beton: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    output = tmp_path_factory.mktemp("found")
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "tests.training.two_processes", str(beton), str(cache), str(output)],
        check=True,
        timeout=300,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "error::FutureWarning"},
    )
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(both: list[dict[str, Any]], beton: Path, cache: Path) -> dict[str, Any]:
    """What one process found, with as many threads as each of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(both[0]["exchanged"]["threads"])
    try:
        return {
            "learned": two_processes.learned(beton),
            "shared": two_processes.trained(cache),  # in one process nothing is to be shared
        }
    finally:
        torch.set_num_threads(threads)


def test_they_learn_what_one_learns_with_the_whole_batch(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """To the last digits of float64, batch normalisation and its running statistics included."""
    for found in both:
        for name, values in alone["learned"].items():
            np.testing.assert_allclose(found["learned"][name], values, rtol=1e-12, atol=1e-12, err_msg=name)


def test_steps_losses_and_evaluation_are_those_of_one(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """In float32 the order of sums differs: by 1e-6 in the first steps, which ten steps at this rate make 1e-3."""
    first = alone["shared"]
    for found in (both[0]["shared"], both[1]["shared"]):
        assert (found["steps"], found["labels"]) == (first["steps"], first["labels"])
        assert found["losses"][:2] == pytest.approx(first["losses"][:2], rel=1e-5)
        assert found["losses"] == pytest.approx(first["losses"], rel=1e-2)
        np.testing.assert_allclose(found["logits"], first["logits"], atol=0.02)
    assert both[0]["shared"] == both[1]["shared"]
    # Without shared statistics each batch is normalised by half of it: another function, but no other data.
    assert both[0]["plain"]["losses"] != pytest.approx(alone["shared"]["losses"], rel=1e-6)
    assert both[0]["plain"]["losses"] == pytest.approx(alone["shared"]["losses"], rel=0.1)


@pytest.mark.parametrize("name", ["plain", "shared", "compressed"])
def test_both_agree(both: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name] for found in both)
    assert first == second
    assert len(first["labels"]) == 360
    assert np.isfinite(first["losses"]).all()


def test_compressed_gradients_are_rounded_ones(both: list[dict[str, Any]]) -> None:
    exact, rounded = (both[0][name]["losses"] for name in ("plain", "compressed"))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


def test_one_that_is_to_stop_stops_both_after_the_same_step(both: list[dict[str, Any]]) -> None:
    assert [found["stopped"]["step"] for found in both] == [2, 2]


def test_a_loss_that_is_not_finite_ends_both_at_the_same_step(both: list[dict[str, Any]]) -> None:
    first, second = (found["diverged"]["step"] for found in both)
    assert first == second is not None


def test_what_they_exchange(both: list[dict[str, Any]]) -> None:
    for found in (found["exchanged"] for found in both):
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert found["broadcast"] == "from 0"
        assert found["mean"] == [0.5, 3.0]
        assert "process 1" in found["differs"]
        assert "b 1 instead of 0" in found["differs"]
        assert found["backend"] == "gloo"


def test_settings_that_do_not_fit_are_refused_by_both(both: list[dict[str, Any]]) -> None:
    for found in (found["refused"] for found in both):
        for name, words in (
            ("batch_size", ["--batch-size 25", "24", "26"]),
            ("one_image_each", ["--batch-size 2", "4"]),
            ("seed", ["process 1", "seed 1 instead of 0"]),
            ("compile", ["--compile default"]),
        ):
            assert found[name].startswith("ConfigError")
            assert all(word in found[name] for word in words), found[name]


def test_a_process_that_was_launched_has_its_group(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Else each of them would train the same model, without a sign of it."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(two_processes.ConfigError):
        two_processes.trained(cache)


@pytest.mark.parametrize("layers", [[], [nn.BatchNorm2d(3, affine=False)], [nn.BatchNorm2d(3, momentum=None)]])
def test_batch_normalisation_that_cannot_be_shared_is_refused(layers: list[nn.Module]) -> None:
    with pytest.raises(two_processes.ConfigError, match="--sync-batchnorm"):
        two_processes.share_batch_norm(nn.Sequential(nn.Flatten(), *layers))


def test_in_one_process_batch_normalisation_is_torch_s() -> None:
    shared, plain = two_processes.SharedBatchNorm(3), nn.BatchNorm2d(3)
    images = torch.randn(5, 3, 4, 4)
    assert torch.equal(shared(images), plain(images))
    assert torch.equal(shared.running_var, plain.running_var)
