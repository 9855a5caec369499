"""Operator budget of a recorded step, and no operator that waits for the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmnist.presets import PRESETS, preset_config
from fastmnist.system.progress import Reporter
from fastmnist.training.graph import Body
from fastmnist.training.overlap import overlap
from fastmnist.training.precision import Precision
from fastmnist.training.session import Session

# Operators of a step as a GPU runs it without torch.compile, each about one kernel.
BUDGETS = {"fast99": 237, "fast995": 237, "cpu": 237, "accurate": 225, "cpu-small": 150}
FREE = {
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "permute",
    "t",
    "transpose",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "as_strided_",
    "alias",
    "detach",
    "unbind",
    "split",
    "narrow",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "is_same_size",
    "_record_function_enter_new",
    "_record_function_exit",
}  # of kernels: views, memory, the profiler's marks


class Operators(TorchDispatchMode):
    """Counts dispatched operators by name, and collects those whose result or shape the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waiting: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if name not in FREE:
            self.names[name] += 1
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            self.waiting.add(name)
        return function(*args, **(kwargs or {}))


def operators_of_a_step(preset: str, mnist_folder: Path, cache: Path, dtype: torch.dtype) -> Operators:
    config = preset_config(
        preset,
        dataset="mnist",
        data_dir=str(mnist_folder),
        cache_dir=str(cache),
        batch_size=8,
        val_size=0,
        device="cpu",
    )
    counted = Operators()

    def record(body: Body, reset: Body) -> Body:
        reset()
        body()
        reset()
        with counted:
            body()
        return body

    with Session(config, Reporter(quiet=True), precision=lambda device: Precision(dtype, "a test")) as session:
        overlap(session.trainer.model.train())  # as on a GPU
        session.trainer.record_graph(record)
    return counted


@pytest.mark.parametrize("preset", PRESETS)
def test_no_more_operators_than_planned_and_none_that_waits(preset: str, mnist_folder: Path, tmp_path: Path) -> None:
    found = operators_of_a_step(preset, mnist_folder, tmp_path, torch.bfloat16)
    assert not found.waiting
    assert found.names.total() <= BUDGETS.get(preset, max(BUDGETS.values())), found.names.most_common()


def test_the_scaler_of_fp16_waits_for_nothing_either(mnist_folder: Path, tmp_path: Path) -> None:
    found = operators_of_a_step("cpu", mnist_folder, tmp_path, torch.float16)
    assert not found.waiting
    assert found.names["_amp_update_scale_"] == 1


def test_the_guard_sees_what_waits() -> None:
    counted = Operators()
    with counted:
        values = torch.ones(3)
        values.sum().item()
        values.nonzero()
    assert counted.waiting == {"_local_scalar_dense", "nonzero"}
