"""Numbers as text: counts, seconds, sizes, shares and factors, for terminals, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def number(value: float) -> str:
    """Three significant digits.

    >>> [number(value) for value in (23_600_000, 947_013, 24_310, 12.06, 0.8649)]
    ['23.6 M', '947,000', '24,300', '12.1', '0.865']
    """
    if value >= 999_500:
        return f"{value / 1e6:.3g} M" if value < 999.5e6 else f"{value / 1e6:,.0f} M"
    if value >= 999.5:
        digits = len(str(int(value)))
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.3g}"


def with_interval(found: Mapping[str, Any], write: Callable[[float], str] = number) -> str:
    """The median, and its interval where there is more than one value.

    >>> with_interval({"n": 5, "median": 1.31, "low": 1.2, "high": 1.4})
    '1.31 (1.2 to 1.4)'
    """
    text = write(found["median"])
    return text if found["n"] < 2 else f"{text} ({write(found['low'])} to {write(found['high'])})"


def times(factor: float) -> str:
    """
    >>> times(1.312), times(12_300)
    ('1.31 times', '12,300 times')
    """
    return f"{factor:,.0f} times" if factor >= 99.5 else f"{factor:.3g} times"


def seconds(value: float, digits: int = 2) -> str:
    """`digits` decimals below 10 s, none above.

    >>> seconds(0.7625), seconds(8.04, 1), seconds(1234.5)
    ('0.76 s', '8.0 s', '1,234 s')
    """
    return f"{value:.{digits}f} s" if value < 10 else f"{value:,.0f} s"


def rough_seconds(value: float) -> str:
    """Two significant digits below 10 s.

    >>> rough_seconds(0.0214), rough_seconds(42.4)
    ('0.021 s', '42 s')
    """
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def milliseconds(value: float) -> str:
    """Seconds with three significant digits, below 1 s in milliseconds.

    >>> milliseconds(0.01234), milliseconds(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def duration(value: float) -> str:
    """Seconds as a person says them.

    >>> duration(0.76), duration(42.4), duration(185)
    ('0.8 s', '42 s', '3 min 05 s')
    """
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def megabytes(size: int) -> str:
    """
    >>> megabytes(47_040_000), megabytes(1_536), megabytes(12)
    ('47.0 MB', '1.5 kB', '12 bytes')
    """
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} bytes"


def mebibytes(size: float) -> str:
    """
    >>> mebibytes(5 << 30)
    '5,120 MiB'
    """
    return f"{size / (1 << 20):,.0f} MiB"


def percent(share: float, digits: int = 2) -> str:
    """A share of at most 1 with `digits` decimals; never rounded up to 100.

    >>> percent(0.9914), percent(0.99999), percent(1.0)
    ('99.14 %', '99.99 %', '100 %')
    """
    return "100 %" if share == 1 else f"{min(100 * share, 100 - 10.0**-digits):.{digits}f} %"


def rough_percent(share: float) -> str:
    """Two significant digits, three from 99.5 % on.

    >>> rough_percent(0.0347), rough_percent(0.72), rough_percent(1.234)
    ('3.5 %', '72 %', '123 %')
    """
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def probability(value: float) -> str:
    """One decimal; 100 % and 0 % are kept for the exact values.

    >>> probability(0.98), probability(0.9999), probability(1.0)
    ('98.0 %', '>99.9 %', '100 %')
    """
    if 0.9995 <= value < 1:
        return ">99.9 %"
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{100 * value:.1f} %" if 0 < value < 1 else f"{100 * value:.0f} %"
