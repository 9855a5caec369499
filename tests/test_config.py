"""Settings: their checks, and the command line that is derived from them."""

import inspect
import json
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pytest
import torch

from fastmnist.baselines.loaders import LOADERS
from fastmnist.cli.main import parse
from fastmnist.cli.parser import given_settings
from fastmnist.config import GROUPS, DataConfig, TrainConfig, flag, refuse_unused
from fastmnist.errors import ConfigError
from fastmnist.loader_settings import LOADER_SETTINGS


def test_groups_hold_every_setting_once() -> None:
    named = [field.name for group in GROUPS for field in fields(group)]
    assert sorted(named) == sorted(field.name for field in fields(TrainConfig))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_and_its_table_of_settings_agree(loader) -> None:
    """Each is a field of DataConfig and an argument, whose default is the first value to search and within limits."""
    arguments = inspect.signature(LOADERS[loader].__init__).parameters
    table = LOADER_SETTINGS[loader]
    beside = {"loader": loader} | ({"workers": 1} if "workers" in table else {})
    for name, setting in table.items():
        for device in ("cpu", "cuda"):
            first, *others = setting.search(device, 4)
            assert arguments[name].default in (None, first) or (name, device) == ("pin_memory", "cpu")
            for value in (first, *others):
                assert getattr(TrainConfig(**beside | {name: value}), name) == value
        assert name in {field.name for field in fields(DataConfig)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("val_size", -1),
        ("workers", -1),
        ("workers", 65),
        ("prefetch_factor", 0),
        ("batches_ahead", 0),
        ("batches_ahead", 65),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("momentum", 1.0),
        ("warmup", 1.5),
        ("label_smoothing", -0.1),
        ("shift", -1.0),
        ("scale", 1.0),
        ("seed", -1),
        ("log_every", 0),
        ("weight_decay", float("nan")),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_flag(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=flag(name)):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_a_config_file_sets_what_the_flags_set(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\nstem: cifar\naugment: false\n")
    parsed = parse(["train", "--config", str(file), "--epochs", "8", "--tensorboard"])
    assert (parsed.epochs, parsed.stem, parsed.augment, parsed.tensorboard) == (8, "cifar", False, True)


def test_a_printed_configuration_holds_what_was_given_and_config_takes_it(tmp_path, capsys) -> None:
    file, flags = tmp_path / "c.yaml", ["--epochs", "3", "--no-augment", "--loader", "tuned", "--workers", "0"]
    with pytest.raises(SystemExit) as end:
        parse(["train", *flags, "--print-config"])
    assert end.value.code == 0
    file.write_text(capsys.readouterr().out)
    expected = {"epochs": 3.0, "augment": False, "loader": "tuned", "workers": 0}
    assert (
        given_settings(parse(["train", "--config", str(file)])) == given_settings(parse(["train", *flags])) == expected
    )


def test_settings_of_loaders_come_from_a_file_and_from_flags(tmp_path) -> None:
    file = tmp_path / "tuned.yaml"
    names = ("order", "workers", "prefetch_factor", "persistent_workers", "pin_memory", "batches_ahead", "os_cache")

    def parsed(*arguments: str) -> list:
        values = parse(["train", *arguments])
        TrainConfig(**{name: getattr(values, name) for name in TrainConfig.__dataclass_fields__})
        return [getattr(values, name) for name in (*names, "tuned_on")]

    assert parsed() == ["auto", None, None, None, None, 3, True, None]
    file.write_text("loader: ffcv\norder: quasi_random\nbatches_ahead: 5\nos_cache: false\ntuned_on: 'a machine: 2'\n")
    assert parsed("--config", str(file)) == ["quasi_random", None, None, None, None, 5, False, "a machine: 2"]
    flags = ["--order", "random", "--batches-ahead", "2", "--os-cache"]
    assert parsed("--config", str(file), *flags) == ["random", None, None, None, None, 2, True, "a machine: 2"]
    file.write_text("loader: tuned\nworkers: 2\nprefetch_factor: 4\npersistent_workers: false\npin_memory: null\n")
    assert parsed("--config", str(file)) == ["auto", 2, 4, False, None, 3, True, None]
    flags = ["--prefetch-factor", "1", "--persistent-workers", "true", "--pin-memory", "false"]
    assert parsed("--config", str(file), *flags) == ["auto", 2, 1, True, False, 3, True, None]
    assert parsed("--config", str(file), "--persistent-workers", "null")[3] is None


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_tuned_file_of_an_older_version_is_read_and_one_line_names_what_went(value, tmp_path, capsys) -> None:
    file = tmp_path / "tuned.yaml"
    file.write_text(
        "# Found by fastmnist tune.\nloader: ours\nbatch_size: 64\norder: auto\nplacement: auto\nthreads: 2\n"
        f"prefetch: 3\nreuse_buffers: {value}\ntuned_on: a machine\n"
    )
    parsed = parse(["train", "--config", str(file)])
    assert (parsed.batch_size, parsed.threads) == (64, 2)
    assert not hasattr(parsed, "reuse_buffers")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "reuse_buffers" in said[0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"workers": 2}, "workers"),
        ({"loader": "tensors", "workers": 2}, "workers"),
        ({"loader": "tuned", "batches_ahead": 4}, "batches_ahead"),
        ({"os_cache": False}, "no_os_cache"),
        ({"loader": "ffcv", "prefetch_factor": 4}, "prefetch_factor"),
        ({"pin_memory": True}, "pin_memory"),
        ({"persistent_workers": False}, "no_persistent_workers"),
        ({"loader": "dataloader", "prefetch_factor": 4}, "prefetch_factor"),
        ({"loader": "tuned", "workers": 0, "prefetch_factor": 4}, "prefetch_factor"),
        ({"loader": "tuned", "workers": 0, "persistent_workers": False}, "no_persistent_workers"),
        ({"model": "small-cnn", "stem": "cifar"}, "stem"),
        ({"model": "small-cnn", "live_taps": False}, "no_live_taps"),
    ],
)
def test_a_setting_that_changes_nothing_beside_the_others_is_refused(settings, name) -> None:
    with pytest.raises(ConfigError, match=flag(name)):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "refused_on"),
    [
        ({"prefetch": 5}, "cpu"),
        ({"prefetch": 5, "loader": "tensors"}, "cpu"),
        ({"prefetch": 5, "placement": "resident"}, "cpu cuda"),
        ({"pin_memory": True, "loader": "tuned"}, "cpu"),
        ({"threads": 2}, ""),
        ({"threads": 2, "placement": "resident"}, "cuda"),
    ],
)
def test_a_setting_that_changes_nothing_on_a_device_is_refused_there(settings, refused_on) -> None:
    config = TrainConfig(**settings).to_dict()
    for device in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match=flag(next(iter(settings)))) if device in refused_on else nullcontext():
            refuse_unused(config, device)


@pytest.mark.parametrize("loader", ["dataloader", "tuned"])
def test_what_the_tuner_writes_for_a_loader_without_workers_is_taken(loader) -> None:
    TrainConfig(loader=loader, workers=0, prefetch_factor=2, persistent_workers=loader == "tuned", pin_memory=False)


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_integers_of_numpy_and_torch_become_plain_ones(kind) -> None:
    config = TrainConfig(batch_size=kind(64), seed=kind(3), val_size=kind(100))
    assert json.loads(json.dumps(config.to_dict())) == TrainConfig(batch_size=64, seed=3, val_size=100).to_dict()


@pytest.mark.parametrize("name", ["batch_size", "seed", "val_size", "threads", "log_every"])
def test_what_is_no_whole_number_is_refused_by_its_flag(name) -> None:
    with pytest.raises(ConfigError, match=flag(name)):
        TrainConfig(**{name: 2.0})


@pytest.mark.parametrize("name", ["persistent_workers", "pin_memory"])
def test_a_yes_or_no_that_is_neither_is_refused_by_its_flag(name: str, tmp_path) -> None:
    file = tmp_path / "tuned.yaml"
    file.write_text(f"{name}: maybe\n")
    for arguments in (["--config", str(file)], [flag(name), "maybe"], [flag(name)]):
        with pytest.raises(ConfigError, match=flag(name)):
            parse(["train", *arguments])
