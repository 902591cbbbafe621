"""Turn the plain values of a report into the content of the page: one dict for the template and the charts."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from coreprune.errors import InputError
from coreprune.report import words
from coreprune.report.ribbon import ribbon

Row = dict[str, Any]

_POINTS = 64  # about this many points of an error curve are on the page; report.json has all
_DECADES = 1e-6  # times the largest error; curves are not shown below that


def view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything on the page. If a key is absent from `data`, its part of the page is left out.

    Raises InputError if `data` is not the dict of a report.
    """
    _mapping(data, "the report")
    settings = _mapping(data.get("settings") or {}, "settings")
    groups = [_group(g, i) for i, g in enumerate(_rows(data, "groups"))]
    _cut_curves(groups)
    found = [
        _certificate(c, g["name"], g["number"])
        for g, raw in zip(groups, _rows(data, "groups"), strict=True)
        for c in _rows(raw, "certificates")
    ]
    agreement = _of_the_whole(data.get("agreement"))
    certain = agreement or _of_the_whole(_mapping(data.get("path") or {}, "path").get("certificate"))
    return {
        "model": str(data.get("model") or ""),
        "notes": [str(note) for note in data.get("notes") or ()],
        "sizes": _sizes(data),
        "latency": (latency := _latency(data)),
        "speed": _speed(latency["rows"] if latency else []),
        "met": _met(data),
        "accuracy": _accuracy(data),
        "perplexity": _perplexity(data),
        "groups": groups,
        "ribbon": ribbon(groups),
        "held_back": _held_back(data),
        "path": _path(data),
        "refits": [_refit(f, i) for i, f in enumerate(_rows(data, "refits"))],
        "agreement": agreement,
        "certain": certain,
        "certificates": _by_kind(found + ([certain] if certain else [])),
        "bounds": _bounds(found),
        "locked": _locked(groups),
        "independent": _independent(_rows(data, "groups")),
        "queries": str(data.get("queries") or ""),
        "artifact": _artifact(data),
        "call": str(data.get("call") or ""),
        "settings": _plain({**settings, "versions": data.get("versions") or {}}),
        "seconds": _seconds(_mapping(data.get("seconds") or {}, "seconds")),
        "peak": _peak(data),
    }


def _sizes(data: Mapping[str, Any]) -> list[Row]:
    found = []
    for key, name in (("parameters", "Parameters"), ("macs", "MACs"), ("bytes", "Bytes")):
        pair = _mapping(data.get(key) or {}, key)
        before, after = _number(pair.get("before")), _number(pair.get("after"))
        if before is not None and after is not None:
            share = after / before if before else 1.0
            found.append({"name": name, "before": before, "after": after, "share": share})
    return found


def _artifact(data: Mapping[str, Any]) -> Row | None:
    raw = _mapping(data.get("artifact") or {}, "artifact")
    return {key: str(raw.get(key) or "") for key in ("loads_with", "why")} if any(raw.values()) else None


def _latency(data: Mapping[str, Any]) -> Row | None:
    raw = _mapping(data.get("latency") or {}, "latency")
    rows = []
    for row in _rows(raw, "rows"):
        times = {
            when: {at: _number(_mapping(row.get(when) or {}, when).get(at)) for at in ("median", "low", "high")}
            for when in ("before", "after")
        }
        speedup = _number(row.get("speedup"))
        rows.append({"batch": _number(row.get("batch")), **times, "speedup": speedup, "overlap": _overlap(**times)})
    if not rows:
        return None
    about = {k: str(raw.get(k) or "") for k in ("device", "threads", "note")}
    return {"rows": rows, **about}


def _overlap(before: Row, after: Row) -> bool:
    """Whether the ranges between the quartiles overlap, so that the difference may be noise."""
    ends = (before["low"], after["high"], after["low"], before["high"])
    return None not in ends and ends[0] <= ends[1] and ends[2] <= ends[3]


def _met(data: Mapping[str, Any]) -> Row | None:
    """How a budget of time was met."""
    raw = _mapping(data.get("latency_budget") or {}, "latency_budget")
    found = {
        k: _number(raw.get(k)) for k in ("limit", "before", "after", "predicted", "corrections", "batch", "threads")
    }
    return None if None in found.values() else {**found, **{k: str(raw.get(k) or "") for k in ("runtime", "device")}}


def _speed(rows: Sequence[Row]) -> Row | None:
    """The rows for the headline: differences that may be noise are none. None if nothing was measured."""
    known = [row for row in rows if row["speedup"] is not None]
    return (
        {"sure": [r for r in known if not r["overlap"]], "noise": [r for r in known if r["overlap"]]} if known else None
    )


def _held_back(data: Mapping[str, Any]) -> float | None:
    """The share of the queries that were held back on which the result gives the same class."""
    chosen = [row for row in _rows(data, "compared") if row.get("chosen")]
    return _number(chosen[0].get("agreement")) if chosen else None


def _path(data: Mapping[str, Any]) -> Row | None:
    """What a budget of risk has tested, from the largest model on."""
    raw = _mapping(data.get("path") or {}, "path")
    numbers = ("share", "macs", "parameters", "risk", "bound")
    steps = [{**{k: _number(s.get(k)) for k in numbers}, "passed": bool(s.get("passed"))} for s in _rows(raw, "steps")]
    if not any(s["passed"] for s in steps):
        return None
    last = [s for s in steps if s["passed"]][-1]
    known = {k: _number(raw.get(k)) for k in ("level", "delta", "samples")}
    budget = _mapping(_mapping(data.get("settings") or {}, "settings").get("budget") or {}, "settings.budget")
    return {
        **known,
        "asked": str(raw.get("asked") or ""),
        "metric": budget.get("metric") is not None,
        "steps": [{**s, "chosen": s is last} for s in steps],
        "next_one": None if steps[-1]["passed"] else steps[-1],
    }


def _accuracy(data: Mapping[str, Any]) -> Row | None:
    raw = _mapping(data.get("accuracy") or {}, "accuracy")
    found = {k: _number(raw.get(k)) for k in ("before", "after", "samples")}
    return found if found["before"] is not None and found["after"] is not None else None


def _perplexity(data: Mapping[str, Any]) -> Row | None:
    raw = _mapping(data.get("perplexity") or {}, "perplexity")
    found = {k: _number(raw.get(k)) for k in ("before", "after", "same", "tokens")}
    return {**found, "text": str(raw.get("text") or "")} if None not in found.values() else None


def _group(raw: Mapping[str, Any], i: int) -> Row:
    channels, kept = (_number(raw.get(k)) or 0 for k in ("channels", "kept"))
    macs = raw.get("macs")
    pair = [_number(x) for x in macs] if isinstance(macs, Sequence) and len(macs) == 2 else [None, None]
    errors = [_number(x) for x in raw.get("held_out") or raw.get("errors") or ()]
    chosen = round(kept * (len(errors) - 1) / channels) if len(errors) > 1 and channels else None
    return {
        "number": i + 1,
        "name": str(raw.get("name", f"group {i + 1}")),
        "channels": channels,
        "kept": kept,
        "share": kept / channels if channels else 1.0,
        "unit": _number(raw.get("unit")) or 1,
        "macs": pair,
        "note": str(raw.get("note") or ""),
        "locked": str(raw["locked_because"]) if raw.get("locked_because") else None,
        "error": errors[chosen] if chosen is not None else None,
        "curve": _curve(errors, chosen) if chosen is not None else None,
    }


def _curve(errors: list[float | None], chosen: int) -> list[list[float]]:
    """Some of the points (share kept in percent, error) of a curve, including the chosen one."""
    last = len(errors) - 1
    at = {round(last * i / _POINTS) for i in range(_POINTS + 1)} | {chosen}
    points = [(i, errors[i]) for i in sorted(at)]
    return [[round(100 * i / last, 3), float(f"{y:.4g}")] for i, y in points if y is not None]


def _cut_curves(groups: list[Row]) -> None:
    """Leave out points far below all others: a logarithmic axis cannot show the error zero at full width."""
    ys = [y for g in groups for _, y in g["curve"] or ()]
    chosen = [g["error"] for g in groups if g["error"] is not None and g["error"] > 0]
    floor = max(ys, default=0.0) * _DECADES
    if chosen:
        floor = min(floor, *chosen)
    for g in groups:
        if g["curve"] is not None:
            g["curve"] = [[x, y] for x, y in g["curve"] if y > 0 and y >= floor]


def _refit(raw: Mapping[str, Any], i: int) -> Row:
    before, after = _number(raw.get("before")), _number(raw.get("after"))
    return {
        "number": i + 1,
        "name": str(raw.get("weight", "")),
        "before": before,
        "after": after,
        "joined": bool(raw.get("joined")),
    }


def _certificate(raw: Any, about: str, number: int | None) -> Row:
    raw = _mapping(raw, "a certificate")
    bound, trivial = _number(raw.get("bound")), _number(raw.get("trivial"))
    return {
        "about": about,
        "number": number,
        "theorem": str(raw.get("theorem", "")),
        "kind": str(raw.get("kind", "measured")),
        "bound": bound,
        "trivial": trivial,
        "ratio": bound / trivial if bound is not None and trivial else None,
        "vacuous": bool(raw.get("vacuous")),
        "statement": str(raw.get("statement", "")),
        "assumptions": [str(a) for a in raw.get("assumptions") or ()],
        "delta": _number(raw.get("delta")),
    }


def _of_the_whole(raw: Any) -> Row | None:
    return _certificate(raw, "the whole model", None) if raw else None


def _by_kind(found: list[Row]) -> list[Row]:
    """Certificates by kind and theorem. What all rows have in common is said once; the rest stays with its row."""
    kinds = []
    for kind, meaning in words.KINDS.items():
        theorems: dict[str, list[Row]] = defaultdict(list)
        for c in found:
            if c["kind"] == kind:
                theorems[c["theorem"]].append(c)
        parts = []
        for theorem, rows in theorems.items():
            shared = [a for a in rows[0]["assumptions"] if all(a in row["assumptions"] for row in rows)]
            same = len({row["statement"] for row in rows}) == 1
            for row in rows:
                own = [a for a in row["assumptions"] if a not in shared]
                row["own"] = "; ".join(([] if same else [row["statement"]]) + own)
            parts.append(
                {
                    "theorem": theorem,
                    "meaning": words.THEOREMS.get(theorem, ""),
                    "scale": words.SCALES.get(theorem, ""),
                    "statement": rows[0]["statement"] if same else "",
                    "assumptions": shared,
                    "delta": rows[0]["delta"],
                    "rows": rows,
                    "vacuous": sum(row["vacuous"] for row in rows),
                    "own": any(row["own"] for row in rows),
                }
            )
        kinds.append({"kind": kind, "meaning": meaning, "theorems": parts})
    return kinds


def _bounds(found: list[Row]) -> Row:
    """For the chart, bounds by theorem, as multiples of what a constant answer achieves."""
    series: dict[str, list[list[Any]]] = defaultdict(list)
    for c in found:
        if c["ratio"] is not None and c["ratio"] > 0 and c["number"] is not None:
            series[f"{c['theorem']}, {c['kind']}"].append([c["number"], float(f"{c['ratio']:.4g}"), c["about"]])
    return dict(sorted(series.items()))


def _locked(groups: list[Row]) -> list[Row]:
    by_reason: dict[str, list[Row]] = defaultdict(list)
    for g in groups:
        if g["locked"]:
            by_reason[g["locked"]].append(g)
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return [{"reason": reason, "groups": members} for reason, members in ordered]


def _independent(groups: list[Mapping[str, Any]]) -> Row | None:
    """T7: in how many of the layers that it applies to no relative guarantee can exist."""
    rows = [(_number(g.get("channels")), _number(g.get("rank"))) for g in groups]
    known = [(n, r) for n, r in rows if n is not None and r is not None]
    return {"of": len(known), "without": sum(n <= r for n, r in known)} if known else None


def _seconds(raw: Mapping[str, Any]) -> list[Row]:
    found = [(str(k), _number(v)) for k, v in raw.items()]
    return [{"phase": k, "seconds": v} for k, v in found if v is not None]


def _peak(data: Mapping[str, Any]) -> float | None:
    """The most bytes that the process held while it ran."""
    peaks = _mapping(_mapping(data.get("memory") or {}, "memory").get("peaks") or {}, "peaks")
    return max(filter(None, map(_number, peaks.values())), default=None)


def _plain(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings as rows of text; the names of nested ones have a dot."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}.{k}", _text(v)) for k, v in value.items() if v is not None]
        elif value is not None:
            rows.append((str(key), _text(value)))
    return rows


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def summary(page: Mapping[str, Any]) -> str:
    """The numbers of the charts in one sentence, for readers who cannot see the charts."""
    parts = [
        f"{s['name']} from {words.count(s['before'])} to {words.count(s['after'])} ({words.percent(s['share'])} left)"
        for s in page["sizes"]
    ]
    errors = [g["error"] for g in page["groups"] if g["error"] is not None]
    if errors:
        parts.append(f"median predicted error of a group {words.percent(statistics.median(errors))}")
    return "; ".join(parts)


def _number(x: Any) -> float | None:
    """A finite number, or None."""
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else None


def _mapping(x: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(x, Mapping):
        raise InputError(f"{what} must be an object with named values, as in report.json, not {type(x).__name__}.")
    return x


def _rows(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = data.get(key) or []
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise InputError(f"{key} must be a list, as in report.json, not {type(rows).__name__}.")
    return [_mapping(row, f"{key}[{i}]") for i, row in enumerate(rows)]
