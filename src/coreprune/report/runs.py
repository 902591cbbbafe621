"""Several runs on one page: how large each result is, and how good."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coreprune.errors import InputError
from coreprune.report.view import view
from coreprune.report.words import percent, significant

Row = dict[str, Any]


def _certified(page: Row) -> float | None:
    found = page["agreement"]
    return None if found is None or found["bound"] is None or found["vacuous"] else 1 - found["bound"]


# What may stand for quality, the best first: its name, its value, how it is written, and whether more is better.
_QUALITIES: tuple[tuple[str, Callable[[Row], float | None], Callable[[float | None], str], bool], ...] = (
    ("accuracy", lambda page: (page["accuracy"] or {}).get("after"), percent, True),
    ("perplexity", lambda page: (page["perplexity"] or {}).get("after"), significant, False),
    ("same answers, held-back inputs", lambda page: page["held_back"], percent, True),
    ("same answers at least, certified", _certified, percent, True),
)


def compared(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Row:
    """What the page shows of several reports.

    runs: (name, `Report.as_dict()` or the content of report.json) each. Quality is the first of accuracy, perplexity,
        held-back agreement and certified agreement that all runs have; if none is common to all, the one that most
        have, and the others are in the table alone.

    Raises InputError for less than two runs, and for data that is no report.
    """
    if len(runs) < 2:
        raise InputError("a comparison needs two reports or more.")
    pages = [(name, view(data)) for name, data in runs]
    found = [[value(page) for _, page in pages] for _, value, _, _ in _QUALITIES]
    best = max(range(len(found)), key=lambda q: (sum(v is not None for v in found[q]), -q))
    quality, _, written, more = _QUALITIES[best]
    rows = [_row(name, page) for name, page in pages]
    columns = [q for q, values in enumerate(found) if any(v is not None for v in values)]
    for i, row in enumerate(rows):
        row["qualities"] = [_QUALITIES[q][2](found[q][i]) if found[q][i] is not None else "–" for q in columns]
    points = [
        {"name": row["name"], "size": row["share"], "quality": value}
        for row, value in zip(rows, found[best], strict=True)
        if value is not None and row["share"] is not None
    ]
    models = sorted({page["model"] for _, page in pages if page["model"]})
    return {
        "rows": rows,
        "qualities": [_QUALITIES[q][0] for q in columns],
        "quality": quality,
        "better": "above" if more else "below",
        "plot": _plot(points, written) if len(points) > 1 else None,
        "models": models,
    }


def _row(name: str, page: Row) -> Row:
    sizes = {s["name"]: s for s in page["sizes"]}
    macs = sizes.get("MACs") or next(iter(sizes.values()), None)
    return {
        "name": name,
        "model": page["model"],
        "share": macs["share"] if macs else None,
        "sizes": [sizes.get(key) for key in ("MACs", "Parameters", "Bytes")],
        "speed": page["speed"]["sure"][0] if page["speed"] and page["speed"]["sure"] else None,
        "seconds": sum(s["seconds"] for s in page["seconds"]) if page["seconds"] else None,
        "method": dict(page["settings"]).get("method.name") or dict(page["settings"]).get("method", ""),
    }


def _plot(points: list[Row], written: Callable[[float | None], str]) -> Row:
    """Places in a drawing of 100 × 60 units, with marks for the axes. Size starts at zero; quality is enlarged."""
    low, high = min(p["quality"] for p in points), max(p["quality"] for p in points)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    step = _round(high - low)
    wide = max(1.0, *(p["size"] for p in points))

    def place(p: Row) -> Row:
        x, y = 100 * p["size"] / wide, 60 * (high - p["quality"]) / (high - low)
        return {**p, "x": round(x, 2), "y": round(y, 2), "end": x > 65, "said": written(p["quality"])}

    marks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return {
        "points": [place(p) for p in sorted(points, key=lambda p: p["size"])],
        "x": [{"at": 25 * i, "said": percent(wide * i / 4)} for i in range(5)],
        "y": [{"at": round(60 * (high - m) / (high - low), 2), "said": written(m)} for m in marks],
    }


def _round(length: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides a length into four to nine parts."""
    power = 10 ** math.floor(math.log10(length / 4))
    return next(k * power for k in (5, 2, 1) if length / (k * power) >= 4)
