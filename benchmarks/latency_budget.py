"""Half of the time as the budget, against the budget of MACs that takes as long: four networks, batch 1 and 32.

    python benchmarks/latency_budget.py [--threads 2] [--seconds 20] [--only REGEX] [--runtime eager] [--quick]

Random weights and noise. Channels by "magnitude", widths by their errors on the queries (32 images or 512 vectors),
repair without block descent; the two differ in the budget alone. The MACs are lowered until the median time is no
longer than with the other budget. Both pruned networks are then timed again, in turn with the dense one. The error is
that of the outputs on new inputs, relative to their variance: it compares widths, and says nothing of trained networks.
Wanted: at least 1.9 times as fast, and an error that is no larger than that of the MACs. Writes latency_budget.json
after every network and batch size; with --only, the other rows of that file stay.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from children import Row
from coreprune import Budget, BudgetError, Repair, Result, measure_latency, prune
from environment import environment
from latency_models import Case, cases
from table import earlier

RESULT = Path(__file__).parent / "results/latency_budget.json"
WANTED = {"speedup": 1.9, "error": "no larger than with MACs"}
SHARE, BATCHES = 0.5, (1, 32)
FRESH = 64  # inputs for the error
TRIALS = 5  # budgets of MACs


def cut(model: nn.Module, queries: Tensor, budget: Budget, repair: bool = True) -> Result:
    options = Repair(descent=False) if repair else False
    return prune(model, queries[:1], budget, "magnitude", queries=queries, repair=options, compare=False)


def within(model: nn.Module, queries: Tensor, batch: int, limit: float, share: float, seconds: float) -> float | None:
    """The largest share of the MACs that was found with which the network takes at most `limit` of the time.

    Found by the secant from `share` on, as the time is nearly a line in the MACs; sizes alone count, so that nothing is
    repaired. None if all that were tried take longer.
    """
    fits, above, aim = (0.0, 0.0), (1.0, 1.0), limit
    for _ in range(TRIALS):
        small = cut(model, queries, Budget(macs=share), repair=False).model
        row = measure_latency(
            {"dense": model, "small": small}, queries[:1], batch_sizes=(batch,), seconds=seconds
        ).rows[0]
        taken = 1 / row.speedup
        fits, above = ((share, taken), above) if taken <= limit else (fits, (share, taken))
        if 0.95 * limit <= taken <= limit:
            break
        aim *= 0.98  # two measurements of one network differ: another try at the same share may fail again
        slope = (above[1] - fits[1]) / (above[0] - fits[0])
        share = min(max(fits[0] + (aim - fits[1]) / slope, 1.02 * fits[0]), 0.98 * above[0])
    return fits[0] or None


@torch.no_grad()
def error(dense: nn.Module, small: nn.Module, inputs: Tensor) -> float:
    """The squared error of the outputs, relative to their variance."""
    wanted, found = (torch.cat([m(part).double() for part in inputs.split(16)]) for m in (dense, small))
    return float((wanted - found).pow(2).sum() / (wanted - wanted.mean(0)).pow(2).sum())


def measure(name: str, case: Case, batch: int, runtime: str, seconds: float) -> Iterator[Row]:
    """A row for each of the two budgets."""
    model, generator = case.trained(), torch.Generator().manual_seed(1)
    queries, fresh = case.inputs(case.queries, generator), case.inputs(FRESH, generator)
    about: Row = {"model": name, "batch": batch, "runtime": runtime, "queries": case.queries}
    start = time.perf_counter()
    timed = cut(model, queries, Budget(latency=SHARE, batch=batch, runtime=runtime))
    took = time.perf_counter() - start
    assert timed.report.latency_budget is not None
    met = timed.report.as_dict()["latency_budget"]
    del met["table"]  # a path of this machine
    rows: dict[str, tuple[Result, Row]] = {"latency": (timed, {"met": met, "wall_s": round(took, 1)})}
    if runtime == "eager":
        start_at = timed.report.macs[1] / timed.report.macs[0]
        share = within(model, queries, batch, met["after"] / met["before"], start_at, seconds / 4)
        if share is not None:
            rows["macs"] = (cut(model, queries, Budget(macs=share)), {"macs_budget": round(share, 4)})
    models = {"dense": model, **{kind: result.model for kind, (result, _) in rows.items()}}
    again = measure_latency(models, queries[:1], batch_sizes=(batch,), seconds=seconds).rows[0].timings
    for kind, (result, more) in rows.items():
        before, after = result.report.macs
        faster = again["dense"].median / again[kind].median
        row: Row = {**about, "budget": kind, "macs": round(after / before, 4)}
        if runtime == "eager":
            row |= {"before": again["dense"].median, "after": again[kind].median, "speedup": round(faster, 3)}
            row["time_per_mac"] = round((1 - 1 / faster) / max(1 - after / before, 1e-9), 3)
        else:
            row |= {"before": met["before"], "after": met["after"], "speedup": round(met["before"] / met["after"], 3)}
        yield {**row, "error": round(error(model, result.model, fresh), 5), **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="per network and batch size, at the end")
    parser.add_argument("--only", default="", help="what matches, such as resnet50/32: network and batch size")
    parser.add_argument("--runtime", default="eager", choices=("eager", "compile", "onnx"))
    parser.add_argument("--quick", action="store_true", help="one small network, half a second, into build/quick")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = 0.5 if options.quick else options.seconds
    console, rows = Console(highlight=False, soft_wrap=True), list[Row]()
    target = options.out or (Path("build/quick/latency_budget.json") if options.quick else RESULT)
    target.parent.mkdir(parents=True, exist_ok=True)
    chosen = [(n, b) for n in cases(options.quick) for b in BATCHES if re.search(options.only, f"{n}/{b}")]
    if options.only:
        rows = [row for row in earlier(target) if (row["model"], row["batch"]) not in chosen]
    here = environment("onnxruntime")
    made_by = {"version": here["versions"]["coreprune"], "cpu": here["cpu"]}
    setup = {"latency": SHARE, "method": "magnitude", "repair": "without descent", "fresh": FRESH, "seconds": seconds}
    for name, batch in chosen:
        with console.status(f"{name}, batch {batch}"):
            found = _rows(name, cases(options.quick)[name], batch, options.runtime, seconds)
            new = [{**row, **made_by} for row in found]
        rows += new
        console.print("\n".join(json.dumps(row) for row in new))
        record: dict[str, Any] = {
            "benchmark": "latency_budget",
            "environment": here,
            "setup": {**setup, "threads": options.threads, "seed": 0},
            "wanted": WANTED,
            "rows": rows,
        }
        target.write_text(json.dumps(record, indent=1) + "\n")


def _rows(name: str, case: Case, batch: int, runtime: str, seconds: float) -> Iterator[Row]:
    torch.manual_seed(0)
    try:
        yield from measure(name, case, batch, runtime, seconds)
    except BudgetError as failed:
        yield {"model": name, "batch": batch, "runtime": runtime, "queries": case.queries, "failed": str(failed)}


if __name__ == "__main__":
    main()
