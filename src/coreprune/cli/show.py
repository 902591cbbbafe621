"""Tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from coreprune.demo.demo import Demo
    from coreprune.pruning import Inspection


def demo_table(demo: Demo) -> Table:
    """A table with the accuracy, size and first-layer certificates of every pruned network."""
    table = Table(
        title=f"64-300-100-10 on digits: {demo.accuracy:.1%} with {demo.parameters:,} parameters, pruned without data",
        title_justify="left",
    )
    table.add_column("selector")
    for name in ("kept", "params", "accuracy", "tuned", "T6", "T8"):
        table.add_column(name, justify="right")
    previous = None
    for row in demo.rows:
        if previous not in (None, row.method):
            table.add_section()
        bounds = {c["theorem"]: c for c in row.certificates}
        table.add_row(
            row.method if row.method != previous else "",
            f"{row.keep:.0%}",
            f"{row.parameters:,}",
            f"{row.accuracy:.1%}",
            f"{row.accuracy_fine_tuned:.1%}",
            _bound(bounds.get("T6")),
            _bound(bounds.get("T8")),
        )
        previous = row.method
    return table


def demo_notes(demo: Demo) -> str:
    """Notes on the columns of the table, with the trivial bound to compare the certificates with."""
    trivial = next((c["trivial"] for row in demo.rows for c in row.certificates if c["theorem"] == "T8"), None)
    notes = (
        "functional and magnitude+repair are repaired on drawings that coreprune makes, the others are not.\n"
        "kept: share of the neurons of both hidden layers. tuned: accuracy after 3 epochs of fine-tuning.\n"
        "T6, T8: how far the next layer's outputs can move at most, per unit of ‖x‖, for every input x, when only "
        "the first hidden layer is pruned. T8 is proved; T6 holds with probability 99 % over the sampling."
    )
    if trivial is not None:
        notes += (
            f"\n· marks a vacuous bound: above {trivial:.1f} a constant answer satisfies it too. "
            "The T6 of lewis is in its own norm."
        )
    return notes


def inspection_table(found: Inspection) -> Table:
    """A table of the groups of channels with their shares of the cost."""
    table = Table(
        title=f"{found.model}: {found.parameters:,} parameters, {found.macs:,} MACs a sample, "
        f"{found.free_macs_share:.0%} of the MACs in free groups",
        title_justify="left",
    )
    table.add_column("group", overflow="fold")
    for name in ("channels", "unit", "MACs"):
        table.add_column(name, justify="right")
    table.add_column("locked, or what to know", overflow="fold")
    for g in found.groups:
        unit = f"{g.unit}" + (f" × {g.sections}" if g.sections > 1 else "")
        told = f"locked: {g.locked_because}" if g.locked_because else ", ".join(g.flags)
        style = "dim" if g.locked_because else None
        table.add_row(g.name, f"{g.channels:,}", unit, f"{g.macs_share:.1%}", told, style=style)
    return table


def result_table(data: Mapping[str, Any]) -> Table:
    """A table of the values before and after. data: the content of report.json."""
    table = Table(title="before and after", title_justify="left")
    table.add_column("")
    for name in ("before", "after", ""):
        table.add_column(name, justify="right")
    if accuracy := data.get("accuracy"):
        before, after, n = accuracy["before"], accuracy["after"], accuracy["samples"]
        table.add_row(
            f"accuracy on {n:,} samples", f"{before:.2%}", f"{after:.2%}", f"{100 * (after - before):+.2f} points"
        )
    if read := data.get("perplexity"):
        before, after = (math.inf if read[when] is None else read[when] for when in ("before", "after"))
        name = f"perplexity on {read['tokens']:,} tokens of {read['text']}"
        table.add_row(name, f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f} times")
        table.add_row("the same next token", "", f"{read['same']:.1%}", "")
    for key, name in (("macs", "MACs a sample"), ("parameters", "parameters"), ("bytes", "bytes")):
        before, after = data[key]["before"], data[key]["after"]
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}")
    if met := data.get("latency_budget"):
        before, after = met["before"], met["after"]
        name = f"ms for a batch of {met['batch']}, {met['runtime']}; limit {1e3 * met['limit']:.2f}"
        table.add_row(name, f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{before / after:.2f} × as fast")
    for row in (data.get("latency") or {}).get("rows", ()):
        before, after = row["before"]["median"], row["after"]["median"]
        name = f"ms for a batch of {row['batch']}"
        table.add_row(name, f"{1e3 * before:.2f}", f"{1e3 * after:.2f}", f"{row['speedup']:.2f} × as fast")
    return table


def runs_table(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row for every run: its size, its quality, how long it took. runs: names, and contents of report.json."""
    from coreprune.report.runs import compared
    from coreprune.report.words import duration, percent

    found = compared(runs)
    table = Table(title=f"{len(runs)} runs", title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("MACs", "parameters", *found["qualities"], "made in"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        sizes = [percent(s["share"]) if s else "–" for s in row["sizes"][:2]]
        table.add_row(row["name"], *sizes, *row["qualities"], duration(row["seconds"]))
    return table


def agreement(certificate: Mapping[str, Any]) -> str:
    """The T11 certificate in one sentence. certificate: as in report.json."""
    sure = 1 - (certificate["delta"] or 0)
    if certificate["theorem"] == "T19":
        return f"{certificate['statement']}, with confidence {sure:.0%}"
    least = math.floor(1000 * (1 - certificate["bound"])) / 10  # round to the safe side
    text = f"the same answer for ≥ {least:.1f} % of such inputs, with confidence {sure:.0%}"
    if certificate["vacuous"]:
        text += " (vacuous: one answer for all would agree as often)"
    return f"{text}; {certificate['assumptions'][0]}"


def result_notes(data: Mapping[str, Any]) -> str:
    """Notes on the queries, the agreement, and the groups that were not pruned. data: the content of report.json."""
    lines = [f"note      {note}" for note in data.get("notes") or ()]
    if data.get("queries"):
        lines.append(f"queries   {data['queries']}")
    if data.get("agreement"):
        lines.append(f"agreement {agreement(data['agreement'])}")
    elif path := data.get("path"):
        lines.append(f"loss      {agreement(path['certificate'])}")
    locked = [g for g in data["groups"] if g["locked_because"] not in (None, "", "model output")]
    if locked:
        more = f", and {len(locked) - 1} more (see the report)" if len(locked) > 1 else ""
        lines.append(f"whole     {locked[0]['name']}: {locked[0]['locked_because']}{more}")
    return "\n".join(lines)


def _bound(certificate: dict[str, object] | None) -> str:
    if certificate is None:
        return "–"
    value = certificate["bound"]
    return f"{value:.1f}" + (" ·" if certificate["vacuous"] else "") if value is not None else "∞ ·"
