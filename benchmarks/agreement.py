"""Budgets of agreement on a trained network: the size that is returned, and how often its answer is the dense one's.

    python benchmarks/agreement.py [--data ../shared/data] [--seeds 3] [--threads 2] [--only REGEX]

The ResNet-56 of the CIFAR-10 benchmark. `prune(model, x, Budget(agreement=level), queries=…)` gets 5,000 of the 10,000
test images, drawn by the seed, without their labels: training images would look better than they are, because the dense
network knows them. On the other 5,000 the agreement with the dense network and the accuracy are measured. delta = 1 %.
Block descent is left out (`Repair(descent=False)`), because every size of the path is made anew. No setting was chosen
on these images. Each row runs in a process of its own and is appended to a journal. Writes results/agreement.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from children import Row, measured
from cifar import SIDE, normalised, pictures, predictions, trained
from coreprune import Budget, Repair, prune
from table import run

LEVELS, GIVEN, TEST = (0.99, 0.95, 0.9), 5_000, 10_000


def work(job: Row) -> Row:
    """One row. job: the level and the seed."""
    torch.set_num_threads(job["threads"])
    data = Path(job["data"])
    model, order = (
        trained(data).to(job["device"]),
        torch.randperm(TEST, generator=torch.Generator().manual_seed(job["seed"])),
    )
    images, labels = pictures(data, "test", order.tolist())
    images, labels = images.to(job["device"]), labels.to(job["device"])
    given, held, labels = normalised(images[:GIVEN]), images[GIVEN:], labels[GIVEN:]
    budget = Budget(agreement=job["level"])

    def cut():
        x = torch.zeros(1, 3, SIDE, SIDE, device=job["device"])
        return prune(model, x, budget, queries=given, seed=job["seed"], repair=Repair(descent=False), progress=False)

    result, row = measured(cut)
    dense, small = predictions(model, held), predictions(result.model, held)
    report = result.report
    assert report.path is not None
    return {
        **row,
        "agreement": round(float((dense == small).double().mean()), 4),
        "accuracy": [round(float((found == labels).double().mean()), 4) for found in (dense, small)],
        "macs": round(report.macs[1] / report.macs[0], 4),
        "parameters": round(report.parameters[1] / report.parameters[0], 4),
        "path": report.path.as_dict(),
    }


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    for seed in range(options.seeds):
        for level in LEVELS:
            yield f"resnet56/{level:g}/seed {seed}", {"level": level, "seed": seed}


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, limit=3600, about={"delta": 0.01, "given": GIVEN, "tested_on": TEST - GIVEN})
