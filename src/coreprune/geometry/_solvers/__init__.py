"""Solvers of max log det Σ w_i p_i p_iᵀ over the simplex. One algorithm, one file, one signature.

Each takes U (n, r) of rank r ≥ 2, a tolerance, an iteration limit and starting weights > 0, and returns a `Solution`.
None certifies anything: `mvee` recomputes the gap on the original points, whatever a solver says.
"""
