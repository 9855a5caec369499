"""The report: one file, complete, and safe whatever the names in it."""

import base64
import io
import os
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmnist.errors import FastmnistError
from fastmnist.report.html import write_report

SUMMARY = {
    "test_accuracy": 0.9931, "val_accuracy": 0.9924, "train_seconds": 182.3, "compile_seconds": 31.2,
    "data_seconds": 4.3, "evaluate_seconds": 6.8, "total_seconds": 231.9, "images_per_second": 987.3,
    "device": "cpu", "amp": "bfloat16", "compile": "default", "dataset": "mnist", "data_note": "", "seed": 7,
    "versions": {"python": "3.11.7", "torch": "2.9.1"}, "parameters": 123456,
    "hardware": {"processor": "Some CPU", "cores": 2}, "interrupted": False, "epochs_done": 3,
    "date": "2026-11-23T04:31:00+00:00",
}  # fmt: skip
CONFIG = {"dataset": "mnist", "epochs": 3, "out": None, "quiet": False, "augment": {"shift": 2}}
RECORDS = [
    {"kind": "step", "step": 5, "epoch": 0, "loss": 1.0},
    {"kind": "epoch", "epoch": 0, "step": 234, "train_loss": 0.12345, "train_accuracy": 0.96, "val_loss": None,
     "seconds": 61.5, "images_per_second": 974.0},
    {"kind": "epoch", "epoch": 1, "step": 468, "train_loss": 0.05, "train_accuracy": 0.985, "val_loss": 0.04,
     "val_accuracy": 0.9876, "seconds": 120.0, "images_per_second": 1001.4},
]  # fmt: skip
DASH = "\u2013"  # what stands for a missing value
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, its text, and whether all tags are closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def report(folder, summary=SUMMARY, config=CONFIG, records=RECORDS, pictures=None):
    path = folder / "report.html"
    write_report(path, summary=summary, config=config, records=records, pictures=pictures or {})
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    return page


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    found = {}
    for width, name in enumerate(("curves", "confusion", "predictions"), start=10):
        found[name] = folder / f"{name}.png"
        Image.new("RGB", (width, 5), "red").save(found[name])
    return found


def test_everything_is_shown(tmp_path, pictures):
    page = report(tmp_path, pictures=pictures)
    for words in (
        "99.31 % test accuracy on mnist", "99.24 %", "182 s", "images per second 987", "3 epochs",
        "2026-11-23 04:31", "preparing data 4.30 s 2 %", "compiling 31.2 s 13 %", "training 182 s 79 %",
        "evaluating 6.80 s 3 %", "other 7.30 s 3 %", f"1 234 0.1235 96.00 % {DASH} {DASH} 61.5 s 974",
        "2 468 0.0500 98.50 % 0.0400 98.76 % 120 s 1,001", "augment.shift 2", "out null", "quiet false",
        "parameters 123,456", "seed 7", "mixed precision bfloat16", "processor Some CPU", "torch version 2.9.1",
        "fastmnist train --config config.yaml",
    ):  # fmt: skip
        assert words in page.text
    assert "interrupted" not in page.text
    assert "--resume" not in page.text
    assert page.all("html") == [{"lang": "en"}]
    title = page.words[next(i for i, word in enumerate(page.words) if word.startswith("mnist: 99.31 %"))]
    assert title.startswith("mnist: 99.31 % test accuracy")


def test_bar_of_clocks_is_full(tmp_path):
    page = report(tmp_path)
    bar = [r for r in page.all("rect") if "x" in r]
    assert [r["class"] for r in bar] == [f"fill-{n}" for n in ("data", "compile", "train", "evaluate", "other")]
    assert sum(float(r["width"]) for r in bar) == pytest.approx(100, abs=0.01)
    assert float(bar[2]["x"]) == pytest.approx(float(bar[0]["width"]) + float(bar[1]["width"]), abs=0.01)
    assert float(bar[2]["width"]) == pytest.approx(100 * 182.3 / 231.9, abs=0.01)


def test_bar_when_the_parts_exceed_the_total(tmp_path):
    page = report(tmp_path, summary={"train_seconds": 30.0, "data_seconds": 10.0, "total_seconds": 20.0})
    bar = [r for r in page.all("rect") if "x" in r]
    assert [float(r["width"]) for r in bar] == [25, 75]
    assert "other" not in page.text


def test_pictures_are_embedded_in_order(tmp_path, pictures):
    page = report(tmp_path, pictures={name: pictures[name] for name in reversed(pictures)})
    images = page.all("img")
    assert [image["class"] for image in images] == ["curves", "confusion", "predictions"]
    for width, image in enumerate(images, start=10):
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            assert picture.size == (width, 5)
        assert len(image["alt"]) > 20
    assert len(page.all("figcaption")) == 3


def test_missing_pictures_are_left_out(tmp_path, pictures):
    page = report(tmp_path, pictures={"confusion": pictures["confusion"]})
    assert [image["class"] for image in page.all("img")] == ["confusion"]
    assert "Learning curves" not in page.text


def test_nothing_is_fetched_and_nothing_runs(tmp_path, pictures):
    page = report(tmp_path, pictures=pictures)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source
    assert any(m.get("name") == "viewport" for m in page.all("meta"))


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "\"'><img src=x onerror=y>", "{{ 7 * 7 }}", "&lt;"])
def test_hostile_text_stays_text(tmp_path, hostile):
    summary = dict.fromkeys(SUMMARY, hostile) | {"versions": {hostile: hostile}, "hardware": hostile}
    page = report(tmp_path, summary=summary, config={hostile: {hostile: [hostile]}}, records=[{"kind": hostile}])
    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count(" ".join(hostile.split())) >= 5
    assert "49" not in page.text


@pytest.mark.parametrize("key", SUMMARY)
def test_any_key_may_be_missing_or_none(tmp_path, key):
    summary = {name: value for name, value in SUMMARY.items() if name != key}
    shown = report(tmp_path, summary=summary).text
    assert "Undefined" not in shown
    assert report(tmp_path, summary=summary | {key: None}).text == shown


def test_empty_report(tmp_path):
    page = report(tmp_path, summary={}, config={}, records=[])
    assert "A run without a measured accuracy on unknown data" in page.text
    assert not page.all("table")
    assert not page.all("rect")
    assert f"{DASH} epochs" not in page.text
    assert "fastmnist train --config config.yaml" in page.text


def test_validation_is_the_headline_without_a_test(tmp_path):
    page = report(tmp_path, summary=SUMMARY | {"test_accuracy": None, "interrupted": True, "epochs_done": 1})
    assert "99.24 % validation accuracy on mnist" in page.text
    assert "This run was interrupted" in page.text
    assert "1 epoch," in page.text
    assert "fastmnist train --resume ." in page.text


@pytest.mark.parametrize(("share", "text"), [(1.0, "100 %"), (0.99999, "99.99 %"), (0, "0.00 %"), (True, DASH)])
def test_accuracy_is_never_rounded_up_to_all(tmp_path, share, text):
    page = report(tmp_path, summary={"test_accuracy": share})
    assert f"test accuracy {text}" in page.text


def test_data_note_and_plain_hardware(tmp_path):
    page = report(tmp_path, summary=SUMMARY | {"data_note": "digits were used & more", "hardware": "one GPU"})
    assert "digits were used & more" in page.text
    assert "hardware one GPU" in page.text


@settings(max_examples=25, deadline=None)
@given(
    summary=st.dictionaries(
        st.sampled_from(sorted(SUMMARY)),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    ),
    config=st.dictionaries(
        st.text(max_size=8),
        st.recursive(st.none() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)),
    ),
    records=st.lists(
        st.fixed_dictionaries(
            {"kind": st.just("epoch")},
            optional={
                "epoch": st.integers(0, 99),
                "val_loss": st.none() | st.floats(),
                "step": st.text(max_size=3),
            },
        ),
        max_size=3,
    ),
)
def test_any_values_give_a_whole_page(tmp_path_factory, summary, config, records):
    page = report(tmp_path_factory.getbasetemp(), summary, config, records)
    assert len(page.all("tr")) >= len(records)


def test_same_input_gives_the_same_bytes_and_failure_leaves_nothing(tmp_path, monkeypatch):
    report(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(FastmnistError, match="No space left"):
            report(tmp_path, summary={})
    assert (tmp_path / "report.html").read_bytes() == first
    assert os.listdir(tmp_path) == ["report.html"]
