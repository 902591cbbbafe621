"""Block descent: train the repaired model block by block, in execution order, towards the original's activations.

With x̃ the input of a block in the pruned model, of which all earlier blocks are finished, x its input in the original,
and P the channels that are left, the parameters of the block B̃ minimise E‖B̃(x̃) − P B(x)‖². They start from the repair,
which is the closed form for one layer at a time; here the layers of a block learn together. The gradient never leaves
the block, and only the activations of one block are held. No label is used.

The block-wise objective is that of BRECQ (Li et al., ICLR 2021), which reconstructs quantised blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from coreprune._masked import entries, mean_square
from coreprune._progress import Progress
from coreprune.coreset.regression import LeastSquares
from coreprune.graph.blocks import Block
from coreprune.graph.execution import Execution, Value, largest, last_uses, varying
from coreprune.graph.kept import Positions
from coreprune.pruning.layer.linear_maps import Operator, operators
from coreprune.pruning.repair.twins import STEP, Descent, Twins

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_ROWS = 1 << 14  # of one batch
_SMALLEST = 1e-2  # lower limit of the root mean square of a tensor that sets its learning rate


@dataclass(frozen=True)
class Descended:
    """The descent of one block.

    weights: the names of its weights. before, after: the mean squared error of its output on the queries that were held
    out, relative to the variance of the original's output. changed: whether the block was written. If the held-out
    error did not fall, the block stays as it was, and `after` is `before`. If the error of the model's output did not
    fall, all blocks stay as they were.
    """

    weights: tuple[str, ...]
    before: float
    after: float
    changed: bool


def descend(
    twins: Twins, options: Descent, generator: torch.Generator, tell: Progress
) -> tuple[dict[str, Tensor], list[Descended]]:
    """Train the blocks. Returns the tensors of the pruned model that changed, and what happened to every block.

    generator: on the CPU; it decides the order of the batches.
    """
    tensors, done = dict(twins.tensors), []
    entry: Value = []
    for i, (block, reads, targets) in enumerate(_targets(twins)):
        task = _Task(twins, block, entry, reads, targets)
        new, told = _trained(task, tensors, options, generator)
        tensors.update(new)
        done.append(told)
        tell("descend", i + 1, len(twins.blocks))
        if i + 1 < len(twins.blocks):
            with torch.no_grad():
                entry = [task.run([b], tensors)[0][0] for b in range(len(twins.batches))]
        else:
            at_first = task.lost(_outputs(twins, twins.blocks[-1].exits), task.measured)
            if not done[-1].after < float(at_first):
                return {}, [replace(block, after=block.before, changed=False) for block in done]
    return {name: t for name, t in tensors.items() if t is not twins.tensors[name]}, done


@torch.no_grad()
def _outputs(twins: Twins, exits: Sequence[fx.Node]) -> list[list[Tensor]]:
    """What the pruned model computes before the descent on the batches that are held out."""
    nodes = list(twins.small.graph.graph.nodes)
    run, uses = Execution(twins.small, twins.tensors, twins.batches[-twins.held :]), last_uses(nodes)
    wanted = [twins.twin[e] for e in exits]
    for node in nodes[:-1]:
        run.run(node)
        for last in uses[node]:
            if last not in wanted:
                run.values.pop(last, None)
    return [[run.batch(e, b) for e in wanted] for b in range(run.batches)]


def _targets(twins: Twins) -> Iterator[tuple[Block, dict[fx.Node, Value], list[list[Tensor]]]]:
    """Run the original up to the end of each block. Yields the block, what it reads, and per batch what its exits are
    to be.

    One batch after the other: the values inside a block are many times as large as those between blocks.
    """
    nodes, moving = list(twins.full.graph.graph.nodes), varying(twins.full)
    uses, alive, start = last_uses(nodes), dict[fx.Node, Value](), 0
    for block in twins.blocks:
        stop = nodes.index(block.nodes[-1]) + 1
        over = {n for node in nodes[start:stop] for n in uses[node]}
        at_end: dict[fx.Node, Value] = {}
        wanted: list[list[Tensor]] = []
        for b, batch in enumerate(twins.batches):
            run = Execution(twins.full, twins.original, [batch])
            run.values = {n: [v[b if len(v) > 1 else 0]] for n, v in alive.items()}
            with torch.no_grad():
                for node in nodes[start:stop]:
                    run.run(node)
                    for last in uses[node]:
                        if last not in block.reads and last not in block.exits:
                            run.values.pop(last, None)
                wanted.append([_left(run.batch(e, 0), twins.kept[e]) for e in block.exits])
            for node, (value,) in run.values.items():
                if node in block.reads or node not in over:
                    at_end.setdefault(node, []).extend([value] if node in moving or not b else [])
        stored = ("parameter", "buffer", "constant")
        reads = {n: at_end[n] for n in block.reads if twins.full.sources.get(n.name, ("",))[0] not in stored}
        alive, start = {n: v for n, v in at_end.items() if n not in over}, stop
        yield block, reads, wanted


def _left(value: Tensor, kept: Positions) -> Tensor:
    for axis, rows in kept:
        value = value.index_select(axis, rows.to(value.device))
    return value


def _variance(parts: Sequence[Tensor]) -> Tensor:
    """Of all entries together that are no infinities; 1 if they are all equal up to rounding."""
    parts = [entries(x) for x in parts]
    count = max(1, sum(x.numel() for x in parts))
    mean = torch.stack([x.sum(dtype=torch.float64) for x in parts]).sum() / count
    total = torch.stack([(x.double() - mean).square().sum() for x in parts]).sum() / count
    return torch.where(total > (1e-7 * mean).square(), total, 1.0)


class _Task:
    """One block of the pruned model: its inputs, and what its exits are to be, per batch."""

    def __init__(
        self, twins: Twins, block: Block, entry: Value, reads: Mapping[fx.Node, Value], targets: list[list[Tensor]]
    ) -> None:
        self.twins, self.block, self.targets = twins, block, targets
        self.given = dict(reads) if block.entry is None else {block.entry: entry, **reads}
        self.measured = range(len(targets) - twins.held, len(targets))
        counting = [[p.without(x) for x in exits] for p, exits in zip(twins.padding, targets, strict=True)]
        self.variance = [_variance(exits) for exits in zip(*counting, strict=True)]

    def run(
        self, rows: Sequence[int], tensors: Mapping[str, Tensor], inner: fx.Node | None = None
    ) -> list[list[Tensor]]:
        """The exits for some of the batches, or the value of an inner node (of `small`)."""
        twin = self.twins.twin
        run = Execution(self.twins.small, tensors, [self.twins.batches[r] for r in rows])
        run.values = {twin[n]: v if len(v) == 1 else [v[r] for r in rows] for n, v in self.given.items()}
        for node in self.block.nodes:
            run.run(twin[node])
        found = [twin[e] for e in self.block.exits] if inner is None else [inner]
        return [[run.batch(e, b) for e in found] for b in range(len(rows))]

    def error(self, rows: Sequence[int], tensors: Mapping[str, Tensor]) -> Tensor:
        """The mean squared error of the exits on some of the batches, relative to the variance of what is wanted."""
        return self.lost(self.run(rows, tensors), rows)

    def lost(self, exits: Sequence[Sequence[Tensor]], rows: Sequence[int]) -> Tensor:
        """The error of given exits."""
        total = []
        for got, r in zip(exits, rows, strict=True):
            for found, wanted, variance in zip(got, self.targets[r], self.variance, strict=True):
                both = (self.twins.padding[r].without(x) for x in (found, wanted))
                off = mean_square(*(x if x.dtype == torch.float64 else x.float() for x in both))
                total.append(off / variance.to(off))
        return torch.stack(total).mean()

    def held_out(self, tensors: Mapping[str, Tensor]) -> float:
        """The error on the batches that are held out."""
        with torch.no_grad():
            return math.fsum(float(self.error([r], tensors)) for r in self.measured) / len(self.measured)

    def names(self) -> list[str]:
        """The parameters of the block that may change, and that no other block reads."""
        readers = Counter(n.name for node in self.block.nodes for n in node.all_input_nodes if n in self.block.reads)
        found = {n: self.twins.full.sources.get(n, ("", ""))[1] for n in readers}
        count = Counter(name for n, name in found.items() for _ in range(readers[n]))
        return [m for m in count if m in self.twins.trained and count[m] == self.twins.full.readers[m]]


def _candidates(
    task: _Task, names: list[str], tensors: Mapping[str, Tensor], options: Descent, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """What the parameters of a block may become."""
    last = task.twins.twin[task.block.exits[-1]]
    operator = next((o for o in operators(task.twins.small).values() if o.node is last), None)
    if operator is not None and set(names) == {n for n in (operator.weight, operator.bias) if n is not None}:
        return _refits(task, operator, tensors)
    start = {name: tensors[name] for name in names}
    end = _walked(task, start, tensors, options, generator)
    # Half of the way is tried, too: the whole way may go beyond what the queries can tell.
    return [end, {name: start[name].lerp(end[name], 0.5) for name in names}]


def _refits(task: _Task, operator: Operator, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A block of a single linear map, such as the last layer, has closed forms: one for every ridge."""
    fits = LeastSquares(intercept=operator.bias is not None)
    for r in range(len(task.targets) - task.twins.held):
        (x,), (y,) = task.run([r], tensors, operator.source)[0], task.targets[r]
        rows = task.twins.padding[r].rows(operator, y, _ROWS)
        fits.add(operator.features(x, rows), operator.outputs(y, rows))
    found, like = [], tensors[operator.weight]
    for ridge in _RIDGES:
        weight, bias = fits.solve(operator.matrix(like), ridge)
        found.append({operator.weight: operator.from_matrix(weight, like)})
        if operator.bias is not None:
            found[-1][operator.bias] = bias.reshape(-1).to(tensors[operator.bias])
    return found


def _trained(
    task: _Task, tensors: Mapping[str, Tensor], options: Descent, generator: torch.Generator
) -> tuple[dict[str, Tensor], Descended]:
    """Train one block. Returns the tensors that changed: none if the held-out error did not fall."""
    names = task.names()
    weights = tuple(name for name in names if tensors[name].dim() > 1)
    before = task.held_out(tensors)
    if not names:
        return {}, Descended(weights, before, before, False)
    errors, ends = [], _candidates(task, names, tensors, options, generator)
    for end in ends:
        error = task.held_out({**tensors, **end})
        errors.append(error if math.isfinite(error) else math.inf)
    after, new = min(zip(errors, ends, strict=True), key=lambda pair: pair[0])
    if not after < before:
        return {}, Descended(weights, before, before, False)
    return new, Descended(weights, before, after, True)


def _walked(
    task: _Task,
    start: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    options: Descent,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Where the parameters are after the steps of Adam."""
    free = {name: t.to(t.dtype if t.element_size() >= 4 else torch.float32).clone() for name, t in start.items()}
    for value in free.values():
        value.requires_grad_(True)
    # Relative rates as in the distillation. The lower limit lets tensors of zeros move.
    rates = [options.lr * max(float(t.detach().double().square().mean().sqrt()), _SMALLEST) for t in free.values()]
    adam = torch.optim.Adam([{"params": [t], "lr": rate} for t, rate in zip(free.values(), rates, strict=True)])
    count = len(task.targets) - task.twins.held
    entries = largest(task.twins.full, task.block.nodes)
    each = min(count, max(1, min(round(options.batch_size / task.twins.size), STEP // entries)))
    order: list[int] = []
    for step in range(options.steps):
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        while len(order) < each:
            order += torch.randperm(count, generator=generator).tolist()
        rows, order = order[:each], order[each:]
        with torch.enable_grad():
            loss = task.error(rows, {**tensors, **{name: t.to(start[name].dtype) for name, t in free.items()}})
        if not math.isfinite(float(loss.detach())):
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {name: t.detach().to(start[name].dtype) for name, t in free.items()}
