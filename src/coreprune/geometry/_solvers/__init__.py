"""Solvers of max log det Σ w_i p_i p_iᵀ over the simplex. Each algorithm has its own file; all share one signature.

Each takes U (n, r) of rank r ≥ 2, a tolerance, an iteration limit and starting weights > 0, and returns a `Solution`.
The solvers certify nothing: `mvee` recomputes the gap on the original points.
"""
