"""Settings: their checks, and the command line that is derived from them."""

from dataclasses import fields

import pytest

from fastmnist.cli import build_parser
from fastmnist.config import GROUPS, TrainConfig, flag
from fastmnist.errors import ConfigError

# The command line is a contract: a change here breaks somebody's script.
# fmt: off
TRAIN_FLAGS = [
    "--amp", "--augment", "--batch-size", "--batches-ahead", "--cache-dir", "--channels-last", "--compile",
    "--config", "--data-dir", "--dataset", "--debug", "--device", "--epochs", "--images-seen", "--json",
    "--label-smoothing", "--learning-rate", "--live-taps", "--loader", "--log-every", "--model", "--momentum",
    "--no-augment", "--no-channels-last", "--no-live-taps", "--no-os-cache", "--no-quiet", "--no-reuse-buffers",
    "--no-tensorboard", "--optimizer", "--order", "--os-cache", "--out", "--persistent-workers", "--pin-memory",
    "--placement", "--prefetch", "--prefetch-factor", "--preset", "--quiet", "--resume", "--reuse-buffers",
    "--rotation", "--scale", "--seed", "--shift", "--stem", "--tensorboard", "--threads", "--tuned-on",
    "--val-size", "--verify", "--warmup", "--weight-decay", "--workers",
]
# fmt: on


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args([command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_flags_of_train_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    words = help_of("train", capsys).replace(",", " ").replace("[", " ").replace("]", " ").split()
    found = {word for word in words if word.startswith("--")} - {"--help", "--print-config", "--print-shtab"}
    assert sorted(found) == sorted(TRAIN_FLAGS)


@pytest.mark.parametrize("command", ["compile", "verify", "train", "evaluate", "predict"])
def test_every_flag_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(command, capsys).splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  -"):
            described = len(line.split("  ")) > 2 or lines[number + 1].startswith(" " * 20)
            assert described, line


def test_groups_hold_every_setting_once() -> None:
    named = [field.name for group in GROUPS for field in fields(group)]
    assert sorted(named) == sorted(field.name for field in fields(TrainConfig))


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
    with pytest.raises(ConfigError, match=f"{flag(name)} {value}: must be"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_a_config_file_sets_what_the_flags_set(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\nstem: cifar\naugment: false\n")
    parsed = build_parser().parse_args(["train", "--config", str(file), "--epochs", "8", "--tensorboard"]).train
    assert (parsed.epochs, parsed.stem, parsed.augment, parsed.tensorboard) == (8, "cifar", False, True)


def test_settings_of_loaders_come_from_a_file_and_from_flags(tmp_path) -> None:
    file = tmp_path / "tuned.yaml"
    file.write_text(
        "loader: ffcv\norder: quasi_random\nreuse_buffers: true\nprefetch_factor: 4\npersistent_workers: false\n"
        "pin_memory: null\nbatches_ahead: 5\nos_cache: false\ntuned_on: 'a machine: 2 cores'\n"
    )
    names = ("order", "reuse_buffers", "prefetch_factor", "persistent_workers", "pin_memory", "batches_ahead")

    def parsed(*arguments: str) -> list:
        values = build_parser().parse_args(["train", *arguments]).train
        TrainConfig(**{name: getattr(values, name) for name in TrainConfig.__dataclass_fields__})
        return [getattr(values, name) for name in (*names, "os_cache", "tuned_on")]

    in_file = ["quasi_random", True, 4, False, None, 5, False, "a machine: 2 cores"]
    assert parsed() == ["auto", False, None, None, None, 3, True, None]
    assert parsed("--config", str(file)) == in_file
    flags = ["--order", "random", "--no-reuse-buffers", "--prefetch-factor", "1", "--persistent-workers", "true"]
    flags += ["--pin-memory", "false", "--batches-ahead", "2", "--os-cache"]
    assert parsed("--config", str(file), *flags) == ["random", False, 1, True, False, 2, True, in_file[-1]]
    assert parsed("--config", str(file), "--persistent-workers", "null")[3] is None


@pytest.mark.parametrize("name", ["persistent_workers", "pin_memory"])
def test_a_yes_or_no_that_is_neither_is_refused_by_its_flag(name: str, tmp_path) -> None:
    file = tmp_path / "tuned.yaml"
    file.write_text(f"{name}: maybe\n")
    for arguments in (["--config", str(file)], [flag(name), "maybe"], [flag(name)]):
        with pytest.raises(ConfigError, match=flag(name)):
            build_parser().parse_args(["train", *arguments])
