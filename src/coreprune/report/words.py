"""The texts of the page: numbers as text, and explanations of theorems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

KINDS = {
    "proved": "True for every input, under the assumptions listed. No data and no chance enter.",
    "sampled": "True with probability at least 1 − δ over the random draws that the assumptions name.",
    "measured": "What was seen on the queries. It says nothing about other inputs.",
}

THEOREMS = {
    "T6": "How far the next layer's outputs can move when this group alone is replaced by its sample, per unit of the "
    "input's norm ‖x‖. The bound holds for all inputs at once; the chance is in the sampling.",
    "T8": "How far the next layer's outputs can move at most when this group alone is pruned, per unit of the input's "
    "norm ‖x‖.",
    "T10": "Error of the linear layers that read the group when they are refitted on the channels that stay, on the "
    "queries, with everything else unpruned. Each error counts by what it does to the network's outputs, to first "
    "order.",
    "T18": "The expected loss of the pruned network on further queries of the same source.",
    "T19": "What the loss of the pruned network is at most, on further inputs from the same source as the samples that "
    "were set aside. The choice among the sizes that were tested is accounted for.",
    "T11": "How often the pruned network's answer differs from the original's, on further queries of the same source.",
}

SCALES = {"T6": "times ‖x‖", "T8": "times ‖x‖", "T10": "weighed", "T11": "share of the queries", "T19": "loss"}

_GAP = "\u00a0"  # between a number and its unit, so that they stay on one line
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(x: float | None) -> str:
    """1234567.0 is written as 1,234,567."""
    return "–" if x is None else f"{x:,.0f}"


def short(x: float | None) -> str:
    """1234567.0 is written as 1.23 M."""
    return "–" if x is None else _scaled(x, (*_STEPS, (1, "")))


def significant(x: float | None) -> str:
    """Three digits. None is written as infinity: it stands for a certificate's bound that is not finite."""
    return "∞" if x is None else f"{x:.3g}"


def percent(share: float | None) -> str:
    """0.1234 is written as 12.3 %, 0.000123 as 0.0123 %, and anything below 0.000001 % as < 0.000001 %."""
    if share is None:
        return "–"
    value = 100 * share
    if 0 < value < 1e-6:
        return f"< 0.000001{_GAP}%"
    if value == 0 or abs(value) >= 1:
        return f"{value:.1f}{_GAP}%"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-") + f"{_GAP}%"


def loss(share: float | None) -> str:
    """0.0213 is written as 2.13 %."""
    return "–" if share is None else f"{100 * share:.2f}{_GAP}%"


def at_most(share: float | None) -> str:
    """A certified upper bound: 0.02951 as 2.96 %. It is rounded up, because 2.95 % is not certified."""
    return "–" if share is None else f"{math.ceil(round(1e4 * share, 6)) / 100:.2f}{_GAP}%"


def at_least(share: float) -> str:
    """A certified lower bound: 0.8948 as 89.4 %. It is rounded down, because 89.5 % is not certified."""
    return f"{math.floor(1000 * share) / 10:.1f}{_GAP}%"


def seconds(x: float | None) -> str:
    """0.0123 is written as 12.3 ms."""
    return "–" if x is None else _scaled(x, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def duration(x: float | None) -> str:
    """Seconds up to two minutes, then minutes, then hours: 0.5 s, 90 s, 12 min, 3.2 h."""
    if x is None or x < 120:
        return seconds(x)
    return f"{x / 60:.0f}{_GAP}min" if x < 7200 else f"{x / 3600:.1f}{_GAP}h"


def _scaled(x: float, steps: Sequence[tuple[float, str]]) -> str:
    """Three digits, in the largest unit in which the number is at least 1, or in the last unit."""
    x = float(f"{x:.3g}")
    size, unit = next((step for step in steps if abs(x) >= step[0]), steps[-1])
    digits = f"{x / size:.3g}" if abs(x) < 1000 * size else f"{x / size:,.0f}"
    return f"{digits}{_GAP}{unit}" if unit else digits
