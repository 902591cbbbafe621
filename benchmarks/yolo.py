"""The detectors of `ultralytics` from their yaml, as a user has them: pruned to half, run, trained and exported.

    make build/zoo-env/.done      # an environment with ultralytics; then pip install onnx onnxscript onnxruntime in it
    build/zoo-env/bin/python benchmarks/yolo.py [--only REGEX] [--threads 2]

Each network is pruned cold, and after a forward that fills its tables of anchors: prune(model, x, Budget(macs=0.5),
"magnitude", queries=None). The rows say what share of the multiply-accumulates is left, whether the result runs at
other batch and image sizes, whether all parameters get a gradient in training mode, how far the outputs of the ONNX
file are from it, and whether the model that was given is as it was. That the cut is exact is shown by zoo.py. Random
weights. Writes results/yolo.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("YOLO_CONFIG_DIR", "/tmp")

import torch
from torch import nn
from torch.utils import _pytree as pytree

from children import Row, measured
from coreprune import Budget, export_onnx, prune
from table import run
from zoo_models import models
from zoo_peer import first_line, outputs

NETWORKS = "yolov5n yolov8n yolov8n-seg yolo11n yolo12n yolo26n"
SIZE, SIZES = 128, ((1, 160), (3, 128), (2, 224))  # of the example, and (batch, size) of others


def work(job: Row) -> Row:
    """One row. job: the network, and whether it has run before."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = next(m for m in models() if m.key == f"ultralytics/{job['network']}").build().float().eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    if job["warm"]:
        with torch.no_grad():
            model(torch.randn(1, 3, 2 * SIZE, SIZE))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result, row = measured(lambda: prune(model, x, Budget(macs=0.5), "magnitude", queries=None, progress=False))
    small, after = result.model, model.state_dict()
    row["unchanged"] = before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    row["macs"] = round(result.report.macs[1] / result.report.macs[0], 4)
    shapes = [[t.shape for t in outputs(m, ((torch.randn(b, 3, n, n),), {}))] for m in (model, small) for b, n in SIZES]
    row["other_sizes"] = shapes[: len(SIZES)] == shapes[len(SIZES) :]
    row["trained"] = _trained(small)
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = export_onnx(small, x, Path(folder) / "small.onnx")
            row |= {"onnx_difference": done.difference, "onnx_batch": done.batch}
    except Exception as error:
        row["onnx"] = first_line(error)
    return row


def _trained(model: nn.Module) -> float:
    """The share of the parameters that are to be trained that get a gradient in a step of training."""
    model.train()
    made = [t for t in _leaves(model(torch.randn(2, 3, SIZE, SIZE))) if t.is_floating_point() and t.requires_grad]
    torch.stack([t.square().mean() for t in made]).sum().backward()
    wanted = [p for p in model.parameters() if p.requires_grad]
    return round(sum(p.grad is not None for p in wanted) / len(wanted), 4)


def _leaves(result: object) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:  # noqa: ARG001 (the runner calls it)
    for name in NETWORKS.split():
        for warm in (False, True):
            yield f"{name}/{'warm' if warm else 'cold'}", {"network": name, "warm": warm}


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=("ultralytics", "onnx", "onnxruntime"), limit=900)
