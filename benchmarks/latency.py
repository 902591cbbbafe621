"""How much faster half of the multiply-accumulates is: a network of the size of ResNet-50 and an MLP, batch 1 and 32.

    python benchmarks/latency.py [--threads 2] [--seconds 20] [--quick]

Random weights, 224×224 pixels; half of the MACs with the selector "magnitude", the same share of every group, without
queries: which channels stay does not matter for speed, how many do. Widths are free (round_to=1) or multiples of 8.
The model and its pruned copies are timed in turn. Wanted on two cores at batch 32: at least 1.6 times as fast, or a
reason. Writes latency.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from children import Row
from coreprune import Budget, prune
from coreprune.latency import compare_latency
from environment import environment
from resnet50_cost import ResNet50

RESULT = Path(__file__).parent / "results/latency.json"
WANTED = {"speedup": 1.6, "batch": 32, "cores": 2}
SHARE = 0.5
ROUND_TO = (1, 8)


def mlp(*sizes: int) -> nn.Module:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def models(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    """By name: what builds it, and an example."""
    size, sizes = (64, (64, 256, 256, 10)) if quick else (224, (1024, 4096, 4096, 1000))
    return {
        "resnet50": (ResNet50, torch.randn(1, 3, size, size)),
        f"mlp {'-'.join(map(str, sizes))}": (lambda: mlp(*sizes), torch.randn(1, sizes[0])),
    }


def measure(name: str, build: Callable[[], nn.Module], example: Tensor, round_to: int, seconds: float) -> Row:
    model = build().eval()
    budget = Budget(macs=SHARE, round_to=round_to)
    result = prune(model, example, budget, "magnitude", queries=None)
    before, after = result.report.macs
    found = compare_latency(model, result.model, example, macs=(before, after), seconds=seconds)
    return {"model": name, "round_to": round_to, "macs": round(after / before, 5), **found.as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="per model and batch size")
    parser.add_argument(
        "--quick", action="store_true", help="64×64 pixels, a small MLP, half a second, into build/quick"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    seconds = 0.5 if options.quick else options.seconds
    console, rows = Console(highlight=False, soft_wrap=True), []
    for name, (build, example) in models(options.quick).items():
        for round_to in ROUND_TO:
            with console.status(f"{name}, round_to={round_to}"):
                rows.append(measure(name, build, example, round_to, seconds))
            console.print(json.dumps(rows[-1]))
    record = {
        "benchmark": "latency",
        "environment": environment(),
        "setup": {"macs": SHARE, "method": "magnitude", "queries": None, "seconds": seconds, "seed": 0},
        "wanted": WANTED,
        "rows": rows,
    }
    target = options.out or (Path("build/quick/latency.json") if options.quick else RESULT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
