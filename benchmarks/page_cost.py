"""The sections on the time of a cut and on budgets of agreement of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from page_parts import MISSING, missing, phases, ran_on, table


def prune_time(record: dict[str, Any]) -> str:
    rows, lines = [row for row in record["rows"] if "ours" in row], []
    for row in rows:
        theirs = row.get("torch_pruning")
        other = (
            [f"{theirs['wall_s']:.2f}", f"{row['ratio']:.0f}", f"{row['cpu_ratio']:.0f}"] if theirs else [MISSING] * 3
        )
        lines.append([row["network"], f"{row['ours']['wall_s']:.2f}", *other, phases(row["phases"])])
    threads = rows[0]["threads"]
    return f"""## The time of a cut without data

How long does a cut by magnitude take, without queries, beside Torch-Pruning? Half of the multiply-accumulates stay. Ours traces the model, tries which groups can shrink, cuts, compares the result with the
original on random inputs, and writes certificates; Torch-Pruning cuts and checks nothing. Seconds are the least of three calls after one that does not count, in turn, with random weights
and one image of 224×224 pixels. *Times* is ours over theirs, by the clock and by the processor. Our target was at most {record["wanted"]:g} times. It is missed on every network: on most of them the trace by torch.export
alone takes longer than that.

{table(["network", "coreprune (s)", "Torch-Pruning (s)", "times, clock", "times, processor", "our phases (s)"], lines)}
{missing(len(record["rows"]) - len(rows), "networks")}
Measured with {threads} threads on {ran_on(record["environment"])}
"""


def accelerator(record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        memory = f"{row['peak_on_device_mib']:,}" if "peak_on_device_mib" in row else MISSING
        same = f"{row['kept_by_both'] / row['kept']:.2%}" if "kept" in row else MISSING
        where = row.get("device", row["cpu"])
        lines.append([row["network"], where, phases(row["seconds"]), f"{row['wall_s']:.0f}", memory, same])
    return f"""## On a GPU

A network on a GPU: seconds by phase and peak memory there. `benchmarks/accelerator.py` says what is pruned. *Kept by both* is the share of the kept channels that a run on the CPU kept, too, where there was one. The time of a selection is that
of many short steps: searches over up to 4,096 features take them on the CPU, and roots of full rank need no pivots. Before these changes the same call on the same kind of GPU took 93 s, 59 s of it in the selection.

The distillation of ResNet-56 (35 % of the multiply-accumulates, 64 images a step; one run of 100 steps each, alone on an H200) takes 26 ms a step, of which the GPU works for 8; it waits for the many small launches. With one launch per tensor for Adam, not several, a step
takes 26 instead of 46 ms. Half precision (31 ms) and channels last (34 ms, both together 42 ms) do not pay in such a small network, so neither is used.

{table(["network", "device", "seconds by phase", "seconds in all", "peak memory there (MiB)", "kept by both"], lines)}

Measured with {record["rows"][0]["threads"]} threads on {ran_on(record["environment"])}
"""


def agreement(record: dict[str, Any]) -> str:
    rows, lines = [row for row in record["rows"] if "path" in row], []
    for row in sorted(rows, key=lambda r: (-r["level"], r["seed"])):
        steps = row["path"]["steps"]
        chosen = [step for step in steps if step["passed"]][-1]
        dense, small = row["accuracy"]
        lines.append(
            [
                f"{row['level']:g}",
                str(row["seed"]),
                str(len(steps)),
                f"{row['macs']:.1%}",
                f"{row['parameters']:.1%}",
                f"{1 - chosen['risk']:.2%}",
                f"{row['agreement']:.2%}",
                f"{dense:.2%} → {small:.2%}",
                f"{row['wall_s']:.0f}",
            ]
        )
    head = ["agreement", "seed", "sizes tested", "MACs left", "parameters left", "on what was set aside", "on others"]
    return f"""## An agreement as the budget

`Budget(agreement=…)` returns the smallest network that is shown to give the dense network's answer that often, with confidence {1 - record["delta"]:.0%} (T19). Here it got {record["given"]:,} of CIFAR-10's 10,000 test images without
their labels, and a ResNet-56 that was trained on others. It set a part of them aside, and pruned with the rest. The last columns are about the {record["tested_on"]:,} images that it did not get. Block descent was
left out.

{table([*head, "accuracy on others", "seconds"], lines)}
{missing(len(record["rows"]) - len(rows), "runs")}
Measured on {ran_on(record["environment"])}
"""
