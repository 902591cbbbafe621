"""Statistics of what the consumers of every group read on the queries: covariances, samples, weights of errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from coreprune._progress import Progress
from coreprune.coreset import Fold, Patches
from coreprune.coreset.regression import LeastSquares
from coreprune.errors import InputError
from coreprune.graph import Group, ParamSlice, Traced
from coreprune.graph.execution import Execution, last_uses
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.padding import Padding
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.layer.products import Product, products_of
from coreprune.pruning.layer.weights import Reader

log = logging.getLogger(__name__)

_PATCHES = 1 << 22  # entries of the patches that are kept per reader: 32 MiB


@dataclass(frozen=True)
class Collect:
    """How statistics are collected.

    features: readers with more features than this use the channel version (every kernel position is a row of its own).
    rows: at most this many positions per reader, or 16 per feature if that is more, sampled evenly.
    samples: how many feature rows are kept unchanged.
    worth: weigh output errors by the second moment of the gradient of the model's output (one random projection per
        sample). False gives all errors the weight 1.
    window: side of the windows over which gradients of neighbouring positions are summed (`_pooled`).
    """

    features: int = 1152
    rows: int = 1 << 13
    samples: int = 256
    worth: bool = True
    window: int = 5


@dataclass
class _Site:
    """One parameter axis, or product, that reads a group. columns: of the flattened features, ordered by unit."""

    group: str
    operator: Operator | Product
    columns: Tensor
    units: int
    channels: int  # of a unit
    halves: tuple[LeastSquares, LeastSquares]  # of the batches with an even and with an odd number
    worth: Tensor | None = None
    kept: list[Tensor] | None = None
    patches: list[Tensor] | None = None  # (m, channels of all units, slots), if each kernel position is a row

    @property
    def slots(self) -> int:
        return self.columns.numel() // (self.units * self.channels)

    def split(self, options: Collect) -> bool:
        """Whether the channel version is used (see `Collect.features`)."""
        return self.columns.numel() > options.features and self.slots > 1

    def features(self, options: Collect) -> int:
        """How many rows and columns the covariance has."""
        return self.units * self.channels if self.split(options) else self.columns.numel()


def collect_readers(
    traced: Traced, calibration: Calibration, options: Collect, generator: torch.Generator, tell: Progress
) -> dict[str, tuple[Reader, ...]]:
    """The readers of every free group, by the group's name.

    A reader is a linear map, or a product of two activations (q·k). A group that is only read in other ways (by a sum)
    has none. Only one batch is in memory at a time.
    """
    sites = [*_sites(traced.free, calibration.operators), *_product_sites(traced.free, calibration)]
    by_node: dict[fx.Node, list[_Site]] = {}
    for site in sites:
        by_node.setdefault(site.operator.node, []).append(site)
    walk = _Walk(traced.tensors, calibration, by_node, options, generator)
    for b in range(walk.batches):
        tell("statistics", b, walk.batches)
        weighed = _one_batch(walk, b)
        walk = replace(walk, options=replace(options, worth=weighed))
    for site in sites:
        _check_finite(site)
    out: dict[str, tuple[Reader, ...]] = dict.fromkeys(traced.free, ())
    for site in sites:
        out[site.group] += (_reader(site, traced.tensors),)
    return out


@dataclass(frozen=True, eq=False)
class _Walk:
    """What all batches have in common."""

    tensors: Mapping[str, Tensor]
    calibration: Calibration
    by_node: Mapping[fx.Node, list[_Site]]
    options: Collect
    generator: torch.Generator

    @property
    def batches(self) -> int:
        return len(self.calibration.batches)


def _one_batch(walk: _Walk, b: int) -> bool:
    """Add the statistics of one batch. Returns whether errors could be weighed by gradients."""
    captured, by_node, options = walk.calibration.captured, walk.by_node, walk.options
    run = Execution(captured, walk.tensors, [walk.calibration.batches[b]])
    nodes = list(captured.graph.graph.nodes)
    uses = last_uses(nodes)
    taped: dict[fx.Node, Tensor] = {}
    result: Any = None
    with torch.set_grad_enabled(options.worth):
        for node in nodes:
            value = run.run(node)[0]
            for operator in dict.fromkeys(site.operator for site in by_node.get(node, ())):
                with torch.no_grad():
                    x = run.batch(operator.source, 0).detach()
                    sites = [site for site in by_node[node] if site.operator is operator]
                    most = max(options.rows, 16 * max(site.features(options) for site in sites))
                    rows = walk.calibration.padding_of(b).rows(operator, value, most // walk.batches + 1)
                    features = operator.features(x, rows).transpose(0, 1).flatten(1)
                    for site in sites:
                        _add(site, features, options, walk.batches, b)
            if options.worth and isinstance(value, Tensor) and node in by_node:
                # A copy in place of a view: a later in-place operation then works on another copy, and the gradient is
                # that of the value before the operation.
                value = value.clone() if value._is_view() else value
                run.values[node] = [value if value.requires_grad else value.requires_grad_()]
                taped[node] = value
            if node.op == "output":
                result = value
            for gone in uses[node]:
                run.values.pop(gone, None)
        return options.worth and _weigh(walk, result, taped, walk.calibration.padding_of(b))


def _weigh(walk: _Walk, result: Any, taped: Mapping[fx.Node, Tensor], padding: Padding) -> bool:
    """Add the second moments of the gradient of a random projection of the outputs, at every reader's output.

    Returns whether such a gradient exists.
    """
    found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    outputs = [x for x in found if bool(torch.isfinite(x.detach()).all())]
    if len(outputs) < len(found):
        log.warning("an output of the model is not finite on the queries, so what errors do to it does not count.")
    if not outputs:
        return False
    axes = walk.calibration.captured.axes
    samples = None if axes.first else axes.size(walk.calibration.batches[0])
    noise = [padding.silent(torch.randn(x.shape, generator=walk.generator).to(x)) for x in outputs]
    total = sum((x * each).sum() / _scale(x, samples) for x, each in zip(outputs, noise, strict=True))
    try:
        gradients = torch.autograd.grad(total, list(taped.values()), allow_unused=True)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation that has no gradient
        log.warning("output errors of all layers weigh the same, because the model has no gradient: %s", error)
        return False
    for node, gradient in zip(taped, gradients, strict=True):
        for site in walk.by_node[node]:
            if gradient is not None:
                if site.operator.kernel:
                    images = gradient if site.operator.channel_axis else gradient[None]
                    pooled = _pooled(images, walk.options.window).reshape(gradient.shape)
                else:
                    pooled = gradient
                flat = site.operator.outputs(pooled).transpose(0, 1).flatten(1).double()
                worth = flat.T @ flat / ((samples or len(gradient)) * walk.batches)  # the mean over all queries
                site.worth = worth if site.worth is None else site.worth + worth
    return True


def _scale(x: Tensor, samples: int | None) -> Tensor:
    """Standard deviation times the root of the number of entries per sample. Errors are then shares of the variance.

    samples: how many there are; None: as many as the first axis is long.
    """
    deviation = x.detach().double().std(correction=0).clamp_min(1e-12)
    entries = x.numel() / (samples or x.shape[0]) if x.dim() else 1
    return (deviation * entries**0.5).to(x)


def _pooled(gradient: Tensor, window: int) -> Tensor:
    """Sums over windows of neighbouring positions, divided by the root of the number of positions in a window.

    Errors at neighbouring positions of an image are similar. So they add up where the gradient keeps its sign, and
    cancel where its sign alternates. Squares of single positions would miss this, especially before pooling.
    """
    dims = gradient.dim() - 2
    for axis in range(2, 2 + dims):  # axis by axis; sums of slices are faster than torch's pooling
        length = gradient.shape[axis]
        sides = [0, 0] * (dims + 1 - axis) + [window // 2, (window - 1) // 2]
        padded = nn.functional.pad(gradient, sides)
        gradient = sum(padded.narrow(axis, i, length) for i in range(window))  # type: ignore[assignment]
    return gradient / window ** (dims / 2)


def _add(site: _Site, features: Tensor, options: Collect, batches: int, b: int) -> None:
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


def _check_finite(site: _Site) -> None:
    if not all(bool(torch.isfinite(half.moments()[2]).all()) for half in site.halves if half.rows):
        raise InputError(
            f"what {site.operator.weight} reads is not finite on the queries, so nothing can be measured there. "
            "Check the queries (their range, their normalisation) and the model, or run it in float32."
        )


def _reader(site: _Site, tensors: Mapping[str, Tensor]) -> Reader:
    parts = [_part(half) for half in site.halves if half.rows]
    mean, covariance = _pooled_moments(parts)
    operator, partner = site.operator, ""
    if isinstance(operator, Product):
        full, partner = torch.eye(int(site.columns.max()) + 1).to(covariance), operator.partner
    else:
        matrix = operator.matrix(tensors[operator.weight].detach()).double()
        full = torch.block_diag(*matrix) if matrix.shape[0] > 1 else matrix[0]
    v = full[:, site.columns]
    worth = torch.eye(v.shape[0], dtype=v.dtype, device=v.device) if site.worth is None else site.worth
    patches = None
    if covariance.shape[0] != site.columns.numel():  # channel version
        split = v.reshape(v.shape[0], site.units * site.channels, site.slots)
        gram = sum(split[:, :, s].T @ worth @ split[:, :, s] for s in range(site.slots))
        patches = Patches(torch.cat(site.patches or []) - mean[:, None], split, worth)
        v = split.transpose(1, 2).reshape(-1, site.units * site.channels)
    else:
        gram = v.T @ worth @ v
    folds = tuple(
        Fold(seen.covariance, unseen.about(seen.mean), gram)  # type: ignore[arg-type]
        for seen, unseen in ((parts[0], parts[-1]), (parts[-1], parts[0]))
        if len(parts) > 1
    )
    return Reader(v, mean, covariance, gram, torch.cat(site.kept or []), folds, patches, partner)  # type: ignore[arg-type]


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
    return mean, torch.stack([part.about(mean) * (part.rows / total) for part in parts]).sum(dim=0)


def _sites(free: Mapping[str, Group], operators: Mapping[str, Operator]) -> list[_Site]:
    sites = []
    for group in free.values():
        for piece in {(s.param, s.dim): s for c in group.consumers for s in c.slices}.values():
            operator = operators.get(piece.param)
            columns = None if operator is None or piece.dim != operator.in_dim else _columns(group, piece, operator)
            if operator is not None and columns is not None:
                units = group.size // group.unit
                channels = int((_channel_counts(group, piece) > 0).sum()) // units
                sites.append(_Site(group.name, operator, columns, units, channels, (LeastSquares(), LeastSquares())))
    return sites


def _product_sites(free: Mapping[str, Group], calibration: Calibration) -> list[_Site]:
    sites = []
    for group in free.values():
        for product in products_of(group, calibration.captured, calibration.operators):
            piece = ParamSlice(product.weight, product.axis, product.index)
            columns, units = _columns(group, piece, product), group.size // group.unit
            if columns is not None:
                channels = int((_channel_counts(group, piece) > 0).sum()) // units
                halves = (LeastSquares(product.centred), LeastSquares(product.centred))
                sites.append(_Site(group.name, product, columns, units, channels, halves))
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
