"""A report in a terminal and in a notebook: sizes, evidence, and one line per group."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from coreprune._patterns import shortened
from coreprune._shown import html_table
from coreprune.pruning.allocation.durations import as_time

Data = Mapping[str, Any]

_LONGEST = 24  # a terminal shows up to this many groups
_OPEN = 12  # a notebook shows up to this many groups unfolded
_HEAD = ("group", "channels", "kept", "refit error", "on unseen queries", "bound for every input")
_WEIGHED = "errors: of the layers that read the group, weighed by their effect on the outputs; 100 % is a constant's"
_COVERS = "covers further inputs from that source; not other inputs, and not whether an answer is right"


def as_text(report: Data) -> str:
    """Aligned lines, about forty at most. report: the dict of a `Report`."""
    sizes = [(name, f"{b:,}", f"{a:,}", _share(b, a)) for name, b, a in _sizes(report)]
    wide = [max(len(row[i]) for row in sizes) for i in (1, 2)]
    lines = [f"{name:<10} {b:>{wide[0]}} → {a:>{wide[1]}}  ({share})" for name, b, a, share in sizes]
    lines += [f"{'note':<10} {note}" for note in report.get("notes", ())]
    lines += [f"{name:<10} {told}" for name, told in _evidence(report)]
    free = [g for g in report["groups"] if not g["locked_because"]]
    rows = [_row(g) for g in free[:_LONGEST]]
    if rows:
        columns = [i for i in range(len(_HEAD)) if any(row[i] for row in rows)]
        width = {i: max(len(row[i]) for row in [_HEAD, *rows]) for i in columns}
        lines.append("")
        for row in [_HEAD, *rows]:
            cells = (f"{row[i]:<{width[i]}}" if i in (0, 5) else f"{row[i]:>{width[i]}}" for i in columns)
            lines.append("  ".join(cells).rstrip())
        lines += [_WEIGHED] if 3 in columns else []
    if len(free) > _LONGEST:
        lines.append(f"… and {len(free) - _LONGEST} more (report.groups)")
    if _locked(report):
        lines.append("")
        lines += [f"whole: {shortened(names)}: {reason}" for reason, names in _locked(report)]
    return "\n".join(lines)


def as_html(report: Data) -> str:
    """Static HTML without scripts, in the colours of the page around it. report: the dict of a `Report`."""
    sizes = [(name, f"{b:,}", f"{a:,}", _share(b, a)) for name, b, a in _sizes(report)]
    notes = [("note", note) for note in report.get("notes", ())]
    told = "".join(f"<p><b>{escape(name)}</b> {escape(text)}</p>" for name, text in [*notes, *_evidence(report)])
    free = [g for g in report["groups"] if not g["locked_because"]]
    rows = [_row(g) for g in free]
    groups = html_table(_HEAD, rows, "groups that may shrink", (0, 5)) + (
        f"<p>{_WEIGHED}</p>" if any(r[3] for r in rows) else ""
    )
    whole = "".join(f"<li>{escape(shortened(names))}: {escape(reason)}</li>" for reason, names in _locked(report))
    shown, name = " open" if len(free) <= _OPEN else "", report["model"] or "model"
    locked = _count(len(report["groups"]) - len(free), "group")
    return (
        f"<div><b>{escape(name)}</b>, pruned"
        + html_table(("", "before", "after", "left"), sizes, "sizes before and after")
        + told
        + f"<details{shown}><summary>{_count(len(free), 'group')} that may shrink</summary>{groups}</details>"
        + f"<details><summary>{locked} left whole</summary><ul>{whole}</ul></details></div>"
    )


def _sizes(report: Data) -> list[tuple[str, int, int]]:
    names = (("parameters", "parameters"), ("MACs", "macs"), ("bytes", "bytes"))
    return [(shown, report[key]["before"], report[key]["after"]) for shown, key in names]


def _evidence(report: Data) -> list[tuple[str, str]]:
    """How good the result is, what that statement covers, and which queries it comes from."""
    told = []
    if met := report.get("latency_budget"):
        told.append(("latency", latency_said(met)))
    path = report.get("path")
    if path and report["agreement"] is None:
        told.append(("loss", f"{path['certificate']['statement']}, with confidence {1 - path['delta']:.0%}"))
    if (agreement := report["agreement"]) is not None:
        sure = f"with confidence {1 - (agreement['delta'] or 0):.0%}"
        vacuous = "; no better than a constant answer" if agreement["vacuous"] else ""
        told.append(("agreement", f"{agreement['statement']}, {sure}{vacuous}"))
        told.append(("", _COVERS))
    if path:
        told.append(("tested", _tested(path)))
    if refits := report["refits"]:
        layers = _count(len(refits), "layer")
        told.append(("repair", f"{layers}; median error {_medians(refits)} of the output's variance"))
    if blocks := report.get("descended"):
        left = sum(not block["changed"] for block in blocks)
        kept = f"; {left} left as they were" if left else ""
        count = _count(len(blocks), "block")
        told.append(("descent", f"{count}; median held-out error {_medians(blocks)}{kept}"))
    if compared := report.get("compared"):
        told.append(("compared", _compared(compared)))
    if report["queries"]:
        told.append(("queries", report["queries"]))
    return told


def latency_said(met: Data) -> str:
    """How a budget of time was met, in one line. met: the dict of a `MetLatency`."""
    before, after, predicted, limit = (as_time(met[key]) for key in ("before", "after", "predicted", "limit"))
    runs = f"batch {met['batch']}, {met['runtime']}, {met['device']}, {_count(met['threads'], 'thread')}"
    corrected = _count(met["corrections"], "correction")
    return f"{before} → {after} a call ({runs}); limit {limit}, predicted {predicted}, {corrected}"


def _medians(rows: Sequence[Data]) -> str:
    """The medians of the errors before and after. An error that is not finite is None, and larger than any other."""
    found = (statistics.median(math.inf if row[at] is None else row[at] for row in rows) for at in ("before", "after"))
    return " → ".join(f"{x:.2%}" if math.isfinite(x) else "not finite" for x in found)


def _tested(path: Data) -> str:
    """Which sizes a budget of risk has tested, and why not the next smaller one."""
    steps = path["steps"]
    chosen = [s for s in steps if s["passed"]][-1]
    text = f"{path['asked']}: {_count(len(steps), 'model')} on {path['samples']:,} samples that were set aside; "
    text += f"returned: {chosen['macs']:,} MACs (loss {chosen['risk']:.2%}, at most {chosen['bound']:.2%})"
    if steps[-1]["passed"]:
        return text + "; no smaller one could be made"
    last = steps[-1]
    return text + f"; the next: {last['macs']:,} MACs (loss {last['risk']:.2%}, at most {last['bound']:.2%})"


def _compared(compared: Sequence[Data]) -> str:
    """Which model was chosen, and the errors of all on the held-back queries."""

    def shown(one: Data) -> str:
        same = "" if one["agreement"] is None else f", {one['agreement']:.0%} the same class"
        error = "not finite" if one["error"] is None else f"{one['error']:.2%}"
        return f"{one['name']} (error {error}{same})"

    chosen = next(one for one in compared if one["chosen"])
    rest = "; ".join(shown(one) for one in compared if not one["chosen"])
    return f"on held-back queries, returned: {shown(chosen)}" + (f"; not: {rest}" if rest else "")


def _row(group: Data) -> tuple[str, ...]:
    """Cells in the order of _HEAD. The error is that of T10; the bounds are those that hold for every input."""
    error, unseen, bounds = "", "", []
    for c in group["certificates"]:
        # JSON has no infinity: a bound that is not finite is None there.
        value = math.inf if c["bound"] is None else c["bound"]
        if c["theorem"] == "T10":
            error = f"{value / c['trivial'] if c['trivial'] else 0:.2%}"
            if (curve := group.get("held_out")) and c["trivial"]:
                unseen = f"{curve[round(group['kept'] * (len(curve) - 1) / group['channels'])] / c['trivial']:.2%}"
        else:
            bound = f"{value:.3g}·‖x‖" if math.isfinite(value) else "∞"
            bounds.append(f"{c['theorem']} {c['kind']} ≤ {bound}" + (" (vacuous)" if c["vacuous"] else ""))
    kept = f"{group['kept']:,} ({group['kept'] / max(group['channels'], 1):.0%})"
    return group["name"], f"{group['channels']:,}", kept, error, unseen, ", ".join(bounds)


def _locked(report: Data) -> list[tuple[str, list[str]]]:
    """The names of the groups that stayed whole, by reason; the most frequent reason comes first."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for group in report["groups"]:
        if group["locked_because"]:
            by_reason[group["locked_because"]].append(group["name"])
    return sorted(by_reason.items(), key=lambda item: -len(item[1]))


def _share(before: int, after: int) -> str:
    return f"{after / max(before, 1):.1%}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
