"""Runs that are killed or lose their disk, folder or data, and damaged folders."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastmnist.cli.main import main
from fastmnist.config import TrainConfig, checked_settings, flag
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.prepare.prepare import beton_path
from fastmnist.runs.train import resume, train
from fastmnist.training import checkpoint, precision
from fastmnist.training.checkpoint import load_checkpoint, save_checkpoint
from fastmnist.training.loop import Trainer
from fastmnist.training.run_folder import RunFolder


class Killed(BaseException):
    """The nearest to kill -9 within one process: the run writes nothing more."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(tmp_path: Path, cache: Path) -> dict[str, Any]:
    """A run of 40 steps, 20 an epoch."""
    return {
        "dataset": "digits",
        "model": "small-cnn",
        "epochs": 2,
        "batch_size": 64,
        "log_every": 7,
        "amp": "off",
        "quiet": True,
        "cache_dir": str(cache),
        "out": str(tmp_path / "run"),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, torch.Tensor]:
    """The weights of that run, uninterrupted."""
    out = str(tmp_path_factory.mktemp("whole"))
    common = {"dataset": "digits", "model": "small-cnn", "epochs": 2, "batch_size": 64, "log_every": 7}
    return weights(train(TrainConfig(**common, amp="off", quiet=True, cache_dir=str(cache), out=out)).folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def broken(settings: dict[str, Any], step: int, act: Callable[[Path], None]) -> BaseException:
    """Trains with checkpoints back to back, calls `act` before that step, and returns how the run ended."""
    inner, folder = Trainer.train_step, Path(settings["out"])

    def train_step(self: Trainer, *arguments: Any) -> None:
        if self.step == step:
            act(folder)
        inner(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        patch.setattr(checkpoint, "SAVE_EVERY", 0.0)
        with pytest.raises((Killed, FastmnistError)) as caught:
            train(TrainConfig(**settings))
    return caught.value


def die(folder: Path) -> None:
    raise Killed


def saved_step(folder: Path) -> int:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["trainer"]["step"]


@pytest.mark.parametrize("step", [2, 15, 39])
def test_a_run_that_dies_in_an_epoch_s_middle_goes_on_to_the_same_bits(settings, whole, step: int) -> None:
    broken(settings, step, die)
    folder = Path(settings["out"])
    assert 1 <= saved_step(folder) <= step
    assert same(weights(resume(folder).folder), whole)
    assert not list(folder.glob(".*"))


def left_by_a_killed_process(folder: RunFolder) -> None:
    """Its lock is gone, its files are not."""
    (folder.path / ".checkpoint.pt.1-0123abcd.tmp").write_bytes(b"half")
    assert folder._lock is not None
    folder._lock.close()


def test_before_the_first_checkpoint_resume_says_what_is_there(settings, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(settings["out"], "digits")
    folder.write_config(TrainConfig(**settings | {"out": None}))
    left_by_a_killed_process(folder)
    assert main(["train", "--resume", str(folder.path)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"fastmnist train --config {folder.path / 'config.yaml'}" in line
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("out", [None, "chosen"])
def test_a_folder_in_which_a_killed_process_wrote_nothing_is_taken(tmp_path, monkeypatch, out: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    first = RunFolder.create(out, "tune")
    if out is None:
        second = RunFolder.create(out, "tune")
        assert second.path != first.path
        second.release()
    else:
        with pytest.raises(ConfigError, match="--out chosen"):
            RunFolder.create(out, "tune")
    left_by_a_killed_process(first)
    again = RunFolder.create(out, "tune")
    assert again.path == first.path
    again.release()
    assert not list(first.path.iterdir())


def test_a_second_process_is_refused(settings, capsys: pytest.CaptureFixture[str]) -> None:
    broken(settings, 5, die)
    folder = RunFolder(Path(settings["out"]))
    folder.claim()
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    assert main(["train", "--resume", str(folder.path)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert str(folder.path) in line
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
    folder.release()
    assert not list(folder.path.glob(".*"))


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_from_before(settings, whole, file_size_limit) -> None:
    seen: list[int] = []

    def fill(folder: Path) -> None:
        seen.append(saved_step(folder))
        file_size_limit(20_000)

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    error = broken(settings, 12, fill)
    file_size_limit(limit)
    for part in ("checkpoint.pt", "File too large", "--resume"):
        assert part in str(error)
    folder = Path(settings["out"])
    assert seen[0] <= saved_step(folder) <= 12
    assert not list(folder.glob(".*"))
    assert same(weights(resume(folder).folder), whole)


@pytest.mark.parametrize("another", [False, True])
def test_a_folder_that_is_deleted_is_not_made_again(settings, another: bool) -> None:
    def delete(folder: Path) -> None:
        shutil.move(folder, folder.with_name("gone"))
        if another:
            folder.mkdir()
            (folder / "mine").write_bytes(b"")

    error = broken(settings, 12, delete)
    assert isinstance(error, FastmnistError)
    folder = Path(settings["out"])
    assert str(folder) in str(error)
    assert ([path.name for path in folder.iterdir()] if folder.exists() else []) == (["mine"] if another else [])
    assert saved_step(folder.with_name("gone")) >= 1


def test_a_compiled_file_that_is_replaced_while_it_trains(settings, whole, tmp_path: Path) -> None:
    settings |= {"cache_dir": str(shutil.copytree(settings["cache_dir"], tmp_path / "own"))}
    path = beton_path("digits", "train", tmp_path / "own")
    other = beton_path("digits", "test", tmp_path / "own").read_bytes()
    kept = path.read_bytes()

    def replace(folder: Path) -> None:
        new = path.with_name("new")
        new.write_bytes(other)
        new.replace(path)

    error = broken(settings, 12, replace)
    assert isinstance(error, DataError)
    assert str(path) in str(error)
    assert path.read_bytes() == other
    folder = Path(settings["out"])
    assert saved_step(folder) >= 1
    path.write_bytes(kept)
    assert same(weights(resume(folder).folder), whole)


def flags_of(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(precision, "processor_flags", lambda: set(flags))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "checkpoint.pt")


def as_version_1(content: dict[str, Any]) -> None:
    content["version"] = 1
    del content["trainer"]["amp"]


@pytest.mark.parametrize(("begun", "now", "name"), [((), ("avx512_bf16",), "off"), (("avx512_bf16",), (), "bf16")])
def test_a_resumed_run_keeps_its_precision(settings, monkeypatch, whole, begun, now, name: str) -> None:
    flags_of(monkeypatch, *begun)
    broken(settings | {"amp": "auto"}, 15, die)
    flags_of(monkeypatch, *now)
    result = resume(Path(settings["out"]))
    assert result.summary["amp"] == name
    assert same(weights(result.folder), whole) == (name == "off")


def test_a_precision_that_the_device_cannot_do_is_refused(settings, capsys: pytest.CaptureFixture[str]) -> None:
    broken(settings | {"amp": "auto"}, 5, die)
    folder = Path(settings["out"])
    rewritten(folder, lambda content: content["trainer"].update(amp="fp16"))
    assert main(["train", "--resume", str(folder)]) == 2
    assert "--amp fp16" in capsys.readouterr().err


def test_a_checkpoint_of_before_is_resumed(settings, whole, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags_of(monkeypatch)
    broken(settings | {"amp": "auto"}, 15, die)
    folder = Path(settings["out"])
    rewritten(folder, as_version_1)
    # Its precision is not known: never another one in silence.
    with monkeypatch.context() as patch:
        patch.setattr("fastmnist.runs.train.choose_precision", lambda *_: precision.Precision(torch.float16, "a test"))
        assert main(["train", "--resume", str(folder)]) == 2
        assert "--amp bf16 or off" in capsys.readouterr().err
    assert same(weights(resume(folder).folder), whole)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def aliases() -> str:
    lines = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)), "seed: *a39"]
    return "\n".join(lines)


DAMAGED: dict[str, list[str | bytes]] = {
    "config.yaml": [
        "",
        "- 1",
        "1: 2",
        "[1]: 2",
        "colour: red",
        "seed: one",
        "seed: !!int ''",
        "seed: [" + "1, " * 1000 + "]",
        "batch_size: 64.0",
        "augment: 1",
        "amp: fp8",
        "model: 5",
        "seed: !!python/object:os.system x",
        "seed: " + "9" * 5000,
        f"seed: {nested(20_000)}",
        aliases(),
        "#" * 10**5,
        b"\xff\xfe\x00",
    ],
    "summary.json": ["", "[]", "5", '{"amp": ', nested(200_000), b"\xff", "9" * 5000],
    "metrics.jsonl": [
        "x\n",
        '{"kind": "step"}\n',
        '{"kind": "step", "step": 1, "epoch": 0}\nx\n{"kind": "step", "step": 2, "epoch": 0}\n',
        '{"kind": "step", "step": 1, "epoch": 0, "loss": "low"}\n',
        '{"kind": "step", "step": null, "epoch": 0}\n',
        "[]\n",
        "5\n",
        nested(200_000) + "\n",
        b"\xff\n",
    ],
    "checkpoint.pt": [],
}


def damage_checkpoint() -> Iterator[Callable[[dict[str, Any]], None]]:
    for key, value in (
        ("step", 10**9),
        ("step", -1),
        ("model", []),
        ("losses", torch.zeros(1)),
        ("amp", torch.ones(2)),
    ):
        yield lambda content, key=key, value=value: content["trainer"].update({key: value})
    for key in ("step", "model", "optimizer", "random", "loader"):
        yield lambda content, key=key: content["trainer"].pop(key)
    for key, value in (("colour", "red"), ("seed", "one"), ("seed", []), (5, 6)):
        yield lambda content, key=key, value=value: content["config"].update({key: value})


def test_a_damaged_folder_is_named_and_left_as_it_is(settings, capsys: pytest.CaptureFixture[str]) -> None:
    broken(settings, 15, die)
    folder = Path(settings["out"])

    def refused(name: str) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert main(["train", "--resume", str(folder)]) in (1, 2)
        [line] = capsys.readouterr().err.splitlines()
        assert f"{folder / name}" in line
        assert "unexpected" not in line
        assert len(line) < 1000
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    for name, contents in DAMAGED.items():
        path = folder / name
        kept = path.read_bytes() if path.exists() else None
        for content in contents:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            refused(name)
        for change in damage_checkpoint() if name == "checkpoint.pt" else ():
            rewritten(folder, change)
            refused(name)
            assert kept is not None
            path.write_bytes(kept)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    assert not resume(folder).interrupted


@pytest.mark.parametrize(
    "void", [{"workers": 2, "batches_ahead": 4}, {"stem": "cifar", "live_taps": False}, {"prefetch": 5}]
)
def test_a_run_goes_on_that_was_begun_with_settings_which_are_refused_today(settings, whole, void: dict) -> None:
    """By an older version, which took what had no effect."""
    broken(settings, 15, die)
    folder = Path(settings["out"])
    config, state = load_checkpoint(folder)
    save_checkpoint(folder, config | void, state)
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()) | void))
    name, value = next(iter(void.items()))
    with pytest.raises(ConfigError, match=flag(name)):
        train(TrainConfig(**settings | void | {"out": f"{folder}-new"}))
    with pytest.raises(ConfigError, match=flag(name)):
        resume(folder, {name: None})
    assert same(weights(resume(folder, {name: value}).folder), whole)


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    line = json.dumps({"kind": "step", "step": 1, "epoch": 0, "loss": 0.5})
    for end, count in (("", 1), ("\n", 1), (f"\n{line[:20]}", 1), (f"\n{line}", 2)):
        (tmp_path / "metrics.jsonl").write_text(line + end)
        assert len(RunFolder(tmp_path).records()) == count


def test_numbers_of_numpy_are_kept_as_plain_ones(settings) -> None:
    odd = {"seed": np.int64(3), "epochs": np.float64(1), "batch_size": np.int32(64), "augment": np.bool_(False)}
    broken(settings | odd, 5, die)
    folder = Path(settings["out"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: (type(config[name]), config[name]) for name in odd} == {
        name: (type(value.item()), value.item()) for name, value in odd.items()
    }
    assert not resume(folder).interrupted


@pytest.mark.parametrize(("name", "value"), [("batch_size", 64.0), ("seed", np.float64(1)), ("val_size", True)])
def test_another_type_is_refused_at_once(settings, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        train(TrainConfig(**settings | {name: value}))
    assert not Path(settings["out"]).exists()


def test_every_setting_has_a_type_that_is_checked() -> None:
    """A default that its own annotation refused would show that an annotation is not understood."""
    defaults = TrainConfig().to_dict()
    assert checked_settings(defaults) == defaults
    for name in defaults:
        with pytest.raises(ConfigError, match="--"):
            checked_settings({name: object()})
