"""Readings of the machine: control groups, cores and memory."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmnist.errors import ConfigError
from fastmnist.system import machine
from fastmnist.system.machine import choose_device, cpu_seconds, limit_periods, physical_cores, processor_flags


@pytest.mark.parametrize(
    ("line", "place"), [("0::/a/b", "a/b"), ("0::/", ""), ("4:cpu,cpuacct:/x", "cpu/x"), ("3:memory:/x", None)]
)
def test_a_cpu_limit(monkeypatch, tmp_path, line, place):
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "GROUPS_OF_THIS_PROCESS", tmp_path / "groups")
    assert limit_periods() == []
    (tmp_path / "groups").write_text(line + "\n")
    folder = tmp_path / (place or "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.stat").write_text("usage_usec 1\nnr_periods 10\nnr_throttled 4\nthrottled_usec 5\n")
    assert limit_periods() == ([] if place is None else [(4, 10)])


def test_physical_cores():
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_memory_in_use_is_that_of_this_process(in_a_new_process):
    script = """
        import torch
        from fastmnist.system.machine import memory_in_use
        before = memory_in_use()
        kept = torch.ones(400 << 20, dtype=torch.uint8)
        assert 350 << 20 < memory_in_use() - before < 450 << 20
    """
    in_a_new_process(script)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux alone lists its processor's flags there")
def test_the_processor_s_flags_are_found() -> None:
    assert processor_flags() >= ({"fpu", "sse2"} if platform.machine() == "x86_64" else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: asking for one works")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda"):
        choose_device("cuda")


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        choose_device("nonsense")


def test_cpu_seconds_count_children_that_run_and_that_have_ended():
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before, own = cpu_seconds(), time.process_time()
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        running = cpu_seconds() - before - (time.process_time() - own)
        child.communicate(b"\n")
    ended = cpu_seconds() - before - (time.process_time() - own)
    assert 0.25 < running <= ended + 0.02  # the system counts in hundredths
    assert ended < 1.0
