"""The refit of one layer, in the course of a walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coreprune import _ranks
from coreprune._mapped import stored_as
from coreprune.errors import GeometryError, ModelError
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.repair.fit import Fit, Made, Rows, fitted, joined
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.repair.problem import Problem, problem_of
from coreprune.pruning.repair.residual_paths import Path
from coreprune.pruning.repair.walk import Walk
from coreprune.pruning.repair.wide import WIDEST, channels, mixed, positions_of
from coreprune.pruning.unfinished import Packed, Unfinished

_BLOCK = 1 << 25  # weights of a block of outputs: 256 MiB in float64


@dataclass(frozen=True)
class Refit:
    """The repair of one layer.

    weight: the name of its weight. before, after: the mean squared error of the outputs before and after, relative to
    their variance. It is the one-sided error where only a ReLU reads them. joined: whether a residual sum was matched,
    and not the layer's output alone.
    """

    weight: str
    before: float
    after: float
    joined: bool


def refit_once(walk: Walk, operator: Operator, options: Repair, state: Unfinished) -> Refit | None:
    """`refit`, or what it gave before the run was interrupted."""
    tensors: dict[str, Tensor] = walk.small.tensors  # type: ignore[assignment]
    before = dict(tensors)

    def pack(fit: Refit | None) -> Packed:
        changed = {name: t for name, t in tensors.items() if t is not before[name]}
        return {"fit": None if fit is None else asdict(fit)}, changed

    def unpack(about: Mapping[str, Any], changed: Mapping[str, Tensor]) -> Refit | None:
        tensors.update({name: stored_as(tensors[name], t.to(tensors[name].device)) for name, t in changed.items()})
        return None if about["fit"] is None else Refit(**about["fit"])

    return state.once("layer", lambda: refit(walk, operator, options), pack, unpack)


def refit(walk: Walk, operator: Operator, options: Repair) -> Refit | None:
    """Refit a layer of the pruned model to what the original computes; None if there is nothing to fit, or to gain.

    Raises ModelError if what it reads or is to compute is not finite.
    """
    path = walk.paths[operator.node]
    tensors: dict[str, Tensor] = walk.small.tensors  # type: ignore[assignment]
    start = operator.matrix(tensors[operator.weight]).double()
    if path.join is not None:
        walk.ahead(path)
    problem = problem_of(walk, operator, path, start, options.rows)
    if problem is None:
        return None
    alive = _alive_channels(walk, operator, start.device)
    columns = None if alive is None else _columns(alive, operator.taps)
    old = start if columns is None else start.gather(2, columns[:, None, :].expand(-1, start.shape[1], -1))
    old = problem.part(old)
    try:
        if operator.taps > 1 and old.shape[2] > WIDEST:
            fit = _mixed(walk, problem, start, alive, options)
        else:
            fit = _in_blocks(walk, problem, old, _bias(walk, operator, start), alive, options)
    except GeometryError as error:
        raise ModelError(_not_finite(operator, walk)) from error
    # All processes have the same sums. They give the same weights, bit by bit, only on machines of one kind.
    fit = _ranks.from_first("a refit", lambda: fit)
    if fit is None:
        return None
    weight = fit.weight
    if columns is not None:
        spread = columns[problem.groups][:, None, :].expand(-1, weight.shape[1], -1)
        weight = weight.new_zeros(*weight.shape[:2], start.shape[2]).scatter_(2, spread, weight)
    _write(walk, problem, start, weight, fit.bias)
    return Refit(operator.weight, fit.before, fit.after, path.join is not None)


def _not_finite(operator: Operator, walk: Walk) -> str:
    """Why a layer cannot be refitted."""
    names = [name for name in (operator.weight, operator.bias) if name is not None]
    odd = [name for name in names if not bool(torch.isfinite(walk.full.tensors[name]).all())]
    why = (
        f"{' and '.join(odd)} has a NaN or infinite entry"
        if odd
        else "what it reads or is to compute is not finite on the queries"
    )
    return (
        f"{operator.weight} {tuple(walk.full.tensors[operator.weight].shape)} cannot be refitted: {why}. Check the "
        "model and the range of the queries, or prune without repair."
    )


def _in_blocks(
    walk: Walk, problem: Problem, old: Tensor, bias: Tensor, alive: Tensor | None, options: Repair
) -> Fit | None:
    """The fit of a layer. old: (g, o, f) the weights that it starts from. bias: (g, all outputs).

    The moments of many outputs, such as those of a vocabulary, take more memory than everything else, so outputs are
    fitted in blocks, each with a ridge of its own.
    """
    count = 1 if len(old) > 1 or old.shape[1] <= old.shape[2] else max(1, round(old.numel() / _BLOCK))
    fits = list[Fit]()
    for block, weight in zip(problem.kept.chunk(count), old.chunk(count, dim=1), strict=True):
        part = replace(problem, kept=block)
        start = part.part(bias[:, :, None])[..., 0]
        fit = fitted(
            Made(walk.small.batches, lambda b, part=part: part.batch(walk, b, alive)),
            weight,
            start,
            part.worth,
            intercept=_has_intercept(problem.operator, problem.path),
            ridge=options.ridge,
            rounds=options.one_sided if problem.path.gated else None,
            kinds=walk.kinds,
            share=walk.share,
        )
        fits.append(Fit(weight, start, 0.0, 0.0, 0.0) if fit is None else fit)
    return joined(fits) if any(fit.variance for fit in fits) else None


def _mixed(walk: Walk, problem: Problem, start: Tensor, alive: Tensor | None, options: Repair) -> Fit | None:
    """The fit of a layer with too many features."""
    operator, (full, small) = problem.operator, (walk.full, walk.small)

    def batch(b: int) -> Rows:
        output, rows = full.batch(operator.node, b), max(options.rows, 16 * start.shape[2] // operator.taps)
        at = positions_of(operator, output, rows, walk.count)
        source = full.batch(operator.source, b), small.batch(operator.source, b)
        return channels(operator, *source, at, alive)

    weight = operator.matrix(full.tensors[operator.weight]).double()
    scale = problem.scale.mT[..., 0]
    fit = mixed(
        Made(small.batches, batch),
        weight,
        scale,
        alive,
        intercept=_has_intercept(operator, problem.path),
        ridge=options.ridge,
        share=walk.share,
    )
    if fit is None:
        return None
    bias = _bias(walk, operator, start) + fit.bias
    return replace(fit, weight=problem.part(fit.weight), bias=problem.part(bias[:, :, None])[..., 0])


def _write(walk: Walk, problem: Problem, start: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Write the solution into the model. If there is no bias, the norm's running mean takes the intercept."""
    operator, path = problem.operator, problem.path
    tensors: dict[str, Tensor] = walk.small.tensors  # type: ignore[assignment]
    new = problem.entered(start, weight)
    old = tensors[operator.weight]
    tensors[operator.weight] = stored_as(old, operator.from_matrix(new, old))
    if operator.bias is not None:
        name, values = operator.bias, _bias(walk, operator, start)[:, :, None]
        values = problem.entered(values, bias[:, :, None])
    elif path.norm is not None:
        name = walk.captured.sources[path.norm.args[3].name][1]  # type: ignore[union-attr]
        values = tensors[name].double().reshape(*start.shape[:2], 1)
        values = problem.entered(values, problem.part(values) - bias[:, :, None])
    else:
        return
    tensors[name] = values.reshape(-1).to(tensors[name])


def _bias(walk: Walk, operator: Operator, start: Tensor) -> Tensor:
    if operator.bias is None:
        return torch.zeros(start.shape[:2], dtype=torch.float64, device=start.device)
    return walk.small.tensors[operator.bias].double().reshape(start.shape[:2])


def _alive_channels(walk: Walk, operator: Operator, device: torch.device) -> Tensor | None:
    """The input channels of every group that are left, (g, left), or None if all are."""
    mask = walk.masks.get((operator.weight, operator.in_dim))
    if mask is None:
        return None
    rows = mask.to(device).reshape(-1, mask.shape[-1])
    rows = rows.repeat_interleave(operator.groups // rows.shape[0], dim=0)
    return torch.stack([r.nonzero()[:, 0] for r in rows])


def _has_intercept(operator: Operator, path: Path) -> bool:
    """Whether the layer, or the norm behind it, can take a constant."""
    return operator.bias is not None or path.norm is not None


def _columns(alive: Tensor, taps: int) -> Tensor:
    """The features of the channels that are left, (g, left · taps)."""
    return (alive[:, :, None] * taps + torch.arange(taps, device=alive.device)).flatten(1)
