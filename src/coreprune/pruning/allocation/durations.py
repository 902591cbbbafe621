"""Times as text, such as "8ms"."""

from __future__ import annotations

import math
import re

from coreprune.errors import BudgetError

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}  # the micro sign, and the Greek letter
_TEXT = re.compile(r"\s*([0-9.eE+-]+)\s*([a-zµμ]+)\s*")


def seconds_of(text: str) -> float:
    """The seconds that a text such as "8ms", "1.5 s" or "800us" stands for. Raises BudgetError."""
    found = _TEXT.fullmatch(text)
    try:
        seconds = float(found[1]) * _UNITS[found[2]] if found else math.nan
    except (ValueError, KeyError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise BudgetError(
            f"{text!r} is not a time. Write a number and one of the units s, ms and us, e.g. '8ms'; for a share of "
            "the dense model's time, pass a number below 1."
        )
    if seconds <= 0:
        raise BudgetError(f"{text!r} is no time to run in. Give a time above 0, e.g. '8ms'.")
    return seconds


def as_time(seconds: float) -> str:
    """Seconds for people: three digits, and the unit that suits."""
    unit = "s" if seconds >= 1 else "ms" if seconds >= 1e-3 else "us"
    return f"{seconds / _UNITS[unit]:.3g} {unit}"
