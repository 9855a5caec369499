"""HTML report of a run: one self-contained file, without network or script."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from fastmnist.files import write_bytes
from fastmnist.system.numbers import percent

TEMPLATE = "report.html.jinja"
MISSING = "\u2013"  # an en dash, for a missing value
CLOCKS = (
    ("data_seconds", "preparing data"),
    ("compile_seconds", "compiling"),
    ("train_seconds", "training"),
    ("evaluate_seconds", "evaluating"),
)
# Title, alternative text and caption of each picture, in order.
CAPTIONS = {
    "curves": (
        "Learning curves",
        "Line charts of loss, error, learning rate and images per second over the optimizer steps",
        "Lower is better in the upper two panels. Training figures are means over each epoch, on augmented images and "
        "with label smoothing, so they lie above validation; a validation curve that rises is a sign of overfitting.",
    ),
    "watch": (
        "Where the time went",
        "Timeline of a step's waiting and computing, with the longest stalls, and of the memory below",
        "Each step waits for its batch, then computes. Memory that rises to the end will be full one day.",
    ),
    "confusion": (
        "Which classes are mixed up",
        "Confusion matrix, true classes in rows and predicted ones in columns",
        "Each row is a true class and each column an answer: the grey diagonal counts right answers, and the "
        "darker a cell beside it, the more often that mistake was made.",
    ),
    "predictions": (
        "Worst mistakes and a sample of right answers",
        "Test images with their true class, the model's answer and its probability",
        "The mistakes come first, most confidently wrong on top. Would you have read them right?",
    ),
}


class Segment(NamedTuple):
    """One part of the bar of clocks; `start` and `share` are per cent of the bar."""

    name: str
    key: str
    seconds: str
    start: float
    share: float


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
) -> None:
    """Writes the report; a value that is missing or no number becomes a dash or is left out.

    Args:
        path: the HTML file to write.
        summary: content of summary.json; any key may be missing.
        config: the settings; nested ones are shown with dots.
        records: lines of metrics.jsonl; the "epoch" records make the table.
        pictures: PNG files by name: "curves", "confusion", "predictions"; any may be missing.

    Raises:
        FastmnistError: the file cannot be written.
        OSError: a picture cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("fastmnist.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        headline=_headline(summary),
        dataset=str(summary.get("dataset") or "unknown data"),
        interrupted=bool(summary.get("interrupted")),
        subtitle=_subtitle(summary),
        data_note=str(summary.get("data_note") or ""),
        cards=_cards(summary),
        clocks=_clocks(summary),
        total=_seconds(summary.get("total_seconds")),
        pictures=_pictures(pictures),
        epochs=[_epoch_row(record) for record in records if record.get("kind") == "epoch"],
        settings=[(key, _text(value)) for key, value in _flat(config)],
        machine=_machine(summary),
    )
    # A lone surrogate, as in an undecodable file name, must not cost the report.
    write_bytes(path, page.encode("utf-8", errors="replace"))


def _number(value: object) -> float | None:
    """A finite number, or None for anything else, numeric text included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _share(value: object) -> str:
    """A share as per cent with two decimals, never rounded up to 100."""
    number = _number(value)
    if number is None:
        return MISSING
    return percent(number)


def _seconds(value: object) -> str:
    number = _number(value)
    if number is None:
        return MISSING
    if number < 10:
        return f"{number:.2f} s"
    return f"{number:.1f} s" if number < 100 else f"{number:,.0f} s"


def _count(value: object) -> str:
    number = _number(value)
    return MISSING if number is None else f"{number:,.0f}"


def _loss(value: object) -> str:
    number = _number(value)
    return MISSING if number is None else f"{number:.4f}"


def _subtitle(summary: Mapping[str, Any]) -> str:
    done = _number(summary.get("epochs_done"))
    epochs = "" if done is None else f"{done:,.3g} epoch{'s' if done != 1 else ''}"
    return ", ".join(part for part in ("fastmnist", epochs, _date(summary.get("date"))) if part)


def _date(value: object) -> str:
    """A date in ISO 8601 to the minute; any other text as it is."""
    text = str(value or "")
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return text


def _headline(summary: Mapping[str, Any]) -> str:
    for key, name in (("test_accuracy", "test"), ("val_accuracy", "validation")):
        if _number(summary.get(key)) is not None:
            return f"{_share(summary[key])} {name} accuracy"
    return "A run without a measured accuracy"


def _cards(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("test accuracy", _share(summary.get("test_accuracy"))),
        ("validation accuracy", _share(summary.get("val_accuracy"))),
        ("training time", _seconds(summary.get("train_seconds"))),
        ("images per second", _count(summary.get("images_per_second"))),
    ]


def _clocks(summary: Mapping[str, Any]) -> list[Segment]:
    """The known parts of the total time that are not zero; "other" is the rest."""
    parts = [(name, key, max(0.0, _number(summary.get(key)) or 0.0)) for key, name in CLOCKS]
    known = sum(seconds for _, _, seconds in parts)
    total = max(known, _number(summary.get("total_seconds")) or 0.0)
    parts.append(("other", "other", total - known))
    segments, start = [], 0.0
    for name, key, seconds in parts:
        if seconds > 0:
            share = 100 * seconds / total
            segments.append(Segment(name, key.removesuffix("_seconds"), _seconds(seconds), start, share))
            start += share
    return segments


def _pictures(pictures: Mapping[str, Path]) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "title": title,
            "alt": alt,
            "caption": caption,
            "data": base64.b64encode(Path(pictures[name]).read_bytes()).decode("ascii"),
        }
        for name, (title, alt, caption) in CAPTIONS.items()
        if name in pictures
    ]


def _epoch_row(record: Mapping[str, Any]) -> list[str]:
    epoch = _number(record.get("epoch"))
    return [
        MISSING if epoch is None else f"{epoch + 1:.0f}",
        _count(record.get("step")),
        _loss(record.get("train_loss")),
        _share(record.get("train_accuracy")),
        _loss(record.get("val_loss")),
        _share(record.get("val_accuracy")),
        _seconds(record.get("seconds")),
        _count(record.get("images_per_second")),
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: object) -> str:
    """A setting as config.yaml would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(_text(item) for item in value) if isinstance(value, (list, tuple)) else str(value)


def _machine(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model size, seed, device, hardware and versions of the run."""
    rows = []
    if _number(summary.get("parameters")) is not None:
        rows.append(("parameters", _count(summary["parameters"])))
    for key, name in (
        ("seed", "seed"),
        ("device", "device"),
        ("amp", "mixed precision"),
        ("compile", "torch.compile"),
    ):
        if summary.get(key) is not None:
            rows.append((name, _text(summary[key])))
    for key in ("hardware", "versions"):
        value = summary.get(key)
        if isinstance(value, Mapping):
            suffix = " version" if key == "versions" else ""
            rows += [(f"{name}{suffix}", _text(item)) for name, item in _flat(value)]
        elif value:
            rows.append((key, _text(value)))
    return rows
