"""Gaussian inputs with the second moment that a trained first layer implies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from coreprune._shapes import Tensor
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.image_shape import first_weight


@dataclass(frozen=True)
class PropagatedMoments:
    """Vectors, Gaussian, with the covariance that is left of WᵀW when the initialisation is taken out.

    Gradient descent adds multiples of training inputs to the rows of the first layer's W, so WᵀW is their second
    moment, weighted, plus the isotropic rest of the random initialisation. The latter is taken for the median
    eigenvalue (of those above zero) and subtracted; `floor` of the mean is added back, so that no direction is left
    out. The covariance is scaled to unit variance on average, as normalised inputs have.
    """

    floor: float = 0.05
    name: ClassVar[str] = "propagated-moments"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs."""
        if self.floor < 0:
            raise InputError(f"floor={self.floor} is a share of the mean variance and cannot be negative.")
        weight = first_weight(target) if target.example.is_floating_point() else None
        if weight is None:
            raise InputError("no linear layer reads these inputs directly. Take another source, such as white-noise.")
        _, singular, directions = torch.linalg.svd(weight, full_matrices=False)  # (k,), (k, d)
        power = singular.square()
        nonzero = power[power > power.max() * 1e-12]
        excess = (power - nonzero.median()).clamp_min(0) if len(nonzero) else power
        d = weight.shape[1]
        mean = float(excess.sum()) / d
        floor, excess = (self.floor, excess / mean) if mean > 0 else (1.0, excess)
        rest = floor**0.5 * torch.randn(n, *target.shape, generator=generator, dtype=torch.float64)
        told = torch.randn(n, *target.shape[:-1], len(excess), generator=generator, dtype=torch.float64)
        x = rest + (told * excess.sqrt()) @ directions
        tell(1, 1)
        return target.cast(x / (floor + (1.0 if mean > 0 else 0.0)) ** 0.5)
