"""The error of a group as a function of its width."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coreprune.graph import Group
from coreprune.pruning.allocation.ladders import sections_of


def widths_curve(errors: Tensor, group: Group) -> Tensor:
    """The error at every width, (units per section + 1,), from the errors of the first k units of a balanced order."""
    return errors[:: sections_of(group)]


def balanced(order: Tensor, group: Group) -> Tensor:
    """The order with the sections taking turns, so that its first w·sections units are the first w of every section."""
    if group.sections is None:
        return order
    sections = group.sections.to(order.device)[order]
    turns = torch.zeros_like(order)
    for b in range(sections_of(group)):
        turns[sections == b] = torch.arange(int((sections == b).sum()), device=order.device)
    return order[torch.argsort(turns, stable=True)]


def hull(x: list[int], y: list[float]) -> list[float]:
    """The lower convex hull of the points (x, y), evaluated at every x."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return np.interp(x, [x[c] for c in corners], [y[c] for c in corners]).tolist()
