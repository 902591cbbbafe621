"""LeNet-300-100 on MNIST without any training: test accuracy per selector, with and without repair, and queries.

    python benchmarks/lenet_no_training.py --data DIR [--seeds 3] [--workers 2] [--only REGEX] [--quick]

DIR holds mnist.npz and lenet300_mnist.safetensors. Queries are made without data, or are unlabelled training images.
Adds "no_training" to lenet_mnist.json and leaves the rest of it alone. `--only` measures some methods again and keeps
the others. A selector that reads no queries is not run again for other queries, unless it is repaired on them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from coreprune import Budget, prune
from coreprune.finetune import accuracy
from coreprune.selectors import SELECTORS
from environment import environment
from lenet_mnist import lenet, mnist

FINAL = "functional"
KEEP = (0.5, 0.25, 0.1)
NO_DATA = 0  # images given
IMAGES = (NO_DATA, 256, 1000, 2000)
MADE = 1000  # queries, where no images are given
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """images: unlabelled training images given as queries; 0: none, they are made without data."""

    method: str
    repair: bool
    images: int
    keep: float
    seed: int


def cells(methods: list[str], seeds: int, shares: tuple[float, ...], images: tuple[int, ...]) -> list[Cell]:
    found = []
    for method, repair, given, keep, seed in product(methods, (False, True), images, shares, range(seeds)):
        if repair or given == NO_DATA or getattr(SELECTORS.get(method), "reads", True):
            found.append(Cell(method, repair, given, keep, seed))
    return found


def queries(folder: Path, cache: Path, cell: Cell) -> Any:
    """Drawn or made with the seed alone, so that every method sees the same; those made are kept in `cache`."""
    generator = torch.Generator().manual_seed(cell.seed)
    if cell.images:
        pictures, _ = mnist(folder, "train")
        return pictures[torch.randperm(len(pictures), generator=generator)[: cell.images]]
    from coreprune.queries import make_queries

    place = cache / f"{cell.seed}.safetensors"
    return make_queries(lenet(folder), example(), "auto", n=MADE, seed=generator, cache=place)


def example() -> Tensor:
    return torch.zeros(1, 784)


def make(folder: Path, cache: Path, seed: int) -> None:
    """Fill the cache, before anyone reads it. What goes wrong is said by the cells that need it."""
    try:
        queries(folder, cache, Cell(FINAL, True, NO_DATA, 1.0, seed))
    except Exception as error:
        Console(stderr=True).print(f"queries of seed {seed}: {type(error).__name__}: {error}")


def measure(folder: Path, cache: Path, cell: Cell) -> Row:
    """One row; an error is a row, too."""
    torch.set_num_threads(1)
    row: Row = vars(cell).copy()
    try:
        given, model = queries(folder, cache, cell), lenet(folder)
        start = time.perf_counter()
        result = prune(
            model,
            example(),
            Budget(keep=cell.keep),
            method=cell.method,
            queries=given,
            repair=cell.repair,
            seed=cell.seed,
        )
        row["wall_s"] = round(time.perf_counter() - start, 3)
        row["accuracy"] = round(100 * accuracy(result.model, *mnist(folder, "test")), 2)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def summarise(runs: list[Row]) -> list[Row]:
    """Mean and spread over the seeds."""
    alike: dict[tuple[Any, ...], list[float]] = {}
    fields = ("method", "repair", "images", "keep")
    for run in runs:
        if "accuracy" in run:
            alike.setdefault(tuple(run[name] for name in fields), []).append(run["accuracy"])
    return [
        {
            **dict(zip(fields, key, strict=True)),
            "seeds": len(values),
            "mean": round(statistics.fmean(values), 2),
            "deviation": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        }
        for key, values in alike.items()
    ]


def table(rows: list[Row]) -> Table:
    shown = Table("method", "repair", "images", *(f"{k:.0%}" for k in KEEP), title="test accuracy, no training")
    means = {(r["method"], r["repair"], r["images"], r["keep"]): r["mean"] for r in rows}
    for key in dict.fromkeys(k[:3] for k in means):
        cells = (means.get((*key, keep)) for keep in KEEP)
        shown.add_row(*map(str, key), *("–" if c is None else f"{c:.2f}" for c in cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz and lenet300_mnist.safetensors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="a regular expression for the selectors")
    parser.add_argument("--quick", action="store_true", help="one seed, two selectors, half of the neurons")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/lenet_mnist.json")
    options = parser.parse_args()
    if not (options.data / "mnist.npz").exists():
        parser.error("--data DIR must hold mnist.npz and lenet300_mnist.safetensors")
    methods = [m for m in dict.fromkeys([FINAL, *SELECTORS]) if re.search(options.only, m)]
    todo = cells(methods, options.seeds, KEEP, IMAGES)
    if options.quick:
        todo = cells([FINAL, "magnitude"], 1, (0.5,), (NO_DATA, 256))
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(options.workers) as pool:
        for seed in {cell.seed: None for cell in todo}:
            pool.submit(make, options.data, Path(cache), seed).result()
        jobs = [pool.submit(measure, options.data, Path(cache), cell) for cell in todo]
        runs = [job.result() for job in track(jobs, "pruning")]
    record = json.loads(options.out.read_text()) if options.out.exists() else {"benchmark": "lenet_mnist"}
    if options.only:
        runs = [r for r in record.get("no_training", {}).get("runs", ()) if r["method"] not in methods] + runs
    record["no_training"] = {
        "environment": environment("safetensors"),
        "queries_made": MADE,
        "summary": summarise(runs),
        "runs": runs,
    }
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    console = Console(width=120)
    console.print(table(record["no_training"]["summary"]))
    for error in sorted({f"{r['method']}: {r['error']}" for r in runs if "error" in r}):
        console.print(error, highlight=False)


if __name__ == "__main__":
    main()
