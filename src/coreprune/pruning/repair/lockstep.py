"""Lockstep repair: refit every linear map that lost inputs, in execution order, to what the original computes.

The original and the pruned model are run through the same graph side by side. At a layer whose inputs have changed, X
is its input in the pruned model, and T is its output in the original. If the output goes into a residual sum, T is
chosen such that the sum is matched, given the output of the pruned model's other branch. The fit is ridge least
squares, pulled towards the weights before the repair.

If only a ReLU reads the result, values that are cut off in the original need not be matched: they only have to be cut
off too. So the targets are renewed from the fit a few times. Each time the least squares majorises this one-sided
error, and the fit goes somewhat beyond its minimum.

Later layers read the outputs of the repaired layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coreprune._progress import Progress
from coreprune.graph.execution import last_uses
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.repair.refit import Refit, refit_once
from coreprune.pruning.repair.walk import Cut, Walk
from coreprune.pruning.unfinished import Unfinished


def repaired(
    cut: Cut, calibration: Calibration, options: Repair, tell: Progress, state: Unfinished | None = None
) -> tuple[dict[str, Tensor], list[Refit]]:
    """Refit the pruned model. Returns its parameters and buffers in the original's shapes, and what was refit.

    state: keeps every layer as it is refit.
    """
    walk, state = Walk(cut, calibration), state or Unfinished()
    done: list[Refit] = []
    nodes, uses = walk.order, last_uses(walk.order)
    with torch.no_grad():
        for i, node in enumerate(nodes[: walk.end]):
            walk.lead(node)
            if walk.refittable(node, options.producers):
                fit = refit_once(walk, walk.operators[node], options, state)
                done += [] if fit is None else [fit]
            walk.follow(node)
            walk.forget(uses[node])
            tell("repair", i + 1, walk.end)
    return walk.small.tensors, done  # type: ignore[return-value]
