"""What each part of the pipeline is worth, on two trained networks: each part left out, alone, and all together.

    python benchmarks/ablation.py --data DIR [--only REGEX] [--threads 2]

DIR as for efficientnet.py and resnet56_cifar.py. EfficientNet-Lite0 gets 64 images of the pool of seed 0, and is
measured on the other 186 images of the pool; ResNet-56 gets 256 made inputs, and is measured on the last 2,000 training
images. So no test image is looked at. Neither has the safety net or block descent, unless a row says so. Each row runs
in a process of its own and is appended to a journal. Writes results/ablation.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cifar
import efficientnet
from children import Row, measured
from coreprune import Budget, Repair, Result, prune
from coreprune.pruning.plans import decide
from coreprune.queries import make_queries
from coreprune.selectors import Functional
from table import run

CELLS = (("efficientnet", 0.7), ("efficientnet", 0.5), ("resnet56", 0.35), ("resnet56", 0.25))
VARIANTS = (
    "together",
    "without held-out curves (1)",
    "with a fixed ridge, 0.001 (2)",
    "without either (1, 2)",
    "without exchange (9)",
    "in two steps (6)",
    "with the safety net (4)",
    "with block descent (8)",
    "without repair",
)


def case(name: str, folder: Path) -> tuple[nn.Module, Tensor, Any, Tensor, Tensor]:
    """The model, an example, the queries, and images with labels that neither tests nor queries use."""
    if name == "efficientnet":
        x, y = efficientnet.images(folder)
        _, pool = efficientnet.divided(0, len(x))
        return efficientnet.network(), x[:1], x[pool[:64]], x[pool[64:]], y[pool[64:]]
    model, example = cifar.trained(folder), torch.zeros(1, 3, 32, 32)
    with np.load(folder / "cifar10_jpeg.npz") as raw:
        last = len(raw["train_labels"])
    cache = Path("build/ablation.safetensors")
    made = make_queries(model, example, "auto", n=256, seed=0, cache=cache)
    return model, example, made, *cifar.pictures(folder, "train", range(last - 2000, last))


def pruned(variant: str, model: nn.Module, example: Tensor, queries: Any, share: float) -> Result:
    if "(1" in variant:
        decide.held_out = lambda *_: None  # the curves on the queries themselves take their place
    ridge = 1e-3 if "2)" in variant else None
    repair = variant != "without repair" and Repair(ridge=ridge, descent="descent" in variant)
    asked: dict[str, Any] = {
        "method": Functional(exchange="exchange" not in variant),
        "queries": queries,
        "repair": repair,
        "compare": "safety" in variant,
    }
    if "two steps" in variant:
        half = prune(model, example, Budget(macs=share**0.5), **asked)
        return prune(half.model, example, Budget(macs=share**0.5), **asked)
    return prune(model, example, Budget(macs=share), **asked)


def work(job: Row) -> Row:
    torch.set_num_threads(job["threads"])
    model, example, queries, x, y = case(job["network"], Path(job["data"]))
    result, cost = measured(lambda: pruned(job["variant"], model, example, queries, job["share"]))
    with torch.no_grad():
        if job["network"] == "efficientnet":
            right = efficientnet.accuracy(result.model, x, y)
        else:
            right = round(100 * float((cifar.predictions(result.model, x, 100) == y).double().mean()), 2)
    return {"accuracy": right, "images": len(x), **cost}


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:  # noqa: ARG001 (one signature)
    for variant in VARIANTS:
        for network, share in CELLS:
            if network == "efficientnet" and "descent" in variant:
                continue  # at 224×224 it takes longer than the limit of a row
            yield f"{network}/{100 * share:g}/{variant}", {"network": network, "share": share, "variant": variant}


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=efficientnet.PACKAGES[:2], limit=1200, seeds=1)
