"""The command line with input that cannot work: one clear line, the right exit status, nothing left behind."""

import errno
import gzip
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastmnist import files
from fastmnist.cli.main import COMMANDS, main
from fastmnist.cli.parser import COMMON_NAMES, suggestion
from fastmnist.config import TrainConfig, flag
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.report.tables import evaluation_tables

SMALL = ["--model", "small-cnn", "--epochs", "1", "--batch-size", "16", "--val-size", "0", "--quiet"]


@pytest.fixture
def data(tmp_path: Path, write_dataset) -> Path:
    """A folder with the four files of a tiny mnist."""
    write_dataset(tmp_path / "data", train=40, test=20)
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """run(status, *arguments) -> the one line on stderr; train writes into a folder that must not be there then."""
    monkeypatch.chdir(tmp_path)

    def call(status: int, *arguments: object) -> str:
        words = [str(argument) for argument in arguments]
        if words[0] == "train":
            words += [*SMALL, "--cache-dir", str(tmp_path / "cache")]
        capsys.readouterr()
        assert main(words) == status
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("fastmnist: ")
        assert "unexpected" not in lines[0]
        assert not (tmp_path / "runs").exists()
        assert not list(tmp_path.rglob("*.tmp"))
        return lines[0]

    return call


def test_a_good_run_is_good(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the others spoil."""
    out, report = tmp_path / "run", tmp_path / "result.json"
    flags = ["--data-dir", str(data), "--cache-dir", str(tmp_path / "cache"), "--out", str(out), "--json", str(report)]
    assert main(["train", *flags, *SMALL]) == 0
    content = json.loads(report.read_text())
    assert content["folder"] == str(out)
    assert content["dataset"] == "mnist"
    assert main(["evaluate", str(out), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    confusion = np.array(found["confusion"])
    assert found["test_images"] == confusion.sum() == 20
    assert found["test_accuracy"] == content["test_accuracy"] == confusion.trace() / 20
    for name, row, right in zip(found["per_class"], confusion, confusion.diagonal(), strict=True):
        assert found["per_class"][name] * max(row.sum(), 1) == pytest.approx(right)
    assert f"{20 - confusion.trace()} of 20 wrong" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "cache" / "mnist-train.beton")]) == 0
    assert "40 samples" in capsys.readouterr().out


def test_a_run_on_files_of_ones_own_says_the_name_stored_in_them(
    tmp_path: Path, write_small_beton: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    for split, stored in (("train", "roman numerals"), ("test", "")):
        classes = 5 if split == "train" else 3  # the test set lacks two
        write_small_beton(tmp_path / f"rome-{split}.beton", 40, classes=classes, dataset=stored, split=split)
    out = tmp_path / "run"
    loud = [flag for flag in SMALL if flag != "--quiet"]
    assert main(["train", "--dataset", "rome", "--data-dir", str(tmp_path), "--out", str(out), *loud]) == 0
    assert "roman numerals: 40 training images" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["dataset"] == "roman numerals"
    assert main(["evaluate", str(out)]) == 0  # finds the files again by the name that was given


def test_the_tables_of_an_evaluation() -> None:
    confusion = np.array([[5, 0, 3], [0, 0, 0], [1, 0, 1]])
    console = Console(record=True, width=120)
    classes, matrix = evaluation_tables(confusion, ["cat", "dog", "cow"])
    console.print(classes)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    assert [line for line in lines if line] == [
        ["cat", "8", "5", "62.50%", "cow (3)"],
        ["dog", "0", "0", "0.00%", ""],
        ["cow", "2", "1", "50.00%", "cat (1)"],
    ]
    assert (matrix.row_count, len(matrix.columns)) == (3, 4)
    assert len(evaluation_tables(np.eye(11, dtype=int), [str(k) for k in range(11)])) == 1


def test_wrong_usage(run: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert "--nonsense" in run(2, "train", "--nonsense", "3")
    assert "'nonsense'" in run(2, "nonsense")
    error = run(2, "train", "--stem", "wide")
    assert all(word in error for word in ("--stem", "imagenet", "stride2", "cifar", "wide"))
    assert "--seed" in run(2, "train", "--seed", "x")
    assert "--optimizer" in run(2, "train", "--optimizer", "lion")
    assert "run" in run(2, "evaluate")
    config = tmp_path / "bad.yaml"
    config.write_text("batchsize: 3\n")
    assert "batchsize" in run(2, "train", "--config", config)
    config.write_text("batch_size: many\n")
    assert "batch" in run(2, "train", "--config", config)
    config.write_text("no configuration at all\n" * 1000)
    assert len(run(2, "train", "--config", config)) < 500
    assert "nowhere.yaml" in run(2, "train", "--config", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["train", "--lr", "0.1"], "--learning-rate"),
        (["speedrun", "--num_workers=2"], "--workers"),
        (["train", "--bs", "64"], "--batch-size"),
        (["tune", "--epoch", "1"], "--epochs"),
        (["doctor", "--wd", "0"], "--weight-decay"),
        (["train", "--cpu"], "--device cpu"),
        (["train", "--learning-rat", "0.1"], "--learning-rate"),
        (["bench", "--batchsize", "3"], "--batch-size"),
        (["bench", "--lr", "3"], None),  # it has no such flag
        (["train", "--zzz", "1"], None),
    ],
)
def test_a_flag_of_another_name_gets_a_suggestion(run: Callable[..., str], given: list[str], meant: str | None) -> None:
    found = re.findall(r"did you mean ([^?]*)\?", run(2, *given))
    assert found == ([] if meant is None else [meant])


def test_other_programs_names_lead_to_flags_of_train() -> None:
    flags = {flag(name) for name in TrainConfig.__dataclass_fields__} | {"--resume"}
    assert {name.split(" ")[0] for name in COMMON_NAMES.values()} <= flags
    for name, meant in COMMON_NAMES.items():
        assert suggestion(f"--{name.replace('_', '-')}=1", flags) == meant


def test_values_of_another_type_are_refused_in_plain_words(run: Callable[..., str], tmp_path: Path) -> None:
    for flag_, value, kind in (
        ("--epochs", "x", "a number"),
        ("--val-size", "1.5", "a whole number"),
        ("--seed", "x", "a whole number"),
        ("--pin-memory", "3", "true or false"),
        ("--stem", "wide", "one of imagenet, stride2, cifar"),
    ):
        assert f"{flag_} {value} must be {kind}" in run(2, "train", flag_, value)
    assert "--batch-sizes 3 must be a list" in run(2, "tune", "--batch-sizes", "3")
    config = tmp_path / "bad.yaml"
    config.write_text("batch_size: many\n")
    assert "--batch-size many must be a whole number" in run(2, "train", "--config", config)
    config.write_text("learning_rat: 1\n")
    assert "did you mean learning_rate?" in run(2, "train", "--config", config)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_plain_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert [word for word in ("null", "Optional", "Union", "Literal", "None", "type:") if word in text] == []


def test_settings_that_do_not_fit_the_data(run: Callable[..., str], data: Path, capsys, tmp_path: Path) -> None:
    flags = ["train", "--data-dir", str(data), "--cache-dir", str(tmp_path / "cache"), "--quiet"]
    for more, message in (
        (["--batch-size", "64", "--val-size", "0"], "--batch-size 64"),
        (["--batch-size", "16", "--val-size", "39"], "--val-size 39"),
        (["--batch-size", "16", "--val-size", "5"], "--val-size 5"),
        (["--batch-size", "16", "--val-size", "0", "--model", "torchvision:vgg11"], "torchvision:vgg11"),
        (
            ["--batch-size", "16", "--val-size", "0", "--compile", "graph", "--device", "cpu"],
            "--compile graph",
        ),
        (["--epochs", "0"], "--epochs 0"),
    ):
        assert main([*flags, *more]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]


def test_sources_that_are_missing(run: Callable[..., str], data: Path, tmp_path: Path) -> None:
    for command in ("train", "compile"):
        assert str(tmp_path / "nowhere") in run(1, command, "--data-dir", tmp_path / "nowhere")
        assert "'mnits'" in run(1, command, "--dataset", "mnits")
    (data / "t10k-labels-idx1-ubyte").unlink()
    assert "t10k-labels-idx1-ubyte" in run(1, "train", "--data-dir", data)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in run(1, "train", "--data-dir", tmp_path / "empty")


@pytest.mark.parametrize("command", ["train", "compile"])
def test_sources_that_lie(
    run: Callable[..., str], data: Path, tmp_path: Path, command: str, write_idx, random_samples
) -> None:
    arguments = [command, "--data-dir", data]
    if command == "compile":
        arguments += ["--output", tmp_path / "out"]
    images, labels = data / "train-images-idx3-ubyte", data / "train-labels-idx1-ubyte"
    whole = images.read_bytes()

    for content, facts in (
        (whole[:-5], ("31,355", "(40, 28, 28)", "31,360")),
        (whole + b"more", ("31,360",)),
        (b"\x89PNG" + whole[4:], ()),
        (whole[:2] + b"\x0c" + whole[3:], ("i4",)),
    ):
        images.write_bytes(content)
        error = run(1, *arguments)
        assert all(fact in error for fact in (str(images), *facts)), error
    images.unlink()
    packed = images.with_name(images.name + ".gz")
    packed.write_bytes(gzip.compress(whole)[:-200])
    assert str(packed) in run(1, *arguments)
    packed.unlink()
    write_idx(images, random_samples(41)[0])
    error = run(1, *arguments)
    assert "41" in error
    assert "40" in error
    images.write_bytes(whole)
    spoiled = bytearray(labels.read_bytes())
    spoiled[8 + 3] = 10
    labels.write_bytes(bytes(spoiled))
    error = run(1, *arguments)
    assert all(fact in error for fact in (str(labels), "label 10", "sample 3"))
    # Nothing was written that a later run could take for whole.
    assert not list(tmp_path.rglob("*.beton"))


def test_damaged_compiled_files(run: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert main(["compile", "--data-dir", str(data), "--output", str(tmp_path / "betons")]) == 0
    path = tmp_path / "betons" / "mnist-train.beton"
    whole = path.read_bytes()
    for length in (0, 3, 24, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for command in (["verify", path], ["train", "--data-dir", tmp_path / "betons"]):
            assert "mnist-train.beton" in run(1, *command)
    page = bytearray(whole)
    page[-40 * 24 - 2_000_000] ^= 1
    path.write_bytes(page)
    assert "page 0" in run(1, "verify", path)
    assert "page 0" in run(1, "train", "--data-dir", tmp_path / "betons", "--verify", "full")


def test_runs_that_are_none(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("evaluate", "predict"):
        picture = [tmp_path / "a.png"] if command == "predict" else []
        assert "model.safetensors" in run(1, command, tmp_path / "empty", *picture)
        assert str(tmp_path / "nowhere") in run(1, command, tmp_path / "nowhere", *picture)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert str(tmp_path / "full") in run(2, "train", "--dataset", "digits", "--out", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_pictures_that_are_none(run: Callable[..., str], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data-dir", str(data), "--cache-dir", str(tmp_path / "c"), "--out", str(out), *SMALL]) == 0
    text = tmp_path / "a.png"
    text.write_text("no picture")
    assert "a.png" in run(1, "predict", out, text)
    assert "nowhere.png" in run(1, "predict", out, tmp_path / "nowhere.png")
    from PIL import Image

    Image.new("L", (30, 30), 255).save(text)
    assert "a.png" in run(1, "predict", out, text)


@pytest.fixture
def forbidden(tmp_path: Path) -> Path:
    """A folder that cannot be written into."""
    if os.geteuid() == 0:  # root may write into any folder but those that the kernel makes
        return Path("/sys/kernel")
    folder = tmp_path / "forbidden"
    folder.mkdir(mode=0o555)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="root finds no folder that is closed to it")
def test_no_permission_to_write(run: Callable[..., str], data: Path, forbidden: Path, tmp_path: Path) -> None:
    before = sorted(forbidden.iterdir())
    assert str(forbidden / "mnist-train.beton") in run(1, "compile", "--data-dir", data, "--output", forbidden)
    assert str(forbidden / "run") in run(1, "train", "--data-dir", data, "--out", forbidden / "run")
    assert sorted(forbidden.iterdir()) == before


def child_with_little_disk(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command where no file may grow beyond `limit` bytes: writing fails as on a full disk."""
    code = f"import sys\nfrom fastmnist.cli.main import main\nsys.exit(main({[str(a) for a in arguments]!r}))"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_a_disk_that_runs_full(data: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    done = child_with_little_disk(100_000, "compile", "--data-dir", data, "--output", cache)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(cache) in done.stderr
    assert "MB" in done.stderr
    assert not list(cache.iterdir())

    assert main(["compile", "--data-dir", str(data), "--output", str(cache)]) == 0
    # The weights of the small model have 0.4 MB.
    done = child_with_little_disk(300_000, "train", "--data-dir", data, "--cache-dir", cache, "--out", out, *SMALL)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(out) in done.stderr
    assert not out.exists()


def test_a_full_disk_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    files.write_bytes(path, b"older")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FastmnistError, match=re.escape(f"{path}: ")):
        files.write_bytes(path, b"newer")
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify", str(tmp_path / "nowhere"), "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("fastmnist: ")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("a\nb"), 2),
        (DataError("a\nb"), 1),
        (FastmnistError("a\nb"), 1),
        (ZeroDivisionError("a\nb"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_line_and_an_exit_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "verify", (COMMANDS["verify"][0], fail))
    assert main(["verify", "x"]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fastmnist: ")
    assert " ".join(str(error).split()) in line
    defect = isinstance(error, ZeroDivisionError)  # the only one of which --debug shows more
    assert [fact in line for fact in ("ZeroDivisionError", "--debug")] == [defect, defect]


@pytest.mark.parametrize(("named", "configured"), [("all", "ours"), ("tuned", "tuned"), (None, "ours")])
def test_tune_takes_one_loader_or_all(
    named: str | None, configured: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = []

    def take(config: TrainConfig, *, loader: str, **_: object) -> None:
        taken.append((config.loader, config.batch_size, loader))
        raise ConfigError("taken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastmnist.measure.tune.tune", take)
    flags = [] if named is None else ["--loader", named]
    assert main(["tune", "--batch-size", "48", *flags]) == 2
    assert taken == [(configured, 48, named or "ours")]
    assert main(["tune", "--loader", "fast"]) == 2
    assert len(taken) == 1


def test_compile_says_what_it_did(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "out", tmp_path / "r.json"
    command = ["compile", "--data-dir", str(data), "--output", str(output), "--json", str(report)]
    for expected in ("written", "current"):
        assert main(command) == 0
        assert capsys.readouterr().out.count(expected) == 2
        content = json.loads(report.read_text())
        assert [f["status"] for f in content["files"]] == [expected] * 2
        assert [f["samples"] for f in content["files"]] == [40, 20]
    assert np.isfinite(content["seconds"])
