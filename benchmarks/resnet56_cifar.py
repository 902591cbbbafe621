"""ResNet-56 on CIFAR-10 (JPEG): accuracy against multiply-accumulates, pruned without data or on unlabelled images.

    python benchmarks/resnet56_cifar.py --data DIR [--seeds 3] [--threads 2] [--only REGEX] [--resume]
    python benchmarks/resnet56_cifar.py --data DIR --quick        # a few minutes, into build/quick
    python benchmarks/resnet56_cifar.py --collect                 # JSON and plots from what is finished so far
    python benchmarks/resnet56_cifar.py --list                    # the cells

DIR holds cifar10_jpeg.npz and resnet56_cifar10_jpeg.safetensors. Every selector, with and without repair, on queries
made without data and on 256 unlabelled training images, at three shares of the whole network's multiply-accumulates;
the final method also distilled; Torch-Pruning, where it is installed; some of all that fine-tuned for one epoch.
Each cell runs in a process of its own and is kept in a journal beside the result. `--resume` goes on after an
interruption, and tries again what failed. Writes resnet56_cifar.json, and the plots into docs/.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from children import Journal, Row, answer, in_child
from cifar import FILES
from coreprune.selectors import SELECTORS
from environment import environment, made_by
from resnet56_cells import FINAL, PEERS, SHARES, Cell, cells
from resnet56_plot import plot
from resnet56_work import Recipe, Setup, work

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
NAME = "resnet56_cifar"
QUICK = {"test": 200, "certify": 100, "queries": 32, "train": 256}


def matrix(options: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for."""
    if options.quick:
        found = list(cells({name: SELECTORS[name] for name in (FINAL, "l2")}, 1, 1, 1, 2, [0.5]))
        # One of a kind: peers, polish and fine-tuning once.
        found = [c for c in found if c.method not in PEERS[1:] and not (c.tuned and c.method != "l2")]
    else:
        found = list(
            cells(SELECTORS, options.seeds, options.seeds_rest, options.seeds_tuned, options.distill, options.shares)
        )
    return [cell for cell in found if re.search(options.only, cell.key)]


def run(todo: list[Cell], setup: Setup, journal: Journal, options: argparse.Namespace) -> None:
    """Every cell in a process of its own, stage after stage; the journal grows by one line each."""
    maker = made_by(options.device)

    def one(cell: Cell) -> Row:
        job = {"cell": cell.as_dict(), "setup": asdict(setup)}
        return {
            "key": cell.key,
            **cell.as_dict(),
            "threads": options.threads,
            **maker,
            **in_child(__file__, job, options.limit, options.threads),
        }

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(options.workers) as pool:
        task = progress.add_task("cells", total=len(todo))
        for _, stage in groupby(todo, key=lambda cell: cell.stage):
            try:
                for job in as_completed([pool.submit(one, cell) for cell in stage]):
                    row = job.result()
                    journal.add(row)
                    outcome = row.get("error") or (f"{row['accuracy']:.2f} %" if "accuracy" in row else "done")
                    progress.console.print(f"{row['key']}: {outcome}", highlight=False, soft_wrap=True)
                    progress.advance(task)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise


def summarise(rows: Iterable[Row]) -> list[Row]:
    """Mean and spread over the seeds of all cells that differ in nothing else."""

    fields = ("kind", "method", "repair", "distill", "source", "share", "tuned")
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "accuracy" in row:
            alike.setdefault(tuple(row[name] for name in fields), []).append(row)
    summary = []
    for group in alike.values():
        first = group[0]
        values = [row["accuracy"] for row in group]
        summary.append(
            {
                **{name: first[name] for name in fields},
                "macs": statistics.fmean(row.get("macs", 1.0) for row in group),
                "seeds": len(group),
                "accuracy": {
                    "mean": round(statistics.fmean(values), 2),
                    "deviation": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                    "least": min(values),
                    "most": max(values),
                },
                "agreement_at_least": min(row["agreement"]["at_least"] for row in group),
                "agreement_measured": round(statistics.fmean(row["agreement"]["measured"] for row in group), 2),
            }
        )
    return summary


def collect(target: Path, rows: dict[str, Row], setup: dict[str, Any], plots: Path) -> None:
    """The JSON and the plots of everything that is finished."""
    record = {
        "benchmark": NAME,
        "environment": environment("torch-pruning", "matplotlib", "pillow", "safetensors"),
        "setup": setup,
        "recipe": asdict(Recipe()),
        "summary": summarise(rows.values()),
        "cells": list(rows.values()),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, plots)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the images and the weights")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the final method")
    parser.add_argument("--seeds-rest", type=int, default=1, help="seeds of the other selectors")
    parser.add_argument("--seeds-tuned", type=int, default=1, help="seeds of what is fine-tuned")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the multiply-accumulates")
    parser.add_argument("--distill", type=int, default=1000, help="steps of the distilled rows")
    parser.add_argument("--only", default="", help="a regular expression for the names of the cells, see --list")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run ended")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--device", default="cpu", help="where the network lies, for example cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time; times are honest with one")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a cell may take")
    parser.add_argument("--quick", action="store_true", help="200 test images, one cell of a kind, into build/quick")
    parser.add_argument("--out", type=Path, help="folder of the result (benchmarks/results)")
    parser.add_argument("--collect", action="store_true", help="write the JSON and plots, and stop")
    parser.add_argument("--list", action="store_true", help="print the names of the cells, and stop")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or (ROOT / "build/quick" if options.quick else RESULTS)
    needs_data = not (options.collect or options.list or options.job)
    if needs_data and (options.data is None or not all((options.data / name).exists() for name in FILES)):
        parser.error(f"--data DIR must hold {' and '.join(FILES)}")
    return options


def main() -> None:
    options = parsed()
    if options.job:
        answer(work, options.job)
        return
    wanted = matrix(options)
    if options.list:
        print("\n".join(cell.key for cell in wanted))
        return
    target = options.out / f"{NAME}.json"
    journal, cache = Journal(target.with_suffix(".journal")), target.with_suffix(".cache")
    earlier = json.loads(target.read_text()) if target.exists() else {}
    finished = {row["key"]: row for row in earlier.get("cells", ())} | journal.rows()
    if not (options.resume or options.collect or options.only):
        if journal.path.exists() and not options.quick:
            raise SystemExit(f"{journal.path} is of an earlier run: --resume goes on with it; or delete it.")
        finished = {}
        journal.path.unlink(missing_ok=True)
        shutil.rmtree(cache, ignore_errors=True)
    setup = Setup(
        str(options.data), str(cache), options.threads, device=options.device, **(QUICK if options.quick else {})
    )
    described = {k: v for k, v in asdict(setup).items() if k not in ("data", "cache")} | {"workers": options.workers}
    plots = DOCS if options.out == RESULTS else options.out
    if options.collect:
        collect(target, finished, earlier.get("setup", described), plots)
        return
    # What was asked for is measured, and measured again, unless the run is resumed; what failed always is.
    todo = [c for c in wanted if not options.resume or "error" in finished.get(c.key, {"error": ""})]
    try:
        run(todo, setup, journal, options)
    finally:
        collect(target, finished | journal.rows(), described, plots)


if __name__ == "__main__":
    main()
