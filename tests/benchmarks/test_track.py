"""benchmarks/track.py on a repository of three commits: what it measures, its verdict, file and picture."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from fastmnist.system.statistics import ratios, row

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "track.py"
ORIGIN = {
    "hardware": {"processor": "P", "cores": 2},
    "versions": {},
    "date": "2026-11-28T10:00:00+00:00",
    "commit": None,
}
# A suite as small as can be: its own "throughput" is in a file of the commit.
SUITE = """
import json
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--rows", type=Path)


def pytest_sessionfinish(session):
    rows = json.loads((Path(__file__).parent / "rows.json").read_text())
    session.config.getoption("--rows").write_text(json.dumps({"rows": rows}))
"""


def rows(rate: float) -> list[dict]:
    """A loader of that rate, half as fast as the copy when rate is 1, beside a plain one and a copy."""
    found = []
    for name, factor, kind in (("fastmnist.Loader", rate, "ours"), ("DataLoader, plain", 0.01, "baseline")):
        limit = ratios([factor / 2] * 7, [1.0] * 7).to_dict()
        found.append(row("loader", name, [factor] * 7, "images/s", ORIGIN, kind=kind, of_limit=limit))
    found.append(row("loader", "memory copy", [2.0] * 7, "images/s", ORIGIN, kind="limit"))
    found.append(row("first batch", "fastmnist.Loader", [0.1] * 7, "seconds", ORIGIN, kind="ours"))
    return [*found, {"group": "loader", "name": "FFCV", "error": "is not installed"}]


@pytest.fixture(scope="module")
def track():
    spec = importlib.util.spec_from_file_location("track", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(SCRIPT.parent))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules[spec.name]


@pytest.fixture
def repository(track, tmp_path, monkeypatch):
    """Three commits: the second is as fast as the first, the third a fifth slower."""
    monkeypatch.setattr(track, "ROOT", tmp_path)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]

    def git(*arguments):
        subprocess.run(["git", *author, "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    suite = tmp_path / "benchmarks"
    suite.mkdir()
    (suite / "conftest.py").write_text(SUITE)
    (suite / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    for number, rate in enumerate((1.0, 1.0, 0.8)):
        (suite / "rows.json").write_text(json.dumps(rows(rate)))
        (tmp_path / "number").write_text(str(number))
        git("add", ".")
        git("commit", "--quiet", "--message", f"commit {number}")
    return tmp_path


def test_a_regression_has_a_commit(track, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        track, "measure", lambda checkout, arguments: json.loads((checkout / "benchmarks/rows.json").read_text())
    )
    output = tmp_path / "track.json"
    assert track.main(["HEAD~2", "HEAD~1", "HEAD", "--output", str(output)]) == 1
    found = json.loads(output.read_text())["commits"]
    assert [commit["subject"] for commit in found] == ["commit 0", "commit 1", "commit 2"]
    measured = {row["name"]: row for row in found[-1]["rows"]}
    assert measured.keys() == {"fastmnist.Loader", "DataLoader, plain"}  # the copy and the seconds have no ratio
    assert measured["fastmnist.Loader"]["of_limit"]["values"] == pytest.approx([0.4] * 6)
    assert measured["fastmnist.Loader"]["over_plain"]["median"] == pytest.approx(80)
    first, second, whole = capsys.readouterr().out.split("commit ")[1:]
    assert "worse" not in first
    assert "worse: loader: fastmnist.Loader: 0.5 to 0.4" in second
    assert "worse" in whole
    assert matplotlib.image.imread(tmp_path / "track.png").shape[1] > 1000
    assert track.main(["HEAD~2", "HEAD~1", "--output", str(output)]) == 0
    listed = subprocess.run(
        ["git", "-C", str(tmp_path), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1


def test_a_checkout_is_measured_by_its_own_suite(track, repository):
    assert track.measure(repository, []) == rows(0.8)


@pytest.mark.parametrize("commits", [["HEAD", "no-such-commit"], ["HEAD", "HEAD"]])
def test_commits_that_cannot_be_compared(track, repository, tmp_path, capsys, commits):
    assert track.main([*commits, "--output", str(tmp_path / "track.json")]) == 2
    assert "commit" in capsys.readouterr().err


def test_a_suite_that_fails_is_shown(track, repository):
    (repository / "benchmarks" / "conftest.py").write_text("raise RuntimeError('the suite is broken')")
    with pytest.raises(track.FastmnistError, match="the suite is broken"):
        track.measure(repository, [])
