"""Models whose batch is not axis 0 of every input, or that have none, with an example for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gcn(nn.Module):
    """A graph: nodes and edges."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(torch.zeros_like(h).index_add_(0, edges[1], h[edges[0]]))


class DenseGraph(nn.Module):
    """A graph with a matrix of its edges."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
        return self.c(adjacent @ F.relu(self.b(adjacent @ F.relu(self.a(x)))))


class EdgeFeatures(nn.Module):
    """A graph whose edges have numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.e, self.b = nn.Linear(16, 32), nn.Linear(4, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        message = F.relu(self.a(x))[edges[0]] * torch.sigmoid(self.e(features))
        to = (edges[1] == torch.arange(len(x))[:, None]).to(message.dtype)
        return self.b(to @ message)


class Cloud(nn.Module):
    """Points of which only the largest values count."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 32), nn.Linear(32, 64), nn.Linear(64, 5)

    def forward(self, points: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(points)))).amax(0))


class ImageList(nn.Module):
    """A list of images, as detectors take it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.b(F.relu(self.a(torch.stack(list(images)))))


class OneImage(nn.Module):
    """Convolutions of one image: plain, depthwise, in groups and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(8, 12, 2)
        self.deep, self.parts = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.b, self.c = nn.Conv2d(16, 8, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.parts(F.relu(self.deep(F.relu(self.a(x))))))
        return self.c(F.relu(self.up(F.max_pool2d(F.relu(self.b(x)), 2))).mean((1, 2)))


class TimeFirst(nn.Module):
    """nn.Transformer's default layout, (T, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(20, 1, 32))
        self.t = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.t(x + self.p[: len(x)]).mean(0)


class Masked(TimeFirst):
    """The same with a mask (N, T), and all steps as outputs."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.t(x + self.p[: len(x)], src_key_padding_mask=mask)


class Recurrent(nn.Module):
    """A recurrent layer with batch_first=False."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.h, self.o = nn.GRU(8, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        return self.o(F.relu(self.h(self.r(x, start)[0])))


class Pair(nn.Module):
    """A sequence (T, N, C) and a vector (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, steps: Tensor, v: Tensor) -> Tensor:
        return self.c(F.relu(self.a(steps).mean(0) + self.b(v)))


@dataclass(frozen=True)
class Layout:
    """build: makes the model. example: makes its inputs. axes: where the samples lie, for every leaf."""

    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    axes: tuple[int | None, ...]


def vector_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def _r(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _edges() -> Tensor:
    return torch.randint(0, 10, (2, 30), generator=torch.Generator().manual_seed(0))


LAYOUTS = {
    "graph, dense": Layout(DenseGraph, lambda: (_r(10, 16), _r(10, 10)), (None, None)),
    "graph, edge features": Layout(EdgeFeatures, lambda: (_r(10, 16), _edges(), _r(30, 4)), (None,) * 3),
    "point cloud": Layout(Cloud, lambda: _r(40, 3), (None,)),
    "images": Layout(ImageList, lambda: ([_r(3, 8, 8), _r(3, 8, 8) + 1],), (None, None)),
    "one image": Layout(OneImage, lambda: _r(3, 12, 12), (None,)),
    "vector": Layout(vector_mlp, lambda: _r(8), (None,)),
    "time first": Layout(TimeFirst, lambda: _r(7, 2, 32), (1,)),
    "time first, one sample": Layout(TimeFirst, lambda: _r(7, 1, 32), (1,)),
    "time first, mask": Layout(Masked, lambda: (_r(7, 3, 32), torch.zeros(3, 7, dtype=torch.bool)), (1, 0)),
    "time first, as many": Layout(Masked, lambda: (_r(7, 7, 32), torch.zeros(7, 7, dtype=torch.bool)), (1, 0)),
    "recurrent": Layout(Recurrent, lambda: (_r(7, 2, 8), _r(1, 2, 16)), (1, 1)),
    "pair": Layout(Pair, lambda: {"steps": _r(5, 2, 6), "v": _r(2, 8)}, (1, 0)),
    "pair, one sample": Layout(Pair, lambda: {"steps": _r(5, 1, 6), "v": _r(1, 8)}, (1, 0)),
}
