"""What it costs to order the units of a layer and to draw its held-out curve, beside an earlier version.

    python benchmarks/selection.py --before DIR [--sizes REGEX] [--layers FILE] [--limit FEATURES]

DIR is the folder `src` of the earlier version. Every measurement runs in a process of its own, the two versions in
turn, with one thread, and counts the CPU seconds of the process, because the machine may be busy. The moments are made
at random: activations of a ReLU whose spectrum falls, 2/3 as many rows as features, and half as many outputs. FILE
holds readers of real layers, as `--collect` writes them (EfficientNet-Lite0 and MiniLM, with their weights, and LeNet):

    python benchmarks/selection.py --collect FILE --data DIR --model MINILM

The sets of both versions are compared by the error curve on the queries at four widths. Beyond --limit features the
earlier version is extrapolated with the third power of the width from the largest size at which it ran. Writes
results/selection.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from children import Row, answer, in_child, memory
from coreprune.coreset import Fold, Moments, functional_order, held_out_curve, in_order
from environment import environment

HERE = Path(__file__).parent
SIZES = [(512, 1), (1024, 1), (2048, 1), (4096, 1), (11008, 1), (64, 9), (128, 9), (256, 9), (512, 9)]
WIDTHS = (0.25, 0.5, 0.75, 0.9)
WIDE = 4608  # features; with more, the held-out curve is not measured, for its memory


def made(units: int, p: int, seed: int, mixing: int = 0) -> Tensor:
    """The covariance of made activations."""
    f, generator = units * p, torch.Generator().manual_seed(seed)
    mix = torch.randn(f, f, generator=torch.Generator().manual_seed(mixing)) / f**0.5
    rows = torch.randn(2 * f // 3, f, generator=generator) * torch.arange(1, f + 1) ** -0.5
    x = torch.relu(rows @ mix)
    x = (x - x.mean(dim=0)).double()
    return x.T @ x / len(x)


def of_size(units: int, p: int) -> list[tuple[Moments, tuple[Fold, ...]]]:
    v = torch.randn(max(1, units * p // 2), units * p, generator=torch.Generator().manual_seed(7))
    gram = (v.T @ v).double()
    seen = made(units, p, 0)
    folds = () if units * p > WIDE else (Fold(seen, made(units, p, 1), gram),)
    return [(Moments(seen, gram), folds)]


def readers_of(job: Row) -> list[tuple[Moments, tuple[Fold, ...]]]:
    if "layer" not in job:
        return of_size(job["units"], job["p"])
    each = torch.load(job["layers"], mmap=True)[job["layer"]]["readers"]
    return [(Moments(k.clone(), g.clone()), tuple(Fold(*fold) for fold in folds)) for k, g, folds in each]


def work(job: Row) -> Row:
    """One version at one size or layer. Leaves the order in job["order"]."""
    torch.set_num_threads(1)
    for each, folds in of_size(16, 1):  # what is imported and set up once is not counted
        held(folds, 16, functional_order([each], 16, search="backward"))
    units, readers = job["units"], readers_of(job)
    moments = [each for each, _ in readers]
    spent: dict[str, float] = {}
    start, wall = time.process_time(), time.perf_counter()
    order = functional_order(moments, units, search="backward")
    spent["search"] = time.process_time() - start
    walls = time.perf_counter() - wall
    peak = memory()
    curves = []
    start = time.process_time()
    for _, folds in readers:
        if folds:
            curves.append(held(folds, units, order))
    if curves:
        spent["held out"] = time.process_time() - start
    torch.save({"order": order, "held": sum(curves) if curves else None}, job["order"])
    return {
        "cpu_s": {k: round(v, 2) for k, v in spent.items()},
        "search_wall_s": round(walls, 1),
        "peak_memory_mib": round(peak.get("peak", 0)),
    }


def held(folds: tuple[Fold, ...], units: int, order: Tensor) -> Tensor:
    """With all folds and all ridges. Above 1,152 features `prune` takes one fold and every second ridge."""
    from coreprune.coreset import held_out

    if hasattr(held_out, "least_held_out"):
        return held_out.least_held_out(folds, units, [order] * len(folds))
    return torch.stack([held_out_curve(fold, units, order) for fold in folds]).mean(dim=0).amin(dim=0)


def compared(job: Row, before: dict[str, Any], after: dict[str, Any]) -> Row:
    """How much higher the new order's error is at a few widths, and whether the orders are equal."""
    units, readers = job["units"], readers_of(job)
    curves = [in_order([m for m, _ in readers], units, found["order"], ridge=1e-3).errors for found in (before, after)]
    at = [max(1, round(share * units)) for share in WIDTHS]

    def apart(one: Tensor, other: Tensor) -> list[float]:
        return [float(f"{float(other[k] / one[k] - 1):.1e}") if float(one[k]) > 0 else 0.0 for k in at]

    found: Row = {"same_order": before["order"].equal(after["order"]), "error_change": apart(*curves)}
    if before["held"] is not None and found["same_order"]:
        found["held_out_change"] = apart(before["held"], after["held"])
    return found


def collect(file: Path, data: Path, model: Path) -> None:
    """Write the readers of real layers: those of EfficientNet-Lite0, MiniLM and LeNet-300-100 that are widest."""
    from selection_layers import layers

    torch.save(layers(data, model), file)


def measured(options: argparse.Namespace, job: Row, folder: Path) -> Row:
    row: Row = {**job}
    versions = {"before": options.before, "after": HERE.parent / "src"}
    if job["units"] * job["p"] > options.limit:
        del versions["before"]
    for name, source in versions.items():  # one process after the other, so that both see the same machine
        os.environ["PYTHONPATH"] = str(source)
        asked = {**job, "layers": str(options.layers), "order": str(folder / name)}
        row[name] = in_child(__file__, asked, 3600, 1)
        print(name, job, row[name], flush=True)
    if len(versions) == 2 and not any("error" in row[name] for name in versions):
        row |= compared({**job, "layers": str(options.layers)}, *(torch.load(folder / name) for name in versions))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the folder src of an earlier version")
    parser.add_argument("--sizes", default="", help="a regular expression for sizes such as 512x1, and names of layers")
    parser.add_argument("--layers", type=Path, help="readers of real layers")
    parser.add_argument("--limit", type=int, default=4608, help="features up to which the earlier version runs")
    parser.add_argument("--collect", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, help="the folder of MiniLM")
    parser.add_argument("--out", type=Path, default=HERE / "results/selection.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        answer(work, options.job)
        return
    if options.collect:
        collect(options.collect, options.data, options.model)
        return
    jobs: list[Row] = [{"units": n, "p": p} for n, p in SIZES]
    if options.layers:
        found = torch.load(options.layers, mmap=True)
        jobs = [{"units": each["units"], "p": each["p"], "layer": name} for name, each in found.items()] + jobs
    rows: list[Row] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            name = job.get("layer") or f"{job['units']}x{job['p']}"
            if re.search(options.sizes, name):
                rows = [row for row in rows if row["key"] != name] + [
                    {"key": name, **measured(options, job, Path(folder))}
                ]
                options.out.write_text(json.dumps(record(rows), indent=1) + "\n")


def record(rows: list[Row]) -> Row:
    whole = [r for r in rows if "layer" not in r and r["p"] == 1 and "search" in r.get("before", {}).get("cpu_s", {})]
    largest = max(whole, key=lambda r: r["units"], default=None)
    for row in rows:
        if "before" not in row and largest is not None:
            factor = (row["units"] / largest["units"]) ** 3
            row["before_extrapolated_cpu_s"] = round(factor * largest["before"]["cpu_s"]["search"])
            row["extrapolated_from"] = largest["units"]
    return {"benchmark": "selection", "environment": environment(), "threads": 1, "widths": WIDTHS, "rows": rows}


if __name__ == "__main__":
    main()
