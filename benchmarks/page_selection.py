"""The section of docs/benchmarks.md about the cost of selection."""

from __future__ import annotations

from typing import Any

from page_parts import MISSING, ran_on, table


def selection(record: dict[str, Any]) -> str:
    rows = record["rows"]
    lines = [[row["key"], *_pair(row, "search"), *_pair(row, "held out"), _apart(row)] for row in rows]
    guessed = next((row for row in rows if "before_extrapolated_cpu_s" in row), None)
    note = ""
    if guessed is not None:
        note = (
            f"\nThe earlier version did not run at {guessed['units']:,} units. From its {guessed['extrapolated_from']:,} units, with the third power of the width, it would take about "
            f"{guessed['before_extrapolated_cpu_s']:,} s. The search took {guessed['after']['search_wall_s']:.0f} s by the clock here, and the process {guessed['after']['peak_memory_mib']:,} MiB with the moments.\n"
        )
    return f"""## What selection costs

How long does `functional` take to order the units of a layer by elimination, and how long does the held-out curve of one order take, compared with the version before the searches were written with products of
matrices? CPU seconds of one thread; both versions ran in turn on a busy machine, so that ratios mean more than seconds. Sizes such as 2048x1 are made layers (units × features of a unit, half as many outputs as
features, {record["environment"]["cores"]} cores at hand and one used). The last column is the largest change of the error on the queries at {", ".join(f"{w:.0%}" for w in record["widths"])} of the units.
The held-out curves are over all folds (two of real layers, one of made ones) and the whole grid of ridges; above 1,152 features `prune` takes one fold and every second ridge, before and now.

{table(["layer", "search before", "search now", "held out before", "held out now", "change of the error"], lines)}
{note}
Measured on {ran_on(record["environment"])}
"""


def _pair(row: dict[str, Any], part: str) -> list[str]:
    found = [row.get(version, {}).get("cpu_s", {}).get(part) for version in ("before", "after")]
    return [MISSING if each is None else f"{each:.2f}" for each in found]


def _apart(row: dict[str, Any]) -> str:
    if "error_change" not in row:
        return MISSING
    return "same order" if row["same_order"] else f"{max(map(abs, row['error_change'])):.0e}"
