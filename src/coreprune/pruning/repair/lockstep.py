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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from coreprune import _ranks
from coreprune._mapped import stored_as
from coreprune._progress import Progress
from coreprune.errors import InputError
from coreprune.graph import Element
from coreprune.graph.execution import Execution, last_uses, overwritten
from coreprune.graph.over_kept import over_kept
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.repair.fit import Fit, Made, Rows, fitted
from coreprune.pruning.repair.products import Mix
from coreprune.pruning.repair.residual_paths import Path, affine, path_of, schedule
from coreprune.pruning.repair.twins import Descent
from coreprune.pruning.repair.wide import WIDEST, channels, mixed, positions_of
from coreprune.pruning.unfinished import Packed, Unfinished


@dataclass(frozen=True)
class Repair:
    """Options of the repair.

    ridge: λ as a multiple of the mean second moment of the features. None chooses it for every layer on queries that
        the refit has not seen. An output whose refit is then no better than its start is not written.
    producers: whether to refit also layers that lost no input, but whose input has changed.
    rows: at most `rows` positions per layer, sampled evenly: 64 per query, but at least half of `rows` in all. A layer
        of many features gets 16 per feature, even if that is more than `rows`.
    one_sided: at most this many rounds of one-sided targets, for layers that only a ReLU reads. 0 matches the whole
        output. The rounds end when one lowers the error by less than 1 %.
    descent: whether to train the blocks of layers after that, or with which options. None: if it is cheap (`Descent`).
    """

    ridge: float | None = None
    producers: bool = True
    rows: int = 1 << 15
    one_sided: int = 3
    descent: bool | Descent | None = None

    def __post_init__(self) -> None:
        if self.descent is not None and not isinstance(self.descent, (bool, Descent)):
            raise InputError(f"Repair.descent must be True, False, None or Descent(...), not {self.descent!r}.")


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


@dataclass(frozen=True, eq=False)
class Cut:
    """The original and the pruned model, both in the original's shapes.

    original: the original's tensors by name. start: those of the pruned model, from `weights_after`.
    masks: (name, axis) -> which positions stay. mixes: by name of the weight, for layers that are to compute something
    else than the original's layer; `start` has their new weights. gone: the elements, on the graph of the calibration,
    that the pruned model has no more: there what enters passes on.
    """

    original: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    masks: Mapping[tuple[str, int], Tensor]
    mixes: Mapping[str, Mix] = field(default_factory=dict)
    gone: tuple[Element, ...] = ()


def repaired(
    cut: Cut, calibration: Calibration, options: Repair, tell: Progress, state: Unfinished | None = None
) -> tuple[dict[str, Tensor], list[Refit]]:
    """Refit the pruned model. Returns its parameters and buffers in the original's shapes, and what was refit.

    state: keeps every layer as it is refit.
    """
    walk = _Walk(cut, calibration, options)
    walk.state = state or Unfinished()
    done: list[Refit] = []
    nodes, uses = walk.order, last_uses(walk.order)
    with torch.no_grad():
        for i, node in enumerate(nodes[: walk.end]):
            fit = walk.step(node)
            if fit is not None:
                done.append(fit)
            walk.forget(uses[node])
            tell("repair", i + 1, walk.end)
    return walk.small.tensors, done  # type: ignore[return-value]


class _Walk:
    """The executions of both models, and what is known about the operators."""

    state = Unfinished()

    def __init__(self, both: Cut, calibration: Calibration, options: Repair) -> None:
        captured = calibration.captured
        self.share = _ranks.share(len(calibration.batches))  # of several processes, each runs some of the batches
        self.count, batches = len(calibration.batches), [calibration.batches[b] for b in self.share.numbers]
        self.skipped = frozenset(n for e in both.gone for n in e.nodes)
        self.passed = {e.exit: e.entry for e in both.gone}
        self.held: dict[fx.Node, Any] = {}  # what passes on
        found = {n: o for n, o in calibration.operators.items() if o.node not in self.skipped}
        original, masks = both.original, both.masks
        self.captured, self.masks, self.options, self.mixes = captured, masks, options, both.mixes
        self.samples = sum(map(captured.axes.size, calibration.batches))
        self.full = Execution(captured, original, batches, calibration.shelf.put)
        # Equal tensors become the same object, so that only what changed is run again.
        same = {n: original[n] if torch.equal(t, original[n]) else t for n, t in both.start.items()}
        self.norms = over_kept(captured, masks)
        self.small = Execution(captured, same, batches, calibration.shelf.put, self.norms)
        nodes = list(captured.graph.graph.nodes)
        cut = {o.node for o in found.values() if (o.weight, o.in_dim) in masks}
        first = {o.node: path_of(o, captured) for o in found.values()}
        # Layers that lost inputs come first when residual sums are assigned to layers.
        _, paths = schedule(nodes, {n: p for n, p in first.items() if n in cut})
        taken = {p.join for p in paths.values() if p.join is not None}
        rest = {
            n: p if p.join not in taken else Path(p.norm, p.steps, None, None) for n, p in first.items() if n not in cut
        }
        self.order, self.paths = schedule(nodes, {n: paths.get(n) or rest[n] for n in nodes if n in first})
        self.operators = {o.node: o for o in found.values()}
        self.cut = cut
        self.padding, self.kinds = calibration.padding_of, calibration.kinds
        self.tainted = overwritten(nodes)  # for these nodes, both models need their own memory
        # Nothing needs to run after the last layer. Where it is linear, its outputs, such as the logits of a language
        # model, are made for the rows that are fitted alone: all of them are larger than everything before.
        self.end = 1 + max((i for i, n in enumerate(self.order) if n in self.operators), default=-1)
        last = [n for n in self.order[: self.end][-1:] if n not in self.tainted | self.skipped]
        self.unread = {n for n in last if not self.operators[n].kernel and self.paths[n].join is None}

    def step(self, node: fx.Node) -> Refit | None:
        """Run one node in both models. If it is a layer whose inputs have changed, refit it first."""
        if node not in self.full.values and node not in self.unread:
            self.full.run(node)
        if node in self.skipped:
            if node in self.passed:
                self.tainted.add(node)
                self.small.values[node] = self.held.pop(node)
                self._hold(node)
            return None
        fit = None
        operator = self.operators.get(node)
        if operator is not None and (node in self.cut or (self.options.producers and operator.source in self.tainted)):
            fit = self._refit_once(operator, self.paths[node])
        if node in self.unread:
            return fit
        reads = [n for n in node.all_input_nodes]
        changed = node in self.norms or any(n in self.tainted or self._parameter_changed(n) for n in reads)
        if changed:
            self.tainted.add(node)
            self.small.run(node)
        else:
            self.small.values[node] = self.full.values[node]
        self._hold(node)
        return fit

    def computed(self, operator: Operator, source: Tensor, rows: Tensor | None) -> Tensor:
        """What a linear layer of the original computes of some rows of its input, (1, rows, o)."""
        tensors: dict[str, Tensor] = self.full.tensors  # type: ignore[assignment]
        y = operator.features(source, rows) @ operator.matrix(tensors[operator.weight]).mT
        return y if operator.bias is None else y + tensors[operator.bias]

    def _hold(self, node: fx.Node) -> None:
        """Keep a value that passes on, which may be forgotten before the place where it does."""
        self.held.update({exit_: self.small.values[node] for exit_, entry in self.passed.items() if entry is node})

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Drop values that nothing reads any more."""
        for node in nodes:
            self.full.values.pop(node, None)
            self.small.values.pop(node, None)

    def _parameter_changed(self, node: fx.Node) -> bool:
        kind, name = self.captured.sources.get(node.name, ("", "")) if node.op == "placeholder" else ("", "")
        return kind in ("parameter", "buffer") and self.small.tensors[name] is not self.full.tensors[name]

    def _ahead(self, path: Path) -> None:
        """Run the original up to the residual sum."""
        for step in (*path.steps, path.join):
            if step is not None and step not in self.full.values:
                self.full.run(step)

    def _refit_once(self, operator: Operator, path: Path) -> Refit | None:
        """`_refit`, or what it gave before the run was interrupted."""
        tensors: dict[str, Tensor] = self.small.tensors  # type: ignore[assignment]
        before = dict(tensors)

        def pack(fit: Refit | None) -> Packed:
            changed = {name: t for name, t in tensors.items() if t is not before[name]}
            return {"fit": None if fit is None else asdict(fit)}, changed

        def unpack(about: Mapping[str, Any], changed: Mapping[str, Tensor]) -> Refit | None:
            tensors.update({name: stored_as(tensors[name], t.to(tensors[name].device)) for name, t in changed.items()})
            return None if about["fit"] is None else Refit(**about["fit"])

        return self.state.once("layer", lambda: self._refit(operator, path), pack, unpack)

    def _refit(self, operator: Operator, path: Path) -> Refit | None:
        tensors: dict[str, Tensor] = self.small.tensors  # type: ignore[assignment]
        start = operator.matrix(tensors[operator.weight]).double()
        if path.join is not None:
            self._ahead(path)
        problem = self._problem(operator, path, start)
        if problem is None:
            return None
        alive = self._alive_channels(operator, start.device)
        columns = None if alive is None else _columns(alive, operator.taps)
        old = start if columns is None else start.gather(2, columns[:, None, :].expand(-1, start.shape[1], -1))
        old = problem.part(old)
        if operator.taps > 1 and old.shape[2] > WIDEST:
            fit = self._mixed(problem, start, alive)
        else:
            fit = fitted(
                Made(self.small.batches, lambda b: problem.batch(self, b, alive)),
                old,
                problem.part(self._bias(operator, start)[:, :, None])[..., 0],
                problem.worth,
                intercept=_has_intercept(operator, path),
                ridge=self.options.ridge,
                rounds=self.options.one_sided if path.gated else None,
                kinds=self.kinds,
                share=self.share,
            )
        # All processes have the same sums. They give the same weights, bit by bit, only on machines of one kind.
        fit = _ranks.from_first("a refit", lambda: fit)
        if fit is None:
            return None
        weight = fit.weight
        if columns is not None:
            spread = columns[problem.groups][:, None, :].expand(-1, weight.shape[1], -1)
            weight = weight.new_zeros(*weight.shape[:2], start.shape[2]).scatter_(2, spread, weight)
        self._write(problem, start, weight, fit.bias)
        return Refit(operator.weight, fit.before, fit.after, path.join is not None)

    def _mixed(self, problem: _Problem, start: Tensor, alive: Tensor | None) -> Fit | None:
        """The fit of a layer with too many features."""
        operator, (full, small) = problem.operator, (self.full, self.small)

        def batch(b: int) -> Rows:
            output, rows = full.batch(operator.node, b), max(self.options.rows, 16 * start.shape[2] // operator.taps)
            at = positions_of(operator, output, rows, self.count)
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
            ridge=self.options.ridge,
            share=self.share,
        )
        if fit is None:
            return None
        bias = self._bias(operator, start) + fit.bias
        return replace(fit, weight=problem.part(fit.weight), bias=problem.part(bias[:, :, None])[..., 0])

    def _problem(self, operator: Operator, path: Path, start: Tensor) -> _Problem | None:
        """Which outputs to solve for, and the affine map behind them; None if there is no output to solve for."""
        outputs = start.shape[0] * start.shape[1]
        scale, shift = affine(path, outputs, lambda n: self.small.batch(n, 0))
        scale, shift = scale.to(start.device), shift.to(start.device)
        live = torch.ones(outputs, dtype=torch.bool, device=start.device)
        if path.join is not None or path.gated:
            live = scale.abs() > 1e-6 * scale.abs().max()  # outputs that are scaled to zero cannot be matched
        stays = self.masks.get((operator.weight, operator.out_dim))
        if stays is not None:
            live = live & stays.to(live.device)
        if not bool(live.any()):
            return None
        shape = (start.shape[0], 1, start.shape[1])
        scale = torch.where(live, scale, 1.0).reshape(shape)
        groups, kept = _live(live.reshape(start.shape[0], start.shape[1]))
        return _Problem(operator, path, scale, shift.reshape(shape), groups, kept, self.options.rows)

    def _bias(self, operator: Operator, start: Tensor) -> Tensor:
        if operator.bias is None:
            return torch.zeros(start.shape[:2], dtype=torch.float64, device=start.device)
        return self.small.tensors[operator.bias].double().reshape(start.shape[:2])

    def _alive_channels(self, operator: Operator, device: torch.device) -> Tensor | None:
        """The input channels of every group that are left, (g, left), or None if all are."""
        mask = self.masks.get((operator.weight, operator.in_dim))
        if mask is None:
            return None
        rows = mask.to(device).reshape(-1, mask.shape[-1])
        rows = rows.repeat_interleave(operator.groups // rows.shape[0], dim=0)
        return torch.stack([r.nonzero()[:, 0] for r in rows])

    def _write(self, problem: _Problem, start: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Write the solution into the model. If there is no bias, the norm's running mean takes the intercept."""
        operator, path = problem.operator, problem.path
        tensors: dict[str, Tensor] = self.small.tensors  # type: ignore[assignment]
        new = problem.entered(start, weight)
        old = tensors[operator.weight]
        tensors[operator.weight] = stored_as(old, operator.from_matrix(new, old))
        if operator.bias is not None:
            name, values = operator.bias, self._bias(operator, start)[:, :, None]
            values = problem.entered(values, bias[:, :, None])
        elif path.norm is not None:
            name = self.captured.sources[path.norm.args[3].name][1]  # type: ignore[union-attr]
            values = tensors[name].double().reshape(*start.shape[:2], 1)
            values = problem.entered(values, problem.part(values) - bias[:, :, None])
        else:
            return
        tensors[name] = values.reshape(-1).to(tensors[name])


@dataclass(frozen=True, eq=False)
class _Problem:
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

    def batch(self, walk: _Walk, b: int, alive: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
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
        y = (walk.computed(operator, full, rows) if unread else operator.outputs(full, rows)).double()
        if (mix := walk.mixes.get(operator.weight)) is not None:
            y = y @ mix.map.mT.to(y.device)
        size = self.scale.abs()
        if path.join is not None and path.other is not None:
            behind = operator.outputs(walk.small.batch(path.other, b), rows).double() + self.shift
            y, zero = (y - behind) / size, behind / -size
        else:
            y, zero = y * _sign(self.scale), (-self.shift / size).expand_as(y)
        if self.operator.groups > 1:
            x, y, zero = x[self.groups], y[self.groups], zero[self.groups]
        return x, y[:, :, self.kept].mT, zero[:, :, self.kept].mT


def _has_intercept(operator: Operator, path: Path) -> bool:
    """Whether the layer, or the norm behind it, can take a constant."""
    return operator.bias is not None or path.norm is not None


def _sign(scale: Tensor) -> Tensor:
    return torch.where(scale < 0, -1.0, 1.0).to(scale)


def _live(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which groups, and which outputs of each, to solve for. rows: bool (g, o)."""
    if rows.shape[0] == 1:
        return torch.zeros(1, dtype=torch.int64, device=rows.device), rows[0].nonzero()[:, 0]
    return rows.any(1).nonzero()[:, 0], torch.arange(rows.shape[1], device=rows.device)


def _columns(alive: Tensor, taps: int) -> Tensor:
    """The features of the channels that are left, (g, left · taps)."""
    return (alive[:, :, None] * taps + torch.arange(taps, device=alive.device)).flatten(1)
