"""Models that the tests of the artifacts share, and the tools to damage a folder in a way that gets past its hashes."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune import Budget, Result, prune


def seeded(make: Any, seed: int = 0) -> nn.Module:
    """A model with weights of a seed, in evaluation mode, and batch norms that have seen something."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = make().eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


class Residual(nn.Module):
    """Convolutions, batch norms, and a sum that couples two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = x + self.outer(torch.relu(self.bn2(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """One weight with two names: the embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)
        self.out = nn.Linear(12, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(x + self.down(torch.relu(self.up(x))))


class Buffers(nn.Module):
    """A buffer that no state dict holds, a tensor that is no buffer, and a list of such tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("scale", torch.linspace(0.5, 2, 4), persistent=False)
        self.shift = torch.arange(4.0)
        self.tables = {"offsets": [torch.full((4,), 3.0)]}

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) * self.scale + self.shift + self.tables["offsets"][0]


class ReadsValues(nn.Module):
    """Its code looks at numbers while it is made, which a tensor without values does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.linspace(1, 3, 3)[1].item()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.b(torch.relu(self.a(x)))


class Attention(nn.Module):
    """Its forward reads a number of heads and a width, which surgery changes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.inner_dim = 4, 32
        self.qkv, self.proj = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.num_heads, -1).transpose(1, 2) for t in self.qkv(x).split(self.inner_dim, dim=-1))
        y = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, self.inner_dim))


def pruned(make: Any, example: Any, method: str = "l2", **more: Any) -> tuple[nn.Module, Result]:
    """(dense model, half of it), by default without queries, which is fast."""
    model = seeded(make)
    return model, prune(model, example, Budget(keep=0.5), method, **{"queries": None, **more})


def reseal(folder: Path) -> None:
    """Make the manifest's sizes and hashes those of the files, as somebody who forges a folder would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def edit(path: Path, change: Any) -> None:
    """Read a JSON file, let `change` alter what is in it, write it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def header_of(content: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def with_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file, whatever its header says."""
    return struct.pack("<Q", len(header)) + header + data
