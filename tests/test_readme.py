"""README's figures, and those of the pages under docs/, are those of the files that they name."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from fastmnist.cli.main import parse
from fastmnist.report.ladder_chart import ladder_markdown
from fastmnist.report.tables import gpu_table, markdown, step_table, time_table, verdict_table
from fastmnist.system.numbers import number

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_last_run() -> None:
    """Made by `fastmnist bench`; see benchmarks/results/README.md."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = text.partition("<!-- bench -->\n")[2].partition("<!-- /bench -->")[0]
    assert shown == markdown(json.loads((ROOT / "benchmarks/results/bench.json").read_text())["rows"])


def test_the_table_of_verdicts_is_that_of_the_last_run() -> None:
    """Made by benchmarks/research/verdicts.py."""
    found = json.loads((ROOT / "benchmarks/results/verdicts.json").read_text())
    shown = (ROOT / "docs" / "tuning.md").read_text().partition("<!-- verdicts -->\n")[2]
    assert shown.partition("<!-- /verdicts -->")[0] == verdict_table(found)
    for tool, score in found["score"].items():
        right = [bool(set(case["tools"][tool]["words"]) & set(case["right"])) for case in found["cases"]]
        assert (len(right), sum(right)) == (12, score)


def lead() -> str:
    """README's first table, from the files that its figures come from."""
    results = ROOT / "benchmarks" / "results"
    time, gpu, bench = (
        json.loads((results / f"{name}.json").read_text()) for name in ("time_to_accuracy", "gpu_suite", "bench")
    )
    preset, plain, notebook = time["rows"]
    small = fmean(run["train_seconds"] for run in gpu["small CNN"]["runs"])
    loaders = {row["name"]: row for row in bench["rows"] if row["group"] == "loader" and "error" not in row}
    rates = {name: number(row["median"]) for name, row in loaders.items()}

    def cores(row: dict) -> str:
        return f"{row['hardware']['cores']} cores of an {row['hardware']['processor']}, {row['date'][:10]}"

    lines = [
        "| | fastmnist | others | measured on |",
        "| --- | --- | --- | --- |",
        f"| 99 % on a CPU | {preset['test_accuracy_mean']:.2%} after {preset['median']:.1f} s of training | plain "
        f"recipe {plain['median']:.1f} s; what most notebooks do {notebook['median']:.0f} s | {cores(preset)} |",
    ]
    for target, name, others in (("99", "fast99", f"published small CNN {small:.2f} s"), ("99.5", "fast995", "")):
        run = gpu["presets"][name]
        lines.append(
            f"| {target} % on a GPU | {run['test_accuracy_mean']:.2%} after {run['train_seconds_mean']:.2f} s of "
            f"training | {others} | {gpu['hardware']['gpu']}, {gpu['date'][:10]} |"
        )
    lines.append(
        f"| loading alone | {rates['fastmnist.Loader']} images/s | tuned DataLoader {rates['DataLoader, tuned']}; FFCV "
        f"{rates['FFCV']}; plain DataLoader {rates['DataLoader, plain']} | {cores(loaders['fastmnist.Loader'])} |"
    )
    return "\n".join(lines) + "\n"


def test_the_first_table_has_the_figures_of_the_last_runs() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.partition("<!-- lead -->\n")[2].partition("<!-- /lead -->")[0] == lead()


def test_the_seconds_are_those_of_the_last_run() -> None:
    """Made by benchmarks/time_to_accuracy.py; of three sides, the first one is the preset."""
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- time -->\n")[2].partition("<!-- /time -->")[0]
    rows = json.loads((ROOT / "benchmarks/results/time_to_accuracy.json").read_text())["rows"]
    assert shown == time_table(rows)
    assert [row["over_preset"]["median"] >= 1 for row in rows] == [True] * 3


@pytest.mark.parametrize(
    ("page", "mark", "table"), [("README.md", "gpu", gpu_table), ("docs/benchmarks.md", "step", step_table)]
)
def test_the_gpus_figures_are_those_of_the_last_run(page: str, mark: str, table: Callable[[dict], str]) -> None:
    """Made by benchmarks/gpu_suite.py."""
    shown = (ROOT / page).read_text().partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]
    assert shown == table(json.loads((ROOT / "benchmarks/results/gpu_suite.json").read_text()))


def test_the_table_of_ways_is_that_of_the_last_run() -> None:
    rows = json.loads((ROOT / "benchmarks/results/ablation.json").read_text())["rows"]
    lines = [line for line in (ROOT / "docs/ablation.md").read_text().splitlines() if line.startswith("| ")]
    for row, line in zip(rows, lines[2:], strict=True):  # after the heading
        assert line.startswith(f"| {row['name']} | {row['val_accuracy_mean']:.2%}")


def test_the_ladder_is_that_of_the_last_run() -> None:
    """Made by `fastmnist ladder`."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = text.partition("<!-- ladder -->\n")[2].partition("<!-- /ladder -->")[0]
    assert shown == ladder_markdown(json.loads((ROOT / "benchmarks/results/ladder.json").read_text()))


def commands() -> list[str]:
    """The lines of README and docs/ that call fastmnist, without what is said about them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for page in pages for line in page.read_text().splitlines() if line.startswith("    fastmnist ")]
    return [line.partition(" #")[0].strip() for line in lines]


@pytest.mark.parametrize("command", commands())
def test_the_command_line_takes_what_the_pages_say(command: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 2\n")
    words = [str(file) if word.endswith("config.yaml") else word for word in shlex.split(command)]
    parse(words[1:])


def test_there_are_commands() -> None:
    assert {command.split()[1] for command in commands()} >= {"train", "bench", "tune", "doctor", "ladder", "demo"}


def test_readme_s_loader_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code) == 1
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(code[0], found)
    assert tuple(found["images"].shape) == (157, 1, 28, 28)  # 1,437 = 5 x 256 + 157
    assert abs(float(found["images"].mean())) < 0.2  # normalised
    weights = found["model"].state_dict().values()
    assert all(weight.isfinite().all() for weight in weights)
    assert found["loss"].item() < 2.3  # of guessing
    found["loader"].close()


def test_every_page_that_is_named_is_there() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
