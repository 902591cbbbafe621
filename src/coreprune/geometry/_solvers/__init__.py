"""Solvers of max log det Σ u_i p_i p_iᵀ over the simplex. One algorithm, one file, one signature.

Each takes U (n, r) of full column rank, a tolerance and an iteration limit, and returns a `Solution`. None certifies
anything: `mvee` recomputes the gap on the original points, whatever a solver says.
"""

from coreprune.geometry._solvers.interior_point import interior_point
from coreprune.geometry._solvers.solution import Solution

__all__ = ["Solution", "interior_point"]
