"""How long a cut by magnitude takes, without data, on torchvision's networks; beside Torch-Pruning.

    make build/zoo-env/.done      # an environment with torchvision and Torch-Pruning
    build/zoo-env/bin/python benchmarks/prune_time.py [--only REGEX] [--threads 2]

Random weights, one image of 224×224 pixels. Ours: prune(model, x, Budget(macs=0.5), "magnitude", queries=None), with
the check after surgery and the report. Torch-Pruning: MagnitudePruner with pruning_ratio=0.3, about half of the
multiply-accumulates, and step(); it checks nothing. Both start from a fresh copy, in turn, three times after one that
does not count; the least of the seconds is reported, of the clock and of the processor. Then the seconds of our phases.
Wanted: at most twice the time of Torch-Pruning on each network. Writes results/prune_time.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from children import Row
from coreprune import Budget, prune
from table import run
from zoo_peer import first_line

NETWORKS = """
    alexnet vgg11_bn resnet18 resnet50 mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121 regnet_y_400mf
    squeezenet1_1 mnasnet1_0 convnext_tiny
"""
REPEATS = 3
WANTED = 2.0  # times Torch-Pruning's seconds
IMAGE = 224


def peer(model: nn.Module, x: Tensor) -> nn.Module:
    """Torch-Pruning, as its README calls it."""
    import torch_pruning as tp

    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.3, ignored_layers=ignored
    )
    pruner.step()
    return model


def ours(model: nn.Module, x: Tensor) -> Any:
    return prune(model, x, Budget(macs=0.5), "magnitude", queries=None, progress=False)


def seconds(work: Callable[[nn.Module, Tensor], Any], model: nn.Module, x: Tensor) -> tuple[float, float, Any]:
    """Of the clock, of the processor; and what came out."""
    mine = copy.deepcopy(model)
    clock, processor = time.perf_counter(), time.process_time()
    done = work(mine, x)
    return time.perf_counter() - clock, time.process_time() - processor, done


def work(job: Row) -> Row:
    """One row. job: the name of the network."""
    import torchvision

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model, x = (
        torchvision.models.get_model(job["network"], weights=None).eval(),
        torch.randn(1, 3, IMAGE, IMAGE),
    )
    times: dict[str, list[tuple[float, float, Any]]] = {"ours": [], "torch_pruning": []}
    row: Row = {}
    for _ in range(REPEATS + 1):
        for name, call in (("ours", ours), ("torch_pruning", peer)):
            try:
                times[name].append(seconds(call, model, x))
            except Exception as error:
                row[f"{name}_error"] = first_line(error)
    for name, found in times.items():
        if counted := found[1:]:
            row[name] = {"wall_s": round(min(f[0] for f in counted), 2), "cpu_s": round(min(f[1] for f in counted), 2)}
    if len(row) == 2 and "torch_pruning" in row:
        row["ratio"] = round(row["ours"]["wall_s"] / row["torch_pruning"]["wall_s"], 2)
        row["cpu_ratio"] = round(row["ours"]["cpu_s"] / row["torch_pruning"]["cpu_s"], 2)
    report = min(times["ours"], key=lambda f: f[0])[2].report
    row["phases"] = {name: round(s, 2) for name, s in report.seconds.items()}
    row["macs"] = round(report.macs[1] / report.macs[0], 4)
    return row


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:  # noqa: ARG001 (the runner calls it)
    for name in NETWORKS.split():
        yield name, {"network": name}


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=("torchvision", "torch-pruning"), limit=900, about={"wanted": WANTED})
