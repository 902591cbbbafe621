"""Peeling as in public code of the paper's first author, for comparison. Nothing is certified by it."""

from __future__ import annotations

import torch

from coreprune._shapes import Float, Tensor
from coreprune._validate import as_points
from coreprune.coreset.linf import _axes
from coreprune.geometry import mvee, span

_TOL = 0.01  # of the ellipsoid, as there
_FLAT = 1e-12  # axes below this share of the longest are rounding


def authors_importance(weighted: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], int]:
    """Importances α/l of rows that leave in round l, with α = 4·r^1.5, and the number of rounds.

    After github.com/muradtuk/ProjectiveClusteringCoresets (Tukan, Wu, Zhou, Braverman & Feldman 2022), which has an
    L-infinity coreset of this kind as a part: the *general* Löwner ellipsoid (of the points lifted by a 1), scaled by
    1/r about its centre c so that it lies in the hull; the ends c ± e of all its axes; their Carathéodory sets, whose
    union leaves. α is a constant of r, the rank of the points, whatever the ellipsoid was (there, for the z-th power,
    it is 2^{z+1}·r^{1.5z}). Peeling ends when at most 2(r + 1) points are left; they get the value of the last round.
    So 2(r + 1) points or fewer all get α, and sampling by it is uniform. Of the pruning paper's own code this says
    nothing.

    weighted: (n, d) a_i = c_i p_i. Zero rows get 0. Differences: the hull's combinations start from the ellipsoid's
    weights and not from a linear program, and the ellipsoid is ours.
    """
    points = as_points(weighted)
    out = points.new_zeros(len(points))
    left = points.abs().amax(dim=1).nonzero().flatten()
    if not len(left):
        return out, 0
    rank = span(points[left]).rank
    alpha, rounds = 4.0 * rank**1.5, 0
    while len(left) > 2 * (rank + 1):
        rounds += 1
        gone = _round(_within_span(points[left]))
        out[left[gone]] = alpha / rounds
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        left = left[stays]
    out[left] = alpha / max(rounds, 1)
    return out, rounds


def _within_span(points: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
    """Coordinates in an orthonormal basis of the span: an isometry, so that the axes stay what they are."""
    return points @ torch.linalg.svd(points, full_matrices=False).Vh[: span(points).rank].mT


def _round(points: Float[Tensor, "n r"]) -> Tensor:
    """The rows that one round takes, in coordinates of full column rank."""
    if points.shape[1] == 1:
        return torch.stack([points[:, 0].argmin(), points[:, 0].argmax()]).unique()
    ellipsoid = mvee(points, symmetric=False, tol=_TOL)
    support = ellipsoid.support
    u = ellipsoid.weights[support]
    centred = points[support] - ellipsoid.center
    eigenvalues, axes = torch.linalg.eigh(ellipsoid.shape)
    real = eigenvalues > _FLAT * eigenvalues[-1]
    ends = centred @ (axes[:, real] / eigenvalues[real].sqrt()) / ellipsoid.radius_squared**0.5
    return support[_axes(points[support], u, ends)]
