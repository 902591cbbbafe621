"""k-means: the partition of a point cloud into k clusters around their means."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._seed import as_generator
from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief
from coreprune._validate import as_points
from coreprune.errors import InputError


@dataclass(frozen=True)
class Clusters:
    """A partition of n points into k clusters.

    labels: (n,) int64, the cluster of every point, 0 … k−1. No cluster is empty. centres: (k, d) float64, the means of
    the clusters. inertia: Σ_i ‖p_i − centre of i‖².
    """

    labels: Int[Tensor, " n"]
    centres: Float[Tensor, "k d"]
    inertia: float
    __repr__ = brief


def kmeans(
    points: Float[Tensor, "n d"], k: int, seed: int | torch.Generator = 0, *, restarts: int = 10, rounds: int = 300
) -> Clusters:
    """Run Lloyd's algorithm from several k-means++ starts (Arthur & Vassilvitskii, SODA 2007), and return the best.

    points: (n, d), finite. k: the number of clusters, 1 … n. Exactly k are returned and none is empty, even if fewer
    points are distinct. seed: of the starts; a number, or a generator to draw from. restarts: the number of starts.
    rounds: at most so many iterations per start.

    Raises InputError for bad points, an impossible k, counts below 1, or a bad seed.
    """
    points, generator = as_points(points), as_generator(seed)
    n = len(points)
    for name, value, most in (("k", k, n), ("restarts", restarts, None), ("rounds", rounds, None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            limit = f"between 1 and {most}" if most is not None else "≥ 1"
            raise InputError(f"{name} must be a whole number {limit}, but it is {value!r}.")
    # Distances depend only on the Gram matrix, so n coordinates are enough where there are more columns than rows.
    flat = points - points.mean(dim=0)
    flat = torch.linalg.qr(flat.mT, mode="r").R.mT if points.shape[1] > n else flat
    if k in (1, n):
        labels = torch.arange(n, device=points.device) if k == n else torch.zeros_like(points[:, 0], dtype=torch.int64)
        return _clusters(points, labels, k)
    runs = [_lloyd(flat, k, generator, rounds) for _ in range(restarts)]
    labels, _ = min(runs, key=lambda run: run[1])
    return _clusters(points, labels, k)


def _lloyd(points: Tensor, k: int, generator: torch.Generator, rounds: int) -> tuple[Tensor, float]:
    centres = points[_plus_plus(points, k, generator)]
    labels = None
    for _ in range(rounds):
        distance = _squared(points, centres)
        nearest, found = distance.min(dim=1)
        found = _none_empty(found, nearest, k)
        if labels is not None and bool((found == labels).all()):
            break
        labels = found
        centres = _means(points, labels, k)
    assert labels is not None
    return labels, float((points - centres[labels]).square().sum())


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows, each drawn with probability proportional to its squared distance from the nearest row drawn before."""
    draws = torch.rand(k, generator=generator, dtype=torch.float64, device=generator.device).tolist()
    chosen = [int(draws[0] * len(points))]
    nearest = _squared(points, points[chosen])[:, 0]
    for draw in draws[1:]:
        total = nearest.cumsum(dim=0)
        if float(total[-1]) > 0:
            at = int(torch.searchsorted(total, draw * total[-1], right=True).clamp(max=len(points) - 1))
        else:  # every point coincides with a chosen one, so any other will do
            at = next(i for i in range(len(points)) if i not in set(chosen))
        chosen.append(at)
        nearest = torch.minimum(nearest, _squared(points, points[at : at + 1])[:, 0])
    return torch.tensor(chosen, device=points.device)


def _squared(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances, (n, k)."""
    cross = points @ centres.mT
    return (points.square().sum(dim=1, keepdim=True) - 2 * cross + centres.square().sum(dim=1)).clamp(min=0.0)


def _means(points: Tensor, labels: Tensor, k: int) -> Tensor:
    count = labels.bincount(minlength=k).to(points)
    return points.new_zeros(k, points.shape[1]).index_add_(0, labels, points) / count[:, None]


def _none_empty(labels: Tensor, nearest: Tensor, k: int) -> Tensor:
    """Move into every empty cluster the point farthest from its centre, out of a cluster that has more than one."""
    count = labels.bincount(minlength=k)
    for empty in (count == 0).nonzero()[:, 0].tolist():
        at = int(torch.where(count[labels] > 1, nearest, -1.0).argmax())
        count[labels[at]] -= 1
        labels[at], count[empty], nearest[at] = empty, 1, 0.0
    return labels


def _clusters(points: Tensor, labels: Tensor, k: int) -> Clusters:
    centres = _means(points, labels, k)
    return Clusters(labels, centres, float((points - centres[labels]).square().sum()))
