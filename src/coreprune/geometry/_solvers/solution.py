"""What every solver returns."""

from __future__ import annotations

from dataclasses import dataclass

from coreprune._shapes import Float, Tensor


@dataclass(frozen=True)
class Solution:
    """Weights on the simplex, the number of iterations, and whether the solver met its tolerance."""

    weights: Float[Tensor, " n"]
    iterations: int
    converged: bool
