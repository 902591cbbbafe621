"""Readers of real layers, on real queries, for `selection.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import efficientnet
import minilm
from coreprune._progress import silent
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.calibration.statistics import Collect, collect_readers
from coreprune.pruning.stages import trace
from texts import encyclopedia, sentences

WIDE = 300  # units; narrower groups cost nothing


def layers(data: Path, folder: Path) -> dict[str, Any]:
    """Units, p and readers (with their folds) of every group with at least WIDE units, by network and group."""
    found: dict[str, Any] = {}
    for network, (model, example, queries) in (
        ("LeNet-300-100", lenet(data)),
        ("MiniLM", mini(data, folder)),
        ("EfficientNet-Lite0", images(data)),
    ):
        traced = trace(model, example, silent)
        calibration = gather(traced, Asked(example, queries), 0, silent)
        readers = collect_readers(traced, calibration, Collect(), torch.Generator().manual_seed(0), silent)
        for name, group in traced.free.items():
            units = group.size // group.unit
            if units >= WIDE and readers[name]:
                pairs = [
                    (r.covariance, r.gram, [(fold.seen, fold.unseen, fold.gram) for fold in r.folds])
                    for r in readers[name]
                ]
                p = readers[name][0].mean.numel() // units
                found[f"{network} {name}"] = {"units": units, "p": p, "readers": pairs}
    return found


def lenet(data: Path) -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    model.load_state_dict(load_file(data / "lenet300_mnist.safetensors"))
    pixels = torch.from_numpy(np.load(data / "mnist.npz")["train_images"][:2000].reshape(2000, -1))
    x = (pixels.float() / 255 - 0.1307) / 0.3081
    return model.eval(), x[:1], x


def mini(data: Path, folder: Path) -> tuple[nn.Module, Any, Any]:
    from tokenizers import Tokenizer
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    x = minilm.batch(tokenizer, sentences(encyclopedia(data, "samples"), 128, 0), minilm.LENGTH)
    return model, {name: each[:1] for name, each in x.items()}, x


def images(data: Path) -> tuple[nn.Module, Any, Any]:
    x, _ = efficientnet.images(data)
    _, pool = efficientnet.divided(0, len(x))
    return efficientnet.network(), x[:1], x[pool[:64]]
