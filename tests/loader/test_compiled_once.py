"""Machine code of the loader's kernels: compiled once, cached for the next process, not needed at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path, write_small_beton) -> Path:
    write_small_beton(tmp_path / "a.beton", 300, (6, 5))
    return tmp_path / "a.beton"


ALL_PATHS = """
    import contextlib, json, sys
    import torch
    from fastmnist.loader import kernels, order, sampling, warp
    from fastmnist.loader.augment import Augmentation
    from fastmnist.loader.loader import Loader

    functions = {
        name: function
        for module in (kernels, order, sampling, warp)
        for name, function in vars(module).items()
        if hasattr(function, "signatures")
    }
    def epochs(batch_size, **options):
        with Loader(sys.argv[1], batch_size, device="cpu", **options) as loader:
            for _ in range(2):
                list(loader)

    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        epochs(32, dtype=dtype)
    epochs(32, dtype=torch.float32, augment=Augmentation(1.0), weights=range(300))
    before = {name: list(function.signatures) for name, function in functions.items()}
    for batch_size in (1, 7, 300, 1000):
        for dtype in (torch.uint8, torch.float32, torch.float16):
            for placement in ("stream", "resident"):
                for more in ({}, {"shuffle": False}, {"indices": range(50)}, {"rank": 1, "world_size": 3}):
                    epochs(batch_size, dtype=dtype, placement=placement, **more)
        epochs(batch_size, dtype=torch.float32, augment=Augmentation(1.0), order="quasi_random", threads=2)
        list(Loader.from_arrays(torch.zeros(30, 6, 5, dtype=torch.uint8), range(30), batch_size=batch_size))
        epochs(batch_size, weights=torch.ones(300), epoch_samples=10)
    assert before == {name: list(function.signatures) for name, function in functions.items()}
    print(json.dumps({n: [len(f.signatures), sum(f.stats.cache_misses.values())] for n, f in functions.items()}))
"""


def test_each_kernel_is_compiled_once_and_from_the_second_process_on_never(
    path, tmp_path, in_a_new_process, monkeypatch
):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    cold, warm = (json.loads(in_a_new_process(ALL_PATHS, path)) for _ in range(2))
    assert {name: compiled for name, (compiled, _) in cold.items() if compiled > 1} == {}
    assert any(misses for _, misses in cold.values())
    assert {name: misses for name, (_, misses) in warm.items() if misses} == {}


def test_nothing_needs_to_be_compiled(path, in_a_new_process, monkeypatch):
    """As under a debugger, or where coverage is measured."""
    script = """
        import sys
        import torch
        from fastmnist.loader.augment import Augmentation
        from fastmnist.loader.loader import Loader

        kinds = {}, {"dtype": torch.float32, "augment": Augmentation(1.0)}, {"dtype": torch.float16}
        print([float(images.double().sum()) for kind in kinds for images, _ in Loader(sys.argv[1], 32, **kind)])
    """
    compiled = in_a_new_process(script, path)
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert json.loads(in_a_new_process(script, path)) == pytest.approx(json.loads(compiled), rel=1e-3)
