"""Numbers as text, where rounding changes their digits; the functions' examples show the rest."""

from __future__ import annotations

import pytest

from fastmnist.system.numbers import duration, number, percent, probability


@pytest.mark.parametrize(
    ("value", "text"),
    [(23_600_000, "23.6 M"), (946_400, "946,000"), (999_400, "999,000"), (24_349, "24,300"), (1088, "1,090"),
     (999.4, "999"), (12.14, "12.1"), (0.8567, "0.857"), (64_000_000_000, "64,000 M")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.84, "0.8 s"), (185, "3 min 05 s"), (59.7, "1 min 00 s")])
def test_a_duration_never_has_sixty_seconds(value: float, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize("digits", [0, 1, 2])
def test_only_everything_is_100_percent(digits: int) -> None:
    almost = 1 - 1e-9
    assert percent(1, digits) == probability(1) == "100 %"
    assert "100" not in percent(almost, digits)
    assert "100" not in probability(almost)
    assert not probability(1e-9).startswith("0")
