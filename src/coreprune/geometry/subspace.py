"""The span of a point cloud: orthonormal coordinates, and the rank decision that everything else relies on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Num, Tensor
from coreprune._shown import brief
from coreprune._validate import as_points
from coreprune.errors import InputError

# Squares of entries enter every Gram matrix. Outside this range they would silently overflow or vanish.
LARGEST, SMALLEST = 1e150, 1e-150


@dataclass(frozen=True)
class Span:
    """`points = coordinates @ diag(singular_values) @ basis.T @ diag(scale)` up to the rank cut.

    coordinates: (n, r), orthonormal columns. basis: (d, r), orthonormal columns, in the equilibrated space.
    singular_values: (r,), decreasing. scale: (d,), powers of two that equilibrate the columns. rank: r.
    """

    coordinates: Float[Tensor, "n r"]
    basis: Float[Tensor, "d r"]
    singular_values: Float[Tensor, " r"]
    scale: Float[Tensor, " d"]
    rank: int
    __repr__ = brief

    @property
    def whitening(self) -> Float[Tensor, "d r"]:
        """The map to coordinates: `points @ whitening == coordinates`."""
        return self.basis / self.singular_values / self.scale[:, None]


def column_scale(points: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Powers of two that bring the largest entry of every column into [1/2, 1); 1 for zero columns.

    Dividing by powers of two is exact, so two clouds that differ by such a scaling give identical results.
    Raises InputError where squared entries would leave the range of float64.
    """
    largest = points.abs().amax(dim=0)
    bad = (largest > LARGEST) | ((largest > 0) & (largest < SMALLEST))
    if bool(bad.any()):
        column = int(torch.nonzero(bad)[0, 0])
        raise InputError(
            f"column {column} has entries of size {float(largest[column]):.1e}, whose squares float64 cannot hold. "
            "Rescale the points first."
        )
    _, exponent = torch.frexp(largest)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def span(points: Num[Tensor, "n d"]) -> Span:
    """Orthonormal coordinates of `points` (n, d) in their span, in float64.

    With D = diag(scale) and P D⁻¹ = U S Wᵀ, the directions with σ > max(n, d)·2⁻⁵²·σ₁ are kept. The columns are
    equilibrated before the cut, because the ellipsoid and the leverage scores are affine invariant: a feature measured
    in other units (1e-8 or 1e8) must not be mistaken for rounding. The rows are not equilibrated, so a point that is
    shorter than the rounding errors of the others counts as zero.

    Raises InputError for points that are not a finite real matrix, or whose squares overflow.
    """
    points = as_points(points)
    scale = column_scale(points)
    u, s, basis = singular(points / scale)
    return Span(u, basis, s, scale, len(s))


def singular(a: Float[Tensor, "n d"], noise: Float[Tensor, " d"] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition U (n, r), σ (r,), W (d, r) of `a` after the rank cut.

    noise: (d,) a bound on the rounding error of the entries of each column. A direction w is also cut when this error
    alone explains its singular value, σ ≤ √n ‖noise∘w‖.
    """
    n = len(a)
    u, s, wt = torch.linalg.svd(a, full_matrices=False)
    keep = s > max(a.shape) * 2.0**-52 * s[0]
    if noise is not None:
        keep &= s > n**0.5 * torch.linalg.vector_norm(wt * noise, dim=1)
    # The decomposition leaves rounding errors in the rows of zero points. Weights and scores need exact zeros there.
    u = torch.where((a != 0).any(dim=1)[:, None], u[:, keep], 0.0)
    return u, s[keep], wt[keep].T


def coordinates(
    a: Float[Tensor, "n d"], noise: Float[Tensor, " d"] | None = None
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "d r"]]:
    """U = a @ B (n, r) with nearly orthonormal columns, and B (d, r). The rank decision is that of `singular`.

    Uses Cholesky-QR where the Gram matrix proves that the columns are well conditioned (‖L‖_F‖L⁻¹‖_F bounds the
    condition number from above). This is several times faster than the singular value decomposition used otherwise.
    """
    n, d = a.shape
    if n >= d:
        factor, failed = torch.linalg.cholesky_ex(a.T @ a)
        if not int(failed):
            eye = torch.eye(d, dtype=a.dtype, device=a.device)
            inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
            smallest = 1 / float(torch.linalg.matrix_norm(inverse))
            floor = 0.0 if noise is None else 10 * n**0.5 * float(noise.max())
            if smallest > 1e-5 * float(torch.linalg.matrix_norm(factor)) and smallest > floor:
                return a @ inverse.T, inverse.T
    u, s, basis = singular(a, noise)
    return u, basis / s
