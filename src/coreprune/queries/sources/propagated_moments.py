"""Gaussian inputs with the covariance that the weights of a trained first layer imply."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Tensor
from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.image_shape import first_weight


@dataclass(frozen=True)
class PropagatedMoments:
    """Gaussian vectors with the covariance that remains of WᵀW after subtracting the initialisation's part.

    Gradient descent adds multiples of training inputs to the rows of the first layer's weight W. So WᵀW is a weighted
    second moment of the training inputs, plus a multiple of the identity that the random initialisation left. The
    median of the positive eigenvalues is taken for this multiple and subtracted. The result is scaled to a variance
    of 1 on average, as normalised inputs have it.

    floor: a share of the mean variance that is added in all directions, so that none is left out.
    """

    floor: float = 0.05
    name = "propagated-moments"
    kind = "vectors"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
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
