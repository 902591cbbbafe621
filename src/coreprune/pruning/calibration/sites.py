"""What reads a group on the queries: its moments, gathered batch by batch, and the reader that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from coreprune import _ranks
from coreprune.coreset import Fold, Patches
from coreprune.coreset.regression import LeastSquares
from coreprune.graph import Captured, Group, ParamSlice
from coreprune.pruning.calibration.pooling import pool_
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.layer.products import Product, products_of
from coreprune.pruning.layer.weights import Reader

_OUTPUTS = 4096  # of a linear layer; with more, the worth of errors is kept over its features, which are fewer
_PATCHES = 1 << 22  # entries of the patches that are kept per reader: 32 MiB


@dataclass(frozen=True)
class Collect:
    """How statistics are collected.

    features: readers with more features than this use the channel version (every kernel position is a row of its own).
    rows: at most this many positions per reader, or 16 per feature if that is more, sampled evenly.
    samples: how many feature rows are kept unchanged.
    worth: weigh output errors by the second moment of the gradient of the model's output (one random projection per
        sample). False gives all errors the weight 1.
    window: side of the windows over which gradients of neighbouring positions are summed (`worth.over_windows`).
    """

    features: int = 1152
    rows: int = 1 << 13
    samples: int = 256
    worth: bool = True
    window: int = 5


@dataclass
class Site:
    """One parameter axis, or product, that reads a group. columns: of the flattened features, ordered by unit."""

    group: str
    operator: Operator | Product
    columns: Tensor
    units: int
    channels: int  # of a unit
    halves: list[LeastSquares]  # of the batches with an even and with an odd number
    worth: Tensor | None = None
    kept: list[Tensor] | None = None
    patches: list[Tensor] | None = None  # (m, channels of all units, slots), if each kernel position is a row

    @property
    def slots(self) -> int:
        """How many kernel positions a channel has."""
        return self.columns.numel() // (self.units * self.channels)

    def split(self, options: Collect) -> bool:
        """Whether the channel version is used (see `Collect.features`)."""
        return self.columns.numel() > options.features and self.slots > 1

    def over_features(self, outputs: int) -> bool:
        """Whether `worth` is VᵀWV, over the features, and not W, over the outputs: vocabularies are large."""
        linear = not isinstance(self.operator, Product) and not self.operator.kernel
        return linear and outputs > max(_OUTPUTS, self.columns.numel())

    def weights(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """V, (outputs, features), float64: what the reader computes from the features."""
        if isinstance(self.operator, Product):
            raise TypeError("a product has no weights")
        matrix = self.operator.matrix(tensors[self.operator.weight].detach()).double()
        return (torch.block_diag(*matrix) if matrix.shape[0] > 1 else matrix[0])[:, self.columns]

    def features(self, options: Collect) -> int:
        """How many rows and columns the covariance has."""
        return self.units * self.channels if self.split(options) else self.columns.numel()


def sites_of(free: Mapping[str, Group], captured: Captured, operators: Mapping[str, Operator]) -> list[Site]:
    """Where every free group is read: by linear maps, and by products of two activations (q·k).

    captured: traced at the size of the batches. operators: its linear maps.
    """
    return [*_linear_sites(free, operators), *_product_sites(free, captured, operators)]


def _linear_sites(free: Mapping[str, Group], operators: Mapping[str, Operator]) -> list[Site]:
    sites = []
    for group in free.values():
        for piece in {(s.param, s.dim): s for c in group.consumers for s in c.slices}.values():
            operator = operators.get(piece.param)
            columns = None if operator is None or piece.dim != operator.in_dim else _columns(group, piece, operator)
            if operator is not None and columns is not None:
                units = group.size // group.unit
                channels = int((_channel_counts(group, piece) > 0).sum()) // units
                sites.append(Site(group.name, operator, columns, units, channels, [LeastSquares(), LeastSquares()]))
    return sites


def _product_sites(free: Mapping[str, Group], captured: Captured, operators: Mapping[str, Operator]) -> list[Site]:
    sites = []
    for group in free.values():
        for product in products_of(group, captured, operators):
            piece = ParamSlice(product.weight, product.axis, product.index)
            columns, units = _columns(group, piece, product), group.size // group.unit
            if columns is not None:
                channels = int((_channel_counts(group, piece) > 0).sum()) // units
                halves = [LeastSquares(product.centred), LeastSquares(product.centred)]
                sites.append(Site(group.name, product, columns, units, channels, halves))
    return sites


def _channel_counts(group: Group, piece: ParamSlice) -> Tensor:
    index = piece.index.reshape(-1)
    return torch.bincount(index[index >= 0], minlength=group.size)


def _columns(group: Group, piece: ParamSlice, operator: Operator | Product) -> Tensor | None:
    """The columns of the flattened features that belong to the group, ordered by unit, channel, position, kernel tap.

    None if there is no common layout.
    """
    if piece.index.ndim == 1 and operator.groups > 1:
        return None
    counts = _channel_counts(group, piece).reshape(-1, group.unit)
    read = counts[counts > 0]
    if not read.numel() or bool((read != read[0]).any()) or bool(((counts > 0) != (counts[0] > 0)).any()):
        return None  # the units are read in different ways: no common layout
    index = piece.index.reshape(-1)
    live = (index >= 0).nonzero()[:, 0]
    ordered = live[torch.argsort(index[live], stable=True)]
    return (ordered[:, None] * operator.taps + torch.arange(operator.taps)).reshape(-1)


def add(site: Site, features: Tensor, options: Collect, batches: int, b: int) -> None:
    """Add the features (rows, f) of one of so many batches."""
    every = torch.equal(site.columns, torch.arange(features.shape[1]))
    x = features if every else features[:, site.columns]
    if site.split(options):
        whole = x.reshape(-1, site.units * site.channels, site.slots)
        site.patches = (site.patches or []) + [_some(whole, max(32, _PATCHES // x.shape[1]) // batches + 1)]
        x = whole.transpose(1, 2).reshape(-1, site.units * site.channels)
    site.halves[b % 2].add(x[None], x[None, :, :1])
    each = max(1, options.samples // batches)
    site.kept = (site.kept or []) + [_some(x, each).double()]


def _some(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, evenly from the first to the last."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()]


def pool_site_(site: Site, counts: bool, outputs: int | None, to: int) -> None:
    """Give one of several processes what all of them have seen. What the others have of it is of no use after that.

    counts: whether what this process has seen counts. outputs: over how many outputs errors are weighed, if any process
    could weigh them. to: the process that needs it.
    """
    what, device = f"the moments of {site.group}", next(half for half in site.halves if half.rows).points[0].device
    pool_(what, site.halves, counts, to)
    if outputs is not None:
        if site.worth is None or not counts:
            site.worth = torch.zeros(outputs, outputs, dtype=torch.float64, device=device)
        _ranks.total_(what, [site.worth], to)
    mine = (site.kept or [], site.patches) if counts else ([], site.patches and [])
    told = _ranks.gathered(what, mine)
    site.kept = [x for kept, _ in told for x in kept]
    site.patches = None if site.patches is None else [x for _, patches in told for x in patches or ()]


def is_finite(site: Site) -> bool:
    """Whether all that was seen is finite."""
    return all(bool(torch.isfinite(half.moments()[2]).all()) for half in site.halves if half.rows)


def reader_of(site: Site, tensors: Mapping[str, Tensor], keep: Callable[[Any], Any]) -> Reader:
    """What was seen, as selectors take it; the site loses it. keep: what it returns takes the place of each matrix."""
    halves, site.halves = [half for half in site.halves if half.rows], []
    parts = []
    while halves:
        parts.append(_part(halves.pop(0)))
    mean, covariance = _pooled_moments(parts)
    operator, partner = site.operator, ""
    if isinstance(operator, Product):
        v, partner = torch.eye(int(site.columns.max()) + 1).to(covariance)[:, site.columns], operator.partner
    else:
        v = site.weights(tensors)
    patches = None
    if covariance.shape[0] != site.columns.numel():  # channel version
        worth = torch.eye(v.shape[0], dtype=v.dtype, device=v.device) if site.worth is None else site.worth
        split = v.reshape(v.shape[0], site.units * site.channels, site.slots)
        gram = sum(split[:, :, s].T @ worth @ split[:, :, s] for s in range(site.slots))
        patches = Patches(torch.cat(site.patches or []) - mean[:, None], split, worth)
        v = split.transpose(1, 2).reshape(-1, site.units * site.channels)
    elif site.worth is None:
        gram = v.T @ v
    else:
        gram = site.worth if site.over_features(len(v)) else v.T @ site.worth @ v
    covariance, gram = keep(covariance), keep(gram)
    folds = tuple(
        Fold(keep(seen.covariance), keep(unseen.about(seen.mean)), gram)
        for seen, unseen in ((parts[0], parts[-1]), (parts[-1], parts[0]))
        if len(parts) > 1
    )
    samples = torch.cat(site.kept or [])
    site.worth = site.kept = site.patches = None
    return Reader(keep(v), mean, covariance, gram, samples, folds, patches, partner)


def _part(half: LeastSquares) -> _Part:
    mean, _, moments, _ = half.moments()
    return _Part(half.rows, mean[0] if half.intercept else torch.zeros_like(mean[0]), moments[0])


@dataclass(frozen=True)
class _Part:
    """Mean (f,) and covariance (f, f) of some of the rows; zeros and second moments where no constant is free."""

    rows: int
    mean: Tensor
    covariance: Tensor

    def about(self, point: Tensor) -> Tensor:
        """The second moment about a point."""
        apart = self.mean - point
        return self.covariance + apart[:, None] * apart


def _pooled_moments(parts: list[_Part]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all rows together."""
    total = sum(part.rows for part in parts)
    mean = torch.stack([part.mean * (part.rows / total) for part in parts]).sum(dim=0)
    return mean, reduce(torch.add, (part.about(mean) * (part.rows / total) for part in parts))
