"""The least squares problem of one layer: which outputs are fitted, and to what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.repair.residual_paths import Path, affine
from coreprune.pruning.repair.walk import Walk


@dataclass(frozen=True, eq=False)
class Problem:
    """The least squares problem of one operator: which outputs, and the affine map behind them (scale · y + shift)."""

    operator: Operator
    path: Path
    scale: Tensor  # (g, 1, o)
    shift: Tensor
    groups: Tensor
    kept: Tensor
    rows: int

    def part(self, matrix: Tensor) -> Tensor:
        """From (g, o, …), the groups and outputs that are solved for, with the sign that they have behind the path."""
        return matrix[self.groups][:, self.kept] * self._sign

    def entered(self, matrix: Tensor, part: Tensor) -> Tensor:
        """A copy of `matrix` with `part` written where `part()` reads."""
        new = matrix.clone()
        new[self.groups[:, None], self.kept[None, :]] = part * self._sign
        return new

    @property
    def worth(self) -> Tensor:
        """What a squared error of each output is worth behind the path, (g, o)."""
        return self.scale.square().mT[self.groups][:, self.kept][..., 0]

    @property
    def _sign(self) -> Tensor:
        return _sign(self.scale).mT[self.groups][:, self.kept]  # (g, o, 1)

    def batch(self, walk: Walk, b: int, alive: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features (g, rows, f), targets, and the outputs at which the value behind the path is zero, (g, o, rows).

        b: among the batches of this process.
        """
        operator, path = self.operator, self.path
        unread = operator.node in walk.unread
        full = walk.full.batch(operator.source if unread else path.join or operator.node, b)
        features = operator.matrix(walk.full.tensors[operator.weight]).shape[2]
        most = max(min(self.rows, max(self.rows // 2, 64 * walk.samples)), 16 * features)
        rows = walk.padding(walk.share.numbers[b]).rows(operator, full, most // walk.count + 1)
        x = operator.features(walk.small.batch(operator.source, b), rows, alive)
        kept, scale, shift = self.kept, self.scale, self.shift
        mix = walk.mixes.get(operator.weight)
        alone = mix is None and operator.groups == 1  # then nothing needs the outputs that are not solved for
        if alone:
            scale, shift = scale[:, :, kept], shift[:, :, kept]

        def outputs(value: Tensor) -> Tensor:
            found = operator.outputs(value, rows)
            return (found[:, :, kept] if alone else found).double()

        y = walk.computed(operator, full, rows, kept if alone else None).double() if unread else outputs(full)
        if mix is not None:
            y = y @ mix.map.mT.to(y.device)
        size = scale.abs()
        if path.join is not None and path.other is not None:
            behind = outputs(walk.small.batch(path.other, b)) + shift
            masked = torch.isinf(y) | torch.isinf(behind)
            y, zero = (y - behind) / size, behind / -size
            if bool(masked.any()):  # by the other branch: there nothing is left of the sum that could be matched
                own = outputs(walk.full.batch(operator.node, b))
                own = own if mix is None else own @ mix.map.mT.to(own.device)
                y, zero = torch.where(masked, own * _sign(scale), y), torch.where(masked, -torch.inf, zero)
        else:
            y, zero = y * _sign(scale), (-shift / size).expand_as(y)
        if alone:
            return x, y.mT, zero.mT
        if self.operator.groups > 1:
            x, y, zero = x[self.groups], y[self.groups], zero[self.groups]
        return x, y[:, :, kept].mT, zero[:, :, kept].mT


def problem_of(walk: Walk, operator: Operator, path: Path, start: Tensor, rows: int) -> Problem | None:
    """Which outputs to solve for, and the affine map behind them; None if there is no output to solve for."""
    outputs = start.shape[0] * start.shape[1]
    scale, shift = affine(path, outputs, lambda n: walk.small.batch(n, 0))
    scale, shift = scale.to(start.device), shift.to(start.device)
    live = torch.ones(outputs, dtype=torch.bool, device=start.device)
    if path.join is not None or path.gated:
        live = scale.abs() > 1e-6 * scale.abs().max()  # outputs that are scaled to zero cannot be matched
    stays = walk.masks.get((operator.weight, operator.out_dim))
    if stays is not None:
        live = live & stays.to(live.device)
    if not bool(live.any()):
        return None
    shape = (start.shape[0], 1, start.shape[1])
    scale = torch.where(live, scale, 1.0).reshape(shape)
    groups, kept = _live(live.reshape(start.shape[0], start.shape[1]))
    return Problem(operator, path, scale, shift.reshape(shape), groups, kept, rows)


def _sign(scale: Tensor) -> Tensor:
    return torch.where(scale < 0, -1.0, 1.0).to(scale)


def _live(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which groups, and which outputs of each, to solve for. rows: bool (g, o)."""
    if rows.shape[0] == 1:
        return torch.zeros(1, dtype=torch.int64, device=rows.device), rows[0].nonzero()[:, 0]
    return rows.any(1).nonzero()[:, 0], torch.arange(rows.shape[1], device=rows.device)
