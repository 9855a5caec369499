"""Two saved results compared: what changed beyond their intervals, and files that cannot be compared."""

import json

import pytest

from fastmnist.cli.main import main
from fastmnist.errors import DataError
from fastmnist.measure.changes import compare, compare_files


def summary(median, spread=0.0):
    return {"median": median, "low": median - spread, "high": median + spread, "n": 9}


def diagnosis(step=0.01, spread=0.001, copying=None):
    parts = dict.fromkeys(("fixed_step_seconds", "loader_seconds", "gain"), summary(1.0))
    evidence = parts | {"step_seconds": summary(step, spread), "copy_seconds": copying}
    return {"kind": "model", "verdict": f"A step of {step}.", "evidence": evidence}


def run(growth=None):
    figures = {"step_seconds": summary(0.1, 0.01), "waiting": summary(0.2, 0.1), "timeline": []}
    return {"kind": "model", "verdict": "A run.", "memory": growth} | figures


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (diagnosis(), diagnosis(), []),
        (diagnosis(), diagnosis(0.0119), []),  # the intervals meet
        (diagnosis(), diagnosis(0.0121), ["a step"]),
        (diagnosis(), diagnosis(0.0079), ["a step"]),
        (diagnosis(spread=0.01), diagnosis(0.015), []),
        (diagnosis(), diagnosis(copying=summary(3.0)), []),  # measured once only
        (diagnosis(copying=summary(3.0)), diagnosis(copying=summary(4.0)), ["copying a batch"]),
        (run(), run({"per_second": 1, "low": 0, "high": 2}), []),
        (
            run({"per_second": 0, "low": -1, "high": 1}),
            run({"per_second": 1e8, "low": 9e7, "high": 2e8}),
            ["growth of memory in a minute"],
        ),
    ],
)
def test_only_intervals_apart_are_a_change(before, after, moved):
    found = compare(before, after)
    assert [change.name for change in found.changes if change.beyond_noise] == moved
    assert all((name in found.verdict()) for name in moved)
    assert json.loads(json.dumps(found.to_dict()))["verdicts"] == [before["verdict"], after["verdict"]]
    assert len(found.lines()) == 2 + len(found.changes)


def test_the_command(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.json", "b.json", "run.json", "out.json")]
    for path, content in zip(paths, (diagnosis(), diagnosis(0.05), run()), strict=False):
        (tmp_path / path).write_text(json.dumps(content))
    assert main(["doctor", "--compare", *paths[:2], "--json", paths[3]]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert capsys.readouterr().out.splitlines()[0] == result["verdict"]
    assert [change["name"] for change in result["changes"] if change["beyond_noise"]] == ["a step"]
    assert main(["doctor", "--compare", *paths[1:3]]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert [word for word in ("b.json", "diagnosis", "run.json", "watched run") if word not in line] == []


@pytest.mark.parametrize("content", [None, "", "[]", "{}", b"\xff\xfe", '{"evidence": {}}', '{"timeline": []}'])
def test_files_that_are_no_result(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"a\.json"):
        compare_files(path, path)
