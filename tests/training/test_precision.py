"""Choice of precision and compile mode by device; what a GPU or a processor would answer is patched."""

import pytest
import torch

from fastmnist.errors import ConfigError
from fastmnist.training import precision
from fastmnist.training.precision import choose_compile, choose_precision, worth_compiling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "scaled"),
    [((7, 0), torch.float16, True), ((7, 5), torch.float16, True), ((8, 0), torch.bfloat16, False)],
)
def test_auto_takes_bf16_only_from_capability_8(monkeypatch, capability, dtype, scaled) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # A T4 claims bfloat16 through emulation: the answer must not be asked for.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    chosen = choose_precision("auto", CUDA)
    assert (chosen.amp, chosen.scaled) == (dtype, scaled)
    assert f"{capability[0]}.{capability[1]}" in chosen.reason


@pytest.mark.parametrize(
    ("flags", "name"), [({"avx512f"}, "off"), ({"avx512f", "avx512_bf16"}, "bf16"), (set(), "off")]
)
def test_auto_on_a_cpu_takes_bf16_only_where_the_processor_has_it(monkeypatch, flags, name) -> None:
    monkeypatch.setattr(precision, "processor_flags", lambda: flags)
    assert choose_precision("auto", CPU).name == name
    assert choose_precision("off", CPU).amp is None
    assert choose_precision("bf16", CPU).amp == torch.bfloat16


@pytest.mark.parametrize(
    ("choose", "flag"),
    [
        (lambda: choose_precision("fp16", CPU), "--amp fp16"),
        (lambda: choose_compile("graph", CPU), "--compile graph"),
    ],
)
def test_what_the_device_cannot_do_is_refused(choose, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        choose()


def test_auto_records_on_a_gpu_and_compiles_only_what_runs_long_enough() -> None:
    assert choose_compile("auto", CPU)[0] == "off"
    assert choose_compile("auto", CUDA)[0] == "graph"
    assert [worth_compiling(seconds)[0] for seconds in (0.2, 10.0, 3600.0)] == [False, False, True]
    assert choose_compile("max-autotune", CPU) == ("max-autotune", "asked for")
