"""Runs under torchrun: one run folder, one voice, and what happens when a process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastmnist.cli.main import main

JOB = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("command", [["bench"], ["tune"], ["train", "--nonsense"]])
def test_what_fails_in_all_is_said_once(
    command: list[str], rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (JOB | {"RANK": rank}).items():
        monkeypatch.setenv(name, value)
    assert main(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == (0 if int(rank) else 1)


@pytest.mark.parametrize("flag", ["--sync-batchnorm", "--compress-gradients"])
def test_what_serves_several_processes_is_refused_for_one(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--dataset", "digits", "--model", "small-cnn", "--cache-dir", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "run"), flag]) == 2
    assert f"{flag} has no effect without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_job_that_starts_again_names_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dataset", "digits"]) == 2
    assert "--out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def processes_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The job's processes that train, by their ranks."""
    children = [child for child in psutil.Process(job.pid).children() if "RANK" in child.environ()]
    return sorted(children, key=lambda child: child.environ()["RANK"])


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_continues(tmp_path: Path) -> None:
    """With a real torchrun; benchmarks/kills.py compares the weights, after kills at random moments."""
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["train", "--dataset", "digits", "--model", "small-cnn", "--epochs", "1", "--device", "cpu"]
    where = ["--cache-dir", str(tmp_path), "--out", str(run)]
    command = [*torchrun, "--max-restarts", "1", "-m", "fastmnist", *train, *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as job:
        until = time.monotonic() + 120
        while not (run / "config.yaml").exists() and time.monotonic() < until:
            time.sleep(0.02)
        processes_of(job)[1].send_signal(signal.SIGKILL)
        out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert out.count("Test accuracy") == 1
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["backend"], summary["interrupted"]) == (2, "gloo", False)
    assert (summary["batch_size"], summary["batch_size_per_process"]) == (128, 64)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert main(["evaluate", str(run), "--device", "cpu", "--json", str(tmp_path / "evaluation.json")]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["test_accuracy"] == summary["test_accuracy"]
