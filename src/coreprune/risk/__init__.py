"""Bounds on the mean of a loss, from held-out samples, and tests along a path. Functions take tensors of losses."""

from coreprune.risk.bounds import Interval, interval, lower_bound, needed, shown_by, upper_bound, upper_quantile
from coreprune.risk.path import Path, Step, fixed_sequence

__all__ = [
    "Interval",
    "Path",
    "Step",
    "fixed_sequence",
    "interval",
    "lower_bound",
    "needed",
    "shown_by",
    "upper_bound",
    "upper_quantile",
]
