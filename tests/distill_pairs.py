"""A small student and its teacher, and queries for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from coreprune import Budget, prune
from small_networks import mlp


@dataclass
class Rows:
    """The part of Queries that the distillation relies on."""

    args: tuple = ()
    kwargs: dict | None = None
    shared: frozenset = frozenset()
    n: int = 0

    def __len__(self):
        return self.n or len((*self.args, *(self.kwargs or {}).values())[0])

    def batches(self, size):
        assert size == len(self)
        yield self.args, self.kwargs or {}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, 1, 1), nn.Sequential(Residual(), Residual())
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.drop(self.blocks(torch.relu(self.stem(x))).mean((2, 3))))


def convnet() -> Net:
    """With the statistics of a batch in its batch norms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            net(torch.randn(64, 3, 8, 8))
    return net.eval()


def mlp_pair():
    """A teacher, and a student with every second hidden unit."""
    teacher, student = mlp(), mlp()
    student[0], student[2], student[4] = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(6, 3)
    with torch.no_grad():
        for i, (rows, columns) in {0: (2, 1), 2: (2, 2), 4: (1, 2)}.items():
            student[i].weight.copy_(teacher[i].weight[::rows, ::columns])
            student[i].bias.copy_(teacher[i].bias[::rows])
    return student, teacher


def conv_pair():
    """A teacher, and a student with every second inner channel of the residual blocks."""
    teacher = convnet()
    student = copy.deepcopy(teacher)
    for small, full in zip(student.blocks, teacher.blocks, strict=True):
        small.conv1, small.bn1 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        small.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        with torch.no_grad():
            small.conv1.weight.copy_(full.conv1.weight[::2])
            small.conv2.weight.copy_(full.conv2.weight[:, ::2])
            for name, tensor in full.bn1.state_dict().items():
                small.bn1.state_dict()[name].copy_(tensor[::2] if tensor.dim() else tensor)
    return student.eval(), teacher


def stream_pair():
    """A teacher, and a student whose residual stream is narrower, and so is every block's output."""
    teacher = convnet()
    return prune(teacher, torch.zeros(1, 3, 8, 8), Budget(keep=0.75), "l2", queries=None).model, teacher


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
