"""The comparison: all contenders in one run, each row complete, each failure in its own row."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from joblib import cpu_count

import fastmnist
from fastmnist.beton.reader import Beton
from fastmnist.cli.main import main
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.measure import bench as module
from fastmnist.measure.bench import Plan, bench, bench_file, choose_contenders
from fastmnist.measure.contenders import BY_NAME, CONTENDERS, OURS, PLAIN
from fastmnist.measure.worker import WorkerProcess
from fastmnist.report.tables import CPU_HEADING, HEADINGS, cells, footnotes, headings, markdown

COUNT, BATCH = 640, 64
SHORT = Plan(seconds=1e5, least_turns=2, first_batches=1)  # never late, however busy the machine: the turns are few
CRASHES = "import sys; sys.stdin.readline(); print('{\"seconds\": 1}', flush=True); sys.stdin.readline(); sys.exit(3)"

HANGS = """
import sys, time

opened = '{"first_batch": 1, "compiled": 0, "peak_memory": 1, "shape": [1], "dtype": "uint8"}'
for answer in ('{"seconds": 1}', opened):
    sys.stdin.readline()
    print(answer, flush=True)
time.sleep(600)
"""
PLANTED = {"FFCV": CRASHES, "tensors, index_select": HANGS}


class Planted(WorkerProcess):
    """Contenders that crash or hang in the middle."""

    def __init__(self, contender, environment=None):
        if contender in PLANTED:
            self.program = (sys.executable, "-c", PLANTED[contender])
        super().__init__(contender, environment)

    def receive(self, timeout):
        if self.contender in PLANTED and timeout == module.TURN_TIMEOUT:
            timeout = 1.0  # it never comes; the others may have a busy machine
        return super().receive(timeout)


@pytest.fixture(scope="module")
def file(scratch, write_small_beton) -> Path:
    path = scratch() / "small-train.beton"
    write_small_beton(path, COUNT)
    with fastmnist.Loader(path, device="cpu") as loader:
        next(iter(loader))  # this process has compiled before
    return path


@pytest.fixture(scope="module")
def found(file, scratch):
    """One comparison for all tests: ours, the plain DataLoader, two that fail and peers that are not installed.

    The current folder holds a copy of the package, as a clone does.
    """
    folder = scratch()
    shutil.copytree(Path(fastmnist.__file__).parent, folder / "fastmnist", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NUMBA_CACHE_DIR", str(scratch()))  # empty, as on a new machine
        patch.setattr(module, "WorkerProcess", Planted)
        patch.setattr(module, "MOST_TURNS", 2)
        patch.setattr(module, "missing", lambda peer: "not installed")
        names = [OURS, PLAIN, "tensors, index_select", "FFCV", *(s.name for s in CONTENDERS if s.kind == "peer")]
        yield bench(
            file, batch_size=BATCH, device="cpu", contenders=choose_contenders(";".join(names), False), plan=SHORT
        )


def rows_of(found, group):
    return {row["name"]: row for row in found.rows if row["group"] == group}


def test_every_row_carries_where_it_comes_from(found) -> None:
    for row in found.rows:
        assert row["hardware"]["processor"]
        assert row["hardware"]["cores"] >= 1
        assert row["versions"]["torch"]
        assert row["date"]
        assert "commit" in row
        assert row["settings"]["batch_size"] == BATCH
        if "error" not in row:
            assert row["low"] <= row["median"] <= row["high"]
            assert row["n"] == len(row["values"])
    json.dumps(found.to_dict())


def test_rates_are_held_against_the_limit_and_the_plain_dataloader(found) -> None:
    loaders = rows_of(found, "loader")
    ours, limit, plain = loaders[OURS], loaders["memory copy, bytes"], loaders[PLAIN]
    assert ours["n"] == limit["n"] == plain["n"] >= 2
    ratios = [a / b for a, b in zip(ours["values"], plain["values"], strict=True)]
    assert ours["over_plain"]["max"] == pytest.approx(max(ratios))
    assert plain["over_plain"]["median"] == 1
    ratios = [a / b for a, b in zip(ours["values"], limit["values"], strict=True)]
    assert ours["of_limit"]["min"] == pytest.approx(min(ratios))
    assert ours["output"] == [[BATCH, 1, 28, 28], "uint8"]
    assert plain["output"] == [[BATCH, 1, 28, 28], "float32"]


def test_first_batches_are_cold_and_warm_rows(found) -> None:
    first = rows_of(found, "first batch")
    assert first[OURS]["settings"]["jit_cache"] == "warm"
    assert first[f"{OURS}, cold"]["settings"]["jit_cache"] == "cold"
    assert set(first[OURS]["compiled"]) == {0}
    assert min(first[f"{OURS}, cold"]["compiled"]) > 0
    assert first[PLAIN]["unit"] == "seconds"


def test_memory_is_that_of_the_loader(found) -> None:
    memory = rows_of(found, "peak memory")
    # The images alone are half a megabyte; the interpreter with torch is hundreds.
    assert 0 < memory[PLAIN]["median"] < 200 << 20
    assert memory[PLAIN]["unit"] == "bytes"


def test_cpu_time_is_that_of_the_turns(found) -> None:
    rates, used = rows_of(found, "loader")[PLAIN], rows_of(found, "CPU time")[PLAIN]
    assert used["n"] == rates["n"]
    for rate, seconds in zip(rates["values"], used["values"], strict=True):
        assert 0 < seconds <= 1.2 * cpu_count() * 1e6 / rate  # it had no more than all cores


def test_what_crashes_or_hangs_is_said_and_the_rest_goes_on(found) -> None:
    loaders = rows_of(found, "loader")
    assert loaders["FFCV"]["error"].endswith(" 3")  # the exit status
    assert "1 s" in loaders["tensors, index_select"]["error"]
    assert "median" not in loaders["FFCV"]


def test_peers_that_are_missing_are_listed(found) -> None:
    loaders = rows_of(found, "loader")
    peers = [contender.name for contender in CONTENDERS if contender.kind == "peer"]
    assert peers
    assert {loaders[name]["error"] for name in peers} == {"not installed"}


def test_the_table_has_a_line_for_each_that_was_measured(found) -> None:
    lines = cells(found.rows)
    measured = {name for name, row in rows_of(found, "loader").items() if "error" not in row}
    assert {line[0] for line in lines} == measured
    assert headings(found.rows) == (*HEADINGS, CPU_HEADING)
    assert all(len(line) == len(HEADINGS) + 1 and line[-1] for line in lines)
    older = [row for row in found.rows if row["group"] != "CPU time"]
    assert cells(older) == [line[:-1] for line in lines]
    rates = [rows_of(found, "loader")[line[0]]["median"] for line in lines]
    assert rates == sorted(rates, reverse=True)
    notes = " ".join(footnotes(found.rows))
    for text in ("FFCV", f"batch {BATCH}", "small-train.beton"):
        assert text in notes
    assert markdown(found.rows).count("\n| ") == len(measured) + 1


def test_ctrl_c_keeps_what_was_measured(file) -> None:
    def progress(text, share):
        if text.startswith("turn 3"):
            raise KeyboardInterrupt

    plan = replace(SHORT, least_turns=5)
    found = bench(
        file, batch_size=BATCH, device="cpu", contenders=[BY_NAME[OURS], BY_NAME[PLAIN]], plan=plan, progress=progress
    )
    assert found.interrupted
    assert rows_of(found, "loader")[OURS]["n"] == 2


def test_ours_that_fails_is_no_result(file, monkeypatch) -> None:
    monkeypatch.setattr(module, "WorkerProcess", Planted)
    monkeypatch.setitem(PLANTED, OURS, CRASHES)
    with pytest.raises(FastmnistError, match=r"fastmnist\.Loader .* 3$"):
        bench(file, batch_size=BATCH, device="cpu", contenders=[BY_NAME[OURS]], plan=SHORT)


def test_a_batch_larger_than_the_data_is_refused(file) -> None:
    with pytest.raises(ConfigError, match=rf"--batch-size 641: .*\b{COUNT}\b"):
        bench(file, batch_size=641)


def test_names_are_checked_and_bring_what_they_are_held_against() -> None:
    with pytest.raises(ConfigError, match=r"--only: .*a loader; .*memory copy"):
        choose_contenders("a loader;FFCV", False)
    chosen = {contender.name for contender in choose_contenders("FFCV", True)}
    assert chosen == {"FFCV", PLAIN, "memory copy, bytes", "memory copy, float32"}
    assert all(contender.quick for contender in choose_contenders(None, True))
    assert choose_contenders(None, False) == list(CONTENDERS)


def test_the_embedded_digits_are_expanded_where_there_is_no_mnist(scratch) -> None:
    path, note = bench_file("digits", None, str(scratch()))
    with Beton(path) as file:
        assert len(file) >= 60_000
    assert "deformed" in note


def test_the_command_writes_table_pictures_and_json(found, tmp_path, monkeypatch, capsys, write_dataset) -> None:
    write_dataset(tmp_path / "data", train=200, test=20)
    monkeypatch.chdir(tmp_path)
    asked = {}
    monkeypatch.setattr(module, "bench", lambda data, **settings: asked.update(settings, data=data) or found)
    flags = ["--dataset", "mnist", "--data-dir", str(tmp_path / "data"), "--batch-size", "50", "--device", "cpu"]
    assert main(["bench", *flags, "--only", OURS, "--json", "result.json", "--out", "out"]) == 0
    assert asked["data"].name == "mnist-train.beton"
    assert (asked["batch_size"], asked["device"], asked["plan"]) == (50, "cpu", module.FULL)
    assert asked["contenders"] == choose_contenders(OURS, False)
    assert {path.name for path in Path("out").iterdir()} == {"bench.json", "bench.md", "bench.png", "bench.svg"}
    result = json.loads(Path("result.json").read_text())
    assert result["folder"] == "out"
    assert {row["name"] for row in result["rows"]} >= {OURS, PLAIN}
    printed = capsys.readouterr().out
    assert OURS in printed
    assert "2 turns" in printed
