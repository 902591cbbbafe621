"""Compare a feature that has lost channels with the original's, through a fixed affine map."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coreprune.coreset.regression import LeastSquares
from coreprune.pruning.calibration.padding import NOWHERE, Ends
from coreprune.pruning.calibration.rows import Batch
from coreprune.pruning.distill.block_outputs import Watched, lost_axis

_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class Readout:
    """x ↦ W x + b along one axis: predicts all channels of the original from those of the pruned model.

    axis: of the channels. weight: (channels of the original, channels left). bias: (channels of the original,).

    The map is fit once, before the training, and then fixed. Otherwise the map would be trained, and not the features.
    """

    axis: int
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """A feature of the pruned model in the original's shape, float64 or float32."""
        x = x if x.dtype == torch.float64 else x.float()
        return (x.movedim(self.axis, -1) @ self.weight.to(x).T + self.bias.to(x)).movedim(-1, self.axis)


@torch.no_grad()
def fit_readouts(
    student: nn.Module, teacher: nn.Module, names: list[str], batches: Iterable[Batch], ends: Ends = NOWHERE
) -> list[Readout | None]:
    """Fit a map for every call of the named modules, in the order of the calls; None if the shapes agree already.

    The fit is ridge least squares with intercept on the batches, in float64. ends: where texts have padding, which is
    left out.
    """
    fits: list[LeastSquares | None] = []
    axes: list[int] = []
    with Watched(student, names) as seen, Watched(teacher, names) as wanted:
        for args, kwargs in batches:
            padding = ends.of((args, kwargs))
            student(*args, **kwargs)
            teacher(*args, **kwargs)
            pairs = list(zip(seen.take(), wanted.take(), strict=True))
            if not fits:
                axes = [lost_axis(mine.shape, theirs.shape) or 0 for mine, theirs in pairs]
                fits = [LeastSquares() if axis else None for axis in axes]
            if not any(axes):
                break
            for fit, axis, pair in zip(fits, axes, pairs, strict=True):
                if fit is not None:
                    left = (padding.without(value).movedim(axis - value.dim(), -1) for value in pair)
                    x, y = (value.flatten(0, -2)[None].double() for value in left)
                    fit.add(x, y)
    return [None if fit is None else _solved(fit, axis) for fit, axis in zip(fits, axes, strict=True)]


def _solved(fit: LeastSquares, axis: int) -> Readout:
    mean_x, mean_y, _, _ = fit.moments()
    weight, bias = fit.solve(mean_x.new_zeros(1, mean_y.shape[1], mean_x.shape[1]), _RIDGE)
    return Readout(axis, weight[0], bias[0])
