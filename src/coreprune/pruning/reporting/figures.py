"""The main figures of a report, for a log."""

from __future__ import annotations

from typing import Any

from coreprune.pruning.reporting.report import Report


def figures(report: Report) -> dict[str, Any]:
    """Sizes before and after; how far the result is from the original on the queries that were held back; the phases.

    error: of the outputs, relative to their variance. agreement: the share of queries with the same answer.
    agreement_at_least: what is certified of it (T11, T19). phases: seconds of each.
    """
    found: dict[str, Any] = {}
    for name in ("parameters", "macs", "bytes"):
        found[f"{name}_before"], found[f"{name}_after"] = getattr(report, name)
    for one in report.compared:
        if one.chosen:
            found["error"] = one.error
            if one.agreement is not None:
                found["agreement"] = one.agreement
    if report.agreement is not None and report.agreement.bound is not None:
        found["agreement_at_least"] = 1 - report.agreement.bound
    return {**found, "phases": dict(report.seconds)}
