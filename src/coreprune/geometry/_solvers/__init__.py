"""Solvers of max log det Σ w_i p_i p_iᵀ over the simplex. One algorithm, one file, one signature.

Each takes U (n, r) of rank r ≥ 2, a tolerance, an iteration limit and starting weights > 0, and returns a `Solution`.
None certifies anything: `mvee` recomputes the gap on the original points, whatever a solver says.
"""

from coreprune.geometry._solvers.fixed_point import fixed_point
from coreprune.geometry._solvers.interior_point import interior_point
from coreprune.geometry._solvers.solution import Solution, Solver
from coreprune.geometry._solvers.wolfe_atwood import wolfe_atwood
from coreprune.geometry._solvers.working_set import working_set

__all__ = ["Solution", "Solver", "fixed_point", "interior_point", "wolfe_atwood", "working_set"]
