"""What the tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FACTORY = """
import torch
from torch import nn


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


def with_example():
    return net(), torch.zeros(1, 8)


def talkative():
    print("the user's code says hello")
    return net()


def sequence():
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3), nn.Unflatten(1, (1, 3)))
"""


def samples(n: int, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def everything(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, hidden files too: path -> content. The interpreter's own cache is left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }
