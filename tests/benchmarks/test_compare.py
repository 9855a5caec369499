"""benchmarks/compare.py: its verdicts, the measure that decides, and files that it refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.system.statistics import ratios, row

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compare.py"
ORIGIN = {
    "hardware": {"processor": "P", "cores": 2, "threads": 2, "system": "Linux"},
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "date": "2026-11-23T10:00:00+00:00",
    "commit": "0123456789ab",
    "device": "cpu",
    "data": "mnist-train.beton",
}
STEADY = [1.0, 1.01, 0.99, 1.005, 0.995, 1.002, 0.998]
OPPOSITE = {"better": "worse", "worse": "better"}


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run(compare, tmp_path, capsys):
    """(before, after, arguments) -> (status, what was printed, errors); rows, or text as it stands."""

    def called(before, after, *arguments):
        paths = []
        for name, content in (("before.json", before), ("after.json", after)):
            paths.append(tmp_path / name)
            if content is not None:
                text = content if isinstance(content, str) else json.dumps({"rows": content})
                paths[-1].write_text(text)
        status = compare.main([*map(str, paths), *arguments])
        out, errors = capsys.readouterr()
        return status, out, errors

    return called


def made(name="x", factor=1.0, unit="images/s", group="loader", settings=None, limits=None, **more):
    """A row of values that spread by 1 %; limits: factors of the copy's, of which it is half."""
    values = [100 * factor * value for value in STEADY]
    if limits is not None:
        more["of_limit"] = ratios(values, [200 * limits] * len(values)).to_dict()
    return row(group, name, values, unit, ORIGIN, settings, **{"kind": "ours"} | more)


FIGURES = st.floats(1e-6, 1e9)
MANY = st.lists(FIGURES, min_size=1, max_size=12)


@st.composite
def rows(draw):
    found = []
    for name in draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True)):
        more = {}
        for measure in draw(st.sets(st.sampled_from(["of_limit", "over_plain"]))):
            more[measure] = ratios(
                *zip(*draw(st.lists(st.tuples(FIGURES, FIGURES), min_size=1, max_size=12)), strict=True)
            ).to_dict()
        unit = {"a": "seconds", "b": "bytes"}.get(name, "images/s")
        kind = "limit" if name == "f" else "ours"
        found.append(row("group", name, draw(MANY), unit, ORIGIN, kind=kind, **more))
    return found


@given(rows(), st.floats(0, 0.5))
def test_a_file_against_itself_has_not_changed(compare, found, threshold):
    verdicts = {line.verdict for line in compare.compare(found, found, threshold)}
    assert len(verdicts) >= 1
    assert verdicts <= {"no different", "too few values", "the machine"}


@given(rows(), rows(), st.floats(0, 0.5))
def test_the_other_way_round_better_is_worse(compare, before, after, threshold):
    there = {line.key: line for line in compare.compare(before, after, threshold)}
    back = {line.key: line for line in compare.compare(after, before, threshold)}
    assert there.keys() == back.keys()
    for key, line in there.items():
        assert back[key].verdict == OPPOSITE.get(line.verdict, line.verdict)
        assert back[key].ratio == line.ratio


@given(MANY, MANY, st.sampled_from(["images/s", "ratio", "seconds", "bytes"]), st.floats(0, 0.5))
def test_a_verdict_is_disjoint_intervals_and_more_than_the_threshold(compare, before, after, unit, threshold):
    one, other = (row("group", "x", values, unit, ORIGIN) for values in (before, after))
    (line,) = compare.compare([one], [other], threshold)
    disjoint = one["high"] < other["low"] or other["high"] < one["low"]
    far = max(one["median"], other["median"]) / min(one["median"], other["median"]) - 1 > threshold
    enough = min(one["n"], other["n"]) >= 6
    assert (line.verdict in OPPOSITE) == (disjoint and far and enough)
    if line.verdict in OPPOSITE:
        more = other["median"] > one["median"]
        assert line.verdict == ("better" if more == (unit in ("images/s", "ratio")) else "worse")


@pytest.mark.parametrize(
    ("unit", "factor", "status", "verdict"),
    [
        ("images/s", 0.8, 1, "worse"),
        ("images/s", 1.25, 0, "better"),
        ("seconds", 1.25, 1, "worse"),
        ("seconds", 0.8, 0, "better"),
        ("bytes", 1.25, 1, "worse"),
        ("images/s", 0.97, 0, "no different"),  # disjoint, but less than the threshold
    ],
)
def test_a_planted_change_is_found(run, unit, factor, status, verdict):
    others = [made("same"), made("also", unit="seconds")]
    found, out, errors = run([*others, made(unit=unit)], [*others, made(unit=unit, factor=factor)])
    assert (found, errors) == (status, "")
    assert next(line for line in out.splitlines() if "│ x " in line).split("│")[-2].strip() == verdict
    counts = "3 no different" if verdict == "no different" else f"2 no different, 1 {verdict}"
    assert f"3 rows in both: {counts}." in out


def test_the_threshold_is_a_choice(run):
    before, after = [made()], [made(factor=0.97)]
    assert run(before, after)[0] == 0
    assert run(before, after, "--threshold", "0.02")[0] == 1


def test_a_slower_machine_is_no_regression(run):
    """All figures are 30 % lower, the plain copies' too."""
    before = [made("copy", kind="limit"), made(limits=1.0), made("start", unit="seconds")]
    after = [made("copy", 0.7, kind="limit"), made(factor=0.7, limits=0.7), made("start", 1.3, unit="seconds")]
    status, out, _ = run(before, after)
    assert status == 0
    assert "-30.0 %" in out
    assert "3 rows in both: 1 the machine, 2 no different." in out


@pytest.mark.parametrize(
    ("factor", "limits", "verdict"),
    [
        (0.7, 1.0, "worse"),
        (1.4, 1.0, "better"),
        (0.7, 0.7, "no different"),
        (0.6, 0.8, "worse"),  # of a slower machine
        (1.0, 1.5, "unclear"),  # a slower program on a faster machine, or else the copy met what the other did not
        (1.2, 1.5, "unclear"),
        (1.0, 0.7, "unclear"),
    ],
)
def test_figure_and_ratio_must_agree(compare, factor, limits, verdict):
    (line,) = compare.compare([made(limits=1.0)], [made(factor=factor, limits=limits)], 0.05)
    assert (line.verdict, line.ratio) == (verdict, "of_limit")


def test_memory_does_not_drift_with_the_machine(run):
    before = [made("copy", kind="limit"), made(unit="bytes")]
    assert run(before, [made("copy", 0.5, kind="limit"), made(unit="bytes", factor=1.2)])[0] == 1


def test_of_the_limit_comes_before_over_plain_and_a_ratio_to_itself_says_nothing(compare):
    ratio = {
        name: ratios([value * x for x in STEADY], [1.0] * 7).to_dict() for name, value in (("good", 1), ("bad", 0.5))
    }
    itself = ratios([1.0] * 7, [1.0] * 7).to_dict()

    def verdict(before, after):
        (line,) = compare.compare([made(**before)], [made(factor=0.5, **after)], 0.05)
        return line.verdict, line.ratio

    both = {"of_limit": ratio["good"], "over_plain": ratio["good"]}
    assert verdict(both, both | {"over_plain": ratio["bad"]}) == ("no different", "of_limit")
    assert verdict(both, both | {"of_limit": ratio["bad"]}) == ("worse", "of_limit")
    assert verdict({"over_plain": ratio["good"]}, {"over_plain": ratio["bad"]}) == ("worse", "over_plain")
    assert verdict({"over_plain": itself}, {"over_plain": itself}) == ("worse", None)
    assert verdict({"of_limit": ratio["good"]}, {}) == ("worse", None)  # it compares with nothing


def test_few_values_have_no_verdict(run):
    before, after = (row("g", "x", [value] * 5, "images/s", ORIGIN) for value in (1.0, 9.0))
    status, out, _ = run([after], [before])
    assert status == 0
    assert "too few values" in out


def test_other_hardware_and_versions_come_first_and_only_ratios_are_judged(run):
    other = ORIGIN | {"hardware": ORIGIN["hardware"] | {"cores": 4}, "versions": {"python": "3.12.1"}}
    before = [made(limits=1.0), made("start", unit="seconds")]
    after = [found | other for found in [made(factor=1.0, limits=2.0), made("start", 9.0, unit="seconds")]]
    status, out, _ = run(before, after)
    assert status == 1
    lines = out.splitlines()
    assert "differs: cores: 2 before, 4 after" in lines
    assert "differs: python: 3.11.7 before, 3.12.1 after" in lines
    assert "differs: torch: 2.15.0 before, none after" in lines
    assert lines.index("differs: cores: 2 before, 4 after") < next(
        i for i, line in enumerate(lines) if "verdict" in line
    )
    assert "2 rows in both: 1 worse, 1 other hardware." in out
    assert run(before[1:], after[1:])[0] == 0


def test_rows_of_one_side_are_listed_and_decide_nothing(run):
    failed = {"group": "loader", "name": "peer", "settings": {}, "error": "it [red]crashed", **ORIGIN}
    before = [made(), made("peer"), made("old"), made(settings={"batch_size": 2, "workers": None})]
    status, out, _ = run(before, [made(), failed, made("new"), made(settings={"batch_size": 4})])
    assert status == 0
    lines = out.splitlines()
    assert "only before: loader: peer (cpu): not measured after: it [red]crashed" in lines
    assert "only before: loader: old (cpu)" in lines
    assert "only before: loader: x (batch_size 2, cpu)" in lines
    assert "only after: loader: new (cpu)" in lines
    assert "only after: loader: x (batch_size 4, cpu)" in lines
    assert "1 row in both: 1 no different." in lines


def test_the_rows_of_all_parts_are_compared(compare, tmp_path):
    parts = {"steps": {"peak": 1.0, "rows": [made("a")]}, "runs": {"fast": {"rows": [made("b")], "runs": [{"c": 1}]}}}
    path = tmp_path / "parts.json"
    path.write_text(json.dumps({"rows": [made("c")], **parts}))
    assert [found["name"] for found in compare.read(path)] == ["c", "a", "b"]


GOOD = [made()]
BAD = {
    "missing": (None, "cannot be read: No such file"),
    "no json": ("{", "is no JSON"),
    "no text": ("[" * 100_000, "is no JSON"),
    "a list": ("[]", 'has no "rows"'),
    "no rows": ('{"rows": []}', 'has no "rows"'),
    "rows of another kind": ('{"rows": [3]}', "row 1 has no group and name"),
    "no unit": (json.dumps({"rows": [{**GOOD[0], "unit": None}]}), "row 1 (loader: x) has no unit"),
    "no median": (
        json.dumps({"rows": [*GOOD, {**made("y"), "median": None}]}),
        "row 2 (loader: y) lacks a number of n,",
    ),
    "not a number": (json.dumps({"rows": [{**GOOD[0], "low": float("nan")}]}), "row 1 (loader: x) lacks a number"),
    "a ratio of another kind": (json.dumps({"rows": [{**GOOD[0], "of_limit": 0.5}]}), "row 1 (loader: x) lacks"),
    "twice": (json.dumps({"rows": GOOD * 2}), "two rows of loader: x with the same settings"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_cannot_be_used_is_named_in_one_line(run, case, first):
    content, said = BAD[case]
    status, out, errors = run(*((content, GOOD) if first else (GOOD, content)))
    assert (status, out) == (2, "")
    assert errors.count("\n") == 1
    assert f"{'before' if first else 'after'}.json: " in errors
    assert said in errors
    assert "fastmnist bench" in errors


def test_files_of_nothing_in_common_are_refused_in_one_line(run):
    status, out, errors = run([made()], [made("other")])
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert "no row was measured in both" in errors


def test_a_threshold_that_cannot_be_is_refused(run):
    with pytest.raises(SystemExit) as ended:
        run(GOOD, GOOD, "--threshold", "-1")
    assert ended.value.code == 2
