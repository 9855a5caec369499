"""What a process is refused before it joins the others; tests/training/test_parallel.py has those that joined."""

from __future__ import annotations

import pytest
import torch

from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.system import processes
from fastmnist.system.machine import choose_device, cores_of_this_process


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of process 1 of 4 on this machine, whose first process is not there."""
    values = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "OMP_NUM_THREADS": "2"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("job", "two_gpus")
@pytest.mark.parametrize(("device", "named"), [("auto", ["4", "2 GPUs"]), ("cuda", ["2 GPUs"]), ("cuda:1", ["cuda:1"])])
def test_gpus_that_do_not_fit(device: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as error, processes.process_group(device):
        pass
    assert all(word in str(error.value) for word in named)


@pytest.mark.usefixtures("job")
def test_a_group_that_cannot_be_joined_is_named() -> None:
    with pytest.raises(FastmnistError) as error, processes.process_group("cpu", minutes=0.01):
        pass
    assert "process 1 of 4" in str(error.value)
    assert "127.0.0.1:9" in str(error.value)


@pytest.mark.usefixtures("job", "two_gpus")
def test_each_process_has_its_device_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmnist.system.machine.cpu_count", lambda: 9)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # there is no such GPU here
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    assert cores_of_this_process() == 2


def test_alone() -> None:
    with processes.process_group("cpu"):
        assert (processes.rank(), processes.world_size()) == (0, 1)
        assert processes.backend() is None
        assert processes.gather("a") == ["a"]
        assert processes.broadcast("a") == "a"
        with processes.first_on_each_machine():
            mean = torch.tensor([3.0])
        processes.average(mean)
        assert mean.item() == 3
        processes.check_agreement({"setting": 1})
        processes.check_launch()
