"""Checks for all public functions that take points or weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coreprune.errors import InputError


def as_points(points: object, name: str = "points") -> Tensor:
    """Return `points` as a finite float64 tensor of shape (n, d), on its own device.

    Raises InputError for anything else, and names the first bad row.
    """
    if not isinstance(points, Tensor):
        try:
            points = torch.as_tensor(points)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} must be a 2-d tensor of floats, not {type(points).__name__}.") from error
    if points.ndim != 2:
        raise InputError(f"{name} must be a matrix with one point per row, but its shape is {tuple(points.shape)}.")
    if points.is_complex() or points.dtype == torch.bool:
        raise InputError(f"{name} must hold real numbers, but its dtype is {points.dtype}.")
    if points.shape[0] == 0 or points.shape[1] == 0:
        raise InputError(f"{name} is empty: its shape is {tuple(points.shape)}. Pass at least one point.")
    points = points.detach().to(torch.float64)
    # A finite sum proves that all entries are finite, and is many times faster than checking each of them. But the sum
    # of finite entries may overflow, so entries are checked if it is not finite.
    if not math.isfinite(float(points.sum())) and not bool((finite := torch.isfinite(points).all(dim=1)).all()):
        row = int(torch.nonzero(~finite)[0, 0])
        raise InputError(f"{name} has a NaN or infinite entry in row {row}. Remove or repair that row first.")
    return points
