"""The section of docs/benchmarks.md on other pruners."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean, stdev
from typing import Any

from page_parts import MISSING, missing, ran_on, several, table


def peers(record: dict[str, Any]) -> str:
    rows = [row for row in record["rows"] if "accuracy" in row]
    dense = next(row["accuracy"] for row in rows if row["method"] == "dense")
    cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["method"], row["share"]].append(row)
    shares = sorted({row["share"] for row in rows if row["method"] != "dense"}, reverse=True)
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "dense"]
    methods.sort(key=lambda m: -max(row["accuracy"] for share in shares for row in cells[m, share]))
    lines = [
        [m, *(text for share in shares for text in _cells(cells[m, share])), *_cost(cells[m, shares[0]])]
        for m in methods
    ]
    head = [text for share in shares for text in (f"accuracy at {share:.0%}", "MACs left")]
    failed = sum("error" in row for row in record["rows"])
    return f"""## Other pruners, with the same samples

ResNet-56 on CIFAR-10 (JPEG), {dense:.2f} % before: the accuracy in % on {record["test_images"]:,} test images after removing channels until at most a share of the multiply-accumulates is left. Nothing is trained.
What reads samples got the same {record["samples"]} training images of a seed, without labels; where a loss is needed, the label is the dense network's own answer. coreprune has its default settings. Torch-Pruning removes the
same share of the inner channels of every block, its best setting in the table above; it may keep a little more than the share. Merging, folding and least squares are our re-implementations; the first two remove inner channels
alone, with widths that coreprune chose by the errors on the samples, which was the best of five settings on training images. Cells are the mean over the seeds, with the deviation where chance plays a part.
Seconds and memory are the means at {shares[0]:.0%}, on one thread beside other work; queries that are made count.{missing(failed, "rows")}{several(rows)}

{table(["", *head, "seconds", "peak memory, MiB"], lines)}

Measured on {ran_on(record["environment"])}
"""


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return [MISSING, MISSING]
    accuracies = [row["accuracy"] for row in rows]
    told = f"{fmean(accuracies):.1f}" + (f" ± {stdev(accuracies):.1f}" if len(rows) > 1 else "")
    return [told, f"{100 * fmean(row['macs'] for row in rows):.1f} %"]


def _cost(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{fmean(row[name] for row in rows):,.0f}" if rows else MISSING for name in ("wall_s", "peak_memory_mib")]
