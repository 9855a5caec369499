"""The code of the pages under docs/, run as it stands; each loop also stopped and resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.nn import functional
from torchvision.transforms.functional import normalize

import fastmnist
from fastmnist.cli.main import main
from fastmnist.loader.as_dataloader import INSTEAD
from tests.conftest import skip_or_fail

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def sections(page: str) -> dict[str, str]:
    """{heading: the Python code below it}, without headings that have none."""
    found: dict[str, str] = {}
    heading, inside = "", False
    for line in (DOCS / page).read_text().splitlines(keepends=True):
        if line.startswith("```"):
            inside = line.startswith("```python")
        elif inside:
            found[heading] = found.get(heading, "") + line
        elif line.startswith("#"):
            heading = line.strip("# \n")
    return found


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        skip_or_fail("peers", f"{package} is not installed; pip install '.[peers]'")


def assert_normalised(loader: Any, moments: Any) -> None:
    """The loader's first batch has its file's images, normalised by torchvision with these moments."""
    images, _, rows = next(loader.chunks())
    stored = torch.from_numpy(loader.file.images(rows.cpu().numpy())).permute(0, 3, 1, 2)
    assert torch.equal(images.cpu(), normalize(stored / 255, *moments))


# Your data


@pytest.fixture
def photos() -> None:
    """A folder of class folders."""
    for name, value in (("cat", 30), ("dog", 200)):
        (Path("photos") / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40 + number, 48), (value, number, 7)).save(Path("photos") / name / f"{number}.png")


def test_your_data(photos: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    for heading, code in sections("your-data.md").items():
        if heading != "Hugging Face":
            exec(code, names)
        if heading == "Tensors":
            with fastmnist.Beton("data/tensors.beton") as file:
                stored = torch.from_numpy(file.images(np.arange(1000))).permute(0, 3, 1, 2)
                assert torch.equal(stored, names["tensors"])
        if heading == "Arrays":
            train = names["loader"].file
            assert next(iter(names["loader"]))[0].shape == (64, 3, 32, 32)
            assert train.class_names == ("cat", "cow", "dog", "hen")
            assert_normalised(names["loader"], train.moments)
            assert_normalised(names["test_loader"], train.moments)
            assert names["test_loader"].file.moments != train.moments
            monkeypatch.delenv("FASTMNIST_DATA", raising=False)
            run = [
                "--images-seen",
                "200",
                "--batch-size",
                "64",
                "--model",
                "small-cnn",
                "--val-size",
                "0",
                "--out",
                "run",
                "--quiet",
            ]
            assert main(["train", "--dataset", "pets", "--data-dir", "data", *run]) == 0
    with fastmnist.Beton("data/tensors.beton") as file:
        assert (len(file), file.class_names) == (1100, ("anything",))
    assert (names["train"].samples, names["test"].samples) == (4, 2)
    with fastmnist.Beton("data/photos-train.beton") as file:
        assert file.class_names == ("cat", "dog")
        assert file.images(np.arange(4))[:, 5, 5, 0].tolist() == [30] * 2 + [200] * 2
    with fastmnist.Beton("data/dataset.beton") as file:
        image, label = names["dataset"][299]
        assert file.images(np.array([299]))[0].tolist() == np.asarray(image.resize((32, 32), 2)).tolist()
        assert file.labels[299] == label
    with fastmnist.Beton("data/stream.beton") as file:
        assert file.images(np.arange(1000))[:, 7, 7, 0].tolist() == [step % 256 for step in range(1000)]
    assert names["loss"].isfinite()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_your_data_from_hugging_face(photos: None) -> None:
    needs("datasets")
    names: dict[str, Any] = {"np": np, "fastmnist": fastmnist}
    exec(sections("your-data.md")["Hugging Face"], names)
    with fastmnist.Beton("data/hub.beton") as file:
        assert file.class_names == ("cat", "dog")
        assert file.images(np.arange(6))[:, 5, 5, 0].tolist() == [30] * 3 + [200] * 3
        assert file.labels.tolist() == [0] * 3 + [1] * 3


# Your loop

LOOPS = sections("your-loop.md")
FIRST = LOOPS["Your own loop"]


def test_your_loop(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(FIRST, names)
    loader, test_loader = names["loader"], names["test_loader"]
    assert loader.epoch == 3
    assert names["accuracy"]() > 0.5
    for each in (loader, test_loader):
        assert_normalised(each, loader.file.moments)
    assert test_loader.file.moments != loader.file.moments
    assert capsys.readouterr().out.count("% of the test images are right") == 3
    for each in (loader, test_loader):
        each.close()


class StoppedError(Exception):
    pass


def run_loop(heading: str, stop: int | None = None) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The names that the section's code leaves, and the labels of each batch; batch `stop` raises StoppedError."""
    seen: list[torch.Tensor] = []

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(seen) == stop:
            raise StoppedError
        seen.append(labels.clone())
        return functional.cross_entropy(logits, labels)

    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(FIRST.replace("range(3)", "range(0)"), names)  # the imports, the files, a model
    names["functional"] = SimpleNamespace(cross_entropy=cross_entropy)
    names["Path"] = Path
    torch.manual_seed(0)
    try:
        exec(LOOPS[heading], names)
    except StoppedError:
        assert stop is not None
    for name in ("loader", "test_loader"):
        names[name].close()
    return names, seen


@pytest.mark.parametrize(
    ("heading", "needed", "model_of", "saved"),
    [
        ("Resume in the middle of an epoch", "torch", lambda names: names["model"], "checkpoint.pt"),
        pytest.param(
            "Lightning",
            "lightning",
            lambda names: names["trainer"].lightning_module.model,
            "lightning/last.ckpt",
            marks=[pytest.mark.peers, pytest.mark.filterwarnings("ignore")],
        ),
        pytest.param(
            "accelerate",
            "accelerate",
            lambda names: names["model"],
            "accelerate",
            marks=[pytest.mark.peers, pytest.mark.filterwarnings("ignore")],
        ),
    ],
)
def test_a_loop_resumes_with_the_next_batch(
    heading: str,
    needed: str,
    model_of: Callable[[dict[str, Any]], torch.nn.Module],
    saved: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the second of three epochs of 12 batches, saved last after 15 batches."""
    needs(needed)
    found = []
    for folder, stops in (("whole", [None]), ("parts", [17, None])):
        Path(folder).mkdir()
        monkeypatch.chdir(folder)
        for stop in stops:
            names, seen = run_loop(heading, stop)
            assert Path(saved).exists()
        found.append((model_of(names).state_dict(), seen))
        monkeypatch.chdir("..")
    (whole, all_seen), (resumed, seen) = found
    assert len(all_seen) == 36
    assert len(seen) == 36 - 15
    assert all(torch.equal(one, other) for one, other in zip(seen, all_seen[15:], strict=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def weights_of_two_processes(script: str) -> None:
    """Runs the script in two processes, which both save their weights, and holds these against each other."""
    Path("train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(f"weights-{rank}.pt") for rank in range(2))
    trained = [name for name in one if "running" not in name]  # each process has statistics of its own
    assert all(torch.equal(one[name], other[name]) for name in trained)


@pytest.mark.slow
def test_several_processes() -> None:
    weights_of_two_processes("\n".join(sections("several-gpus.md").values()))


FRAMEWORKS = """
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import lightning

lightning.Trainer = partial(lightning.Trainer, accelerator="cpu", devices=2, strategy="ddp")
accelerate.Accelerator = partial(accelerate.Accelerator, cpu=True)
seen = []


def cross_entropy(logits, labels):
    seen.append(labels)
    return nn.functional.cross_entropy(logits, labels)


functional = SimpleNamespace(cross_entropy=cross_entropy)
{Lightning}
weights = trainer.lightning_module.model.state_dict()
{accelerate}
rank = os.environ["RANK"]
weights |= {{f"accelerate {{name}}": tensor for name, tensor in model.state_dict().items()}}
torch.save(weights, f"weights-{{rank}}.pt")
torch.save(seen, f"seen-{{rank}}.pt")
"""


@pytest.mark.slow
@pytest.mark.peers
def test_frameworks_in_several_processes() -> None:
    """Each of three epochs is shared out: 6 batches for each process, and the two have each sample once."""
    for package in ("lightning", "accelerate"):
        needs(package)
    weights_of_two_processes(FIRST.replace("range(3)", "range(0)") + FRAMEWORKS.format(**LOOPS))
    shares = [torch.load(f"seen-{rank}.pt") for rank in range(2)]
    assert [len(share) for share in shares] == [2 * 3 * 6] * 2
    with fastmnist.Beton("data/digits-train.beton") as file:
        labels = np.bincount(file.labels)
    for epoch in range(2 * 3):
        together = torch.cat([batch for share in shares for batch in share[6 * epoch : 6 * epoch + 6]])
        assert np.abs(np.bincount(together) - labels).sum() == 1  # 1,437 samples: one of them twice


def test_each_page_with_code_is_tested() -> None:
    with_code = {page.name for page in DOCS.glob("*.md") if "```python" in page.read_text()}
    assert with_code == {"loader.md", "several-gpus.md", "tuning.md", "your-data.md", "your-loop.md"}


def test_other_loaders_names_tests_that_are_there() -> None:
    named = set(re.findall(r"tests/[\w/]+\.py", (DOCS / "other-loaders.md").read_text()))
    assert len(named) > 5
    assert {path for path in named if not (ROOT / path).is_file()} == set()


# Loader


def rows_of(loader: fastmnist.Loader) -> list[int]:
    return torch.cat([chunk.rows for chunk in loader.chunks()]).tolist()


def test_loader() -> None:
    code, names = sections("loader.md"), dict[str, Any]()
    exec(code["Which samples an epoch has"], names)
    exec(code["By weight, or each class alike"], names)
    labels = names["labels"]
    counts = np.bincount(labels[rows_of(names["balanced"])], minlength=10)
    assert counts.sum() == 1000
    assert stats.chisquare(counts).pvalue > 0.001
    drawn = np.bincount(labels[rows_of(names["weighted"])])
    assert drawn[8] > 3 * np.delete(drawn, 8).mean()
    first, second = (rows_of(names["once"]) for _ in range(2))
    assert len(set(first)) == len(first) == 200
    assert set(first) != set(second)
    first, second = (rows_of(names["part"]) for _ in range(2))
    assert len(set(first)) == 256
    assert set(first) != set(second)
    exec(code["An order of your own"], names)
    assert rows_of(names["curriculum"]) == np.argsort(names["brightness"]).tolist()
    exec(code["Samples by number"], names)
    assert names["labels"].tolist() == labels[names["darkest"]].tolist()
    assert names["images"].shape == (8, 1, 28, 28)
    assert len(rows_of(names["loader"])) == (names["brightness"] > np.median(names["brightness"])).sum()
    exec(code["Two views of each image"], names)
    assert names["first"].shape == names["second"].shape == (len(names["labels"]), 1, 28, 28)
    assert not torch.equal(names["first"], names["second"])
    exec(code["Arrays without a file"], names)
    assert_normalised(names["loader"], names["loader"].file.moments)
    assert next(iter(names["loader"]))[0].shape == (128, 3, 32, 32)
    exec(code["Several files"], names)
    rows = np.array(rows_of(names["both"]))
    assert len(rows) == 2000
    assert stats.binomtest(int((rows < 1000).sum()), 2000, 0.7).pvalue > 0.001


# Doctor and tuner


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_doctor_and_tuner_train_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(sections("tuning.md")["Doctor and tuner"], names)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert names["best"].settings["num_workers"] in (0, 1)
    fresh = names["copy"].deepcopy(names["model"])
    assert any(not torch.equal(*pair) for pair in zip(fresh.parameters(), names["trial"].parameters(), strict=True))


def test_a_run_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    exec(sections("tuning.md")["Over a whole run"], names := {})
    assert capsys.readouterr().out.splitlines()[0] == names["watched"].verdict
    assert json.loads(Path("watch.json").read_text())["steps"] == 400


def test_the_table_answers_each_argument() -> None:
    text = (DOCS / "your-loop.md").read_text().partition("## From DataLoader")[2]
    assert [name for name in INSTEAD if name not in text] == []
