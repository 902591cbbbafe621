"""Pruning by layer-wise least squares with a local search, of the kind of OSSCAR (Meng et al., ICML 2024).

Written anew for the comparison in peers.py, for the blocks of the CIFAR ResNet alone. It shares no code with coreprune.
Every block keeps the same share of its inner channels. Block by block, with X the inputs of the second convolution in
the dense network, X' those in the network that is pruned so far, and W its weights, the error is min ‖W X − W' X'‖²
over the weights W' of the channels that stay. Channels leave one by one, the cheapest first; then a channel that stays
is exchanged for one that left while that lowers the error; then W' is written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import Block, ResNet

_RIDGE = 1e-3  # of the mean eigenvalue
_EXCHANGES = 20


@dataclass(frozen=True, eq=False)
class Problem:
    """inner: X'X'ᵀ (n, n) with the ridge. cross: W X X'ᵀ (out, n). size: features of one channel. All float64."""

    inner: Tensor
    cross: Tensor
    size: int

    def columns(self, channels: Sequence[int]) -> Tensor:
        return (torch.tensor(channels)[:, None] * self.size + torch.arange(self.size)).flatten()

    def gain(self, channels: Sequence[int]) -> float:
        """What the best weights of these channels explain: ‖W X‖² minus the error."""
        at = self.columns(channels)
        return float((self.cross[:, at] * self.weights(channels)).sum())

    def weights(self, channels: Sequence[int]) -> Tensor:
        at = self.columns(channels)
        return torch.linalg.solve(self.inner[at][:, at], self.cross[:, at].T).T


def chosen(problem: Problem, keep: int) -> list[int]:
    """The channels that stay."""
    left, size = list(range(len(problem.inner) // problem.size)), problem.size
    inverse = torch.linalg.inv(problem.inner)
    weights = problem.cross @ inverse
    while len(left) > keep:
        blocks = inverse.reshape(len(left), size, len(left), size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        parts = weights.reshape(-1, len(left), size).permute(1, 0, 2)
        losses = (parts * torch.linalg.solve(blocks, parts.mT).mT).sum(dim=(1, 2))
        at = int(losses.argmin())
        here = torch.arange(at * size, (at + 1) * size)
        rest = torch.tensor([i for i in range(len(inverse)) if i // size != at])
        step = torch.linalg.solve(inverse[here][:, here], inverse[here][:, rest])
        weights = weights[:, rest] - weights[:, here] @ step
        inverse = inverse[rest][:, rest] - inverse[rest][:, here] @ step
        left.pop(at)
    return exchanged(problem, left)


def exchanged(problem: Problem, kept: list[int]) -> list[int]:
    """The same number of channels, after exchanges that lower the error."""
    n, best = len(problem.inner) // problem.size, problem.gain(kept)
    for _ in range(_EXCHANGES):
        gone = [c for c in range(n) if c not in kept]
        least = min(kept, key=lambda c: best - problem.gain([k for k in kept if k != c]))
        tries = [sorted([*(k for k in kept if k != least), c]) for c in gone]
        gains = [problem.gain(one) for one in tries]
        if not gains or max(gains) <= best * (1 + 1e-9):
            break
        best = max(gains)
        kept = tries[gains.index(best)]
    return kept


@torch.no_grad()
def prune(dense: ResNet, images: Tensor, share: float) -> ResNet:
    """A copy in which every block keeps this share of its inner channels. images: (N, 3, 32, 32), unlabelled."""
    small = copy.deepcopy(dense)
    x = F.relu(dense.bn1(dense.conv1(images)))
    theirs = x
    for whole, part in zip(_blocks(dense), _blocks(small), strict=True):
        hidden = F.relu(whole.bn1(whole.conv1(x)))
        now = F.relu(part.bn1(part.conv1(theirs)))
        problem = _problem(whole.conv2, hidden, now)
        kept = chosen(problem, max(1, round(share * hidden.shape[1])))
        _narrow(part, kept, problem.weights(kept))
        x, theirs = whole(x), part(theirs)
    return small


def narrowed(dense: ResNet, share: float) -> ResNet:
    """As `prune` in its widths alone."""
    small = copy.deepcopy(dense)
    for block in _blocks(small):
        kept = list(range(max(1, round(share * block.conv1.out_channels))))
        _narrow(block, kept, block.conv2.weight[:, kept].flatten(1))
    return small


def _blocks(model: ResNet) -> list[Block]:
    return [block for layer in (model.layer1, model.layer2, model.layer3) for block in layer]  # type: ignore[misc]


def _problem(reader: nn.Conv2d, dense: Tensor, pruned: Tensor) -> Problem:
    n = reader.in_channels * 9
    inner, cross = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for a, b in zip(dense.split(16), pruned.split(16), strict=True):
        rows = [F.unfold(x, 3, padding=1).permute(1, 0, 2).reshape(n, -1).double() for x in (a, b)]
        inner += rows[1] @ rows[1].T
        cross += rows[0] @ rows[1].T
    inner += _RIDGE * inner.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    # The ridge draws towards the weights as they are, not towards zero.
    cross += _RIDGE * inner.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    return Problem(inner, reader.weight.double().flatten(1) @ cross, 9)


def _narrow(block: Block, kept: list[int], weights: Tensor) -> None:
    at = torch.tensor(kept)
    for module, names in ((block.conv1, ("weight",)), (block.bn1, ("weight", "bias", "running_mean", "running_var"))):
        for name in names:
            tensor = getattr(module, name)
            value = tensor[at].clone()
            setattr(module, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
    block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = len(kept)
    block.conv2.weight = nn.Parameter(weights.reshape(-1, len(kept), 3, 3).to(block.conv2.weight))
