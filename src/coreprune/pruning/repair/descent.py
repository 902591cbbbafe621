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
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from coreprune._progress import Progress
from coreprune.graph.blocks import Block
from coreprune.graph.execution import Execution, Value, last_uses
from coreprune.graph.kept import Positions
from coreprune.pruning.repair.twins import Descent, Twins

_SMALLEST = 1e-2  # lower limit of the root mean square of a tensor that sets its learning rate


@dataclass(frozen=True)
class Descended:
    """The descent of one block.

    weights: the names of its weights. before, after: the mean squared error of its output on the queries that were held
    out, relative to the variance of the original's output. changed: whether the block was written; where the held-out
    error did not fall, it stays as it was, and `after` is `before`.
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
        if i + 1 < len(twins.blocks):
            with torch.no_grad():
                entry = [task.run([b], tensors)[0][0] for b in range(len(twins.batches))]
        tell("descend", i + 1, len(twins.blocks))
    return {name: t for name, t in tensors.items() if t is not twins.tensors[name]}, done


def _targets(twins: Twins) -> Iterator[tuple[Block, dict[fx.Node, Value], list[list[Tensor]]]]:
    """Run the original up to the end of each block. Yields the block, what it reads, and per batch what its exits are
    to be."""
    nodes = list(twins.full.graph.graph.nodes)
    run, uses, start = Execution(twins.full, twins.original, twins.batches), last_uses(nodes), 0
    for block in twins.blocks:
        held = {*block.reads, *block.exits}
        stop = nodes.index(block.nodes[-1]) + 1
        with torch.no_grad():
            for node in nodes[start:stop]:
                run.run(node)
                for last in uses[node]:
                    if last not in held:
                        run.values.pop(last, None)
            wanted = [[_left(run.batch(e, b), twins.kept[e]) for e in block.exits] for b in range(run.batches)]
        stored = ("parameter", "buffer", "constant")
        reads = {n: run.values[n] for n in block.reads if twins.full.sources.get(n.name, ("",))[0] not in stored}
        for node in nodes[start:stop]:
            for last in uses[node]:
                run.values.pop(last, None)
        start = stop
        yield block, reads, wanted


def _left(value: Tensor, kept: Positions) -> Tensor:
    for axis, rows in kept:
        value = value.index_select(axis, rows.to(value.device))
    return value


class _Task:
    """One block of the pruned model: its inputs, and what its exits are to be, per batch."""

    def __init__(
        self, twins: Twins, block: Block, entry: Value, reads: Mapping[fx.Node, Value], targets: list[list[Tensor]]
    ) -> None:
        self.twins, self.block, self.targets = twins, block, targets
        self.given = dict(reads) if block.entry is None else {block.entry: entry, **reads}
        every = [torch.cat([x.reshape(-1) for x in exits]).double() for exits in zip(*targets, strict=True)]
        self.variance = [torch.where((v := x.var(correction=0)) > 0, v, 1.0) for x in every]

    def run(self, rows: Sequence[int], tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """The exits for some of the batches."""
        twin = self.twins.twin
        run = Execution(self.twins.small, tensors, [self.twins.batches[r] for r in rows])
        run.values = {twin[n]: v if len(v) == 1 else [v[r] for r in rows] for n, v in self.given.items()}
        for node in self.block.nodes:
            run.run(twin[node])
        return [[run.batch(twin[e], b) for e in self.block.exits] for b in range(len(rows))]

    def error(self, rows: Sequence[int], tensors: Mapping[str, Tensor]) -> Tensor:
        """The mean squared error of the exits, relative to the variance of what is wanted."""
        total = []
        for got, r in zip(self.run(rows, tensors), rows, strict=True):
            for found, wanted, variance in zip(got, self.targets[r], self.variance, strict=True):
                off = torch.sub(*(x if x.dtype == torch.float64 else x.float() for x in (found, wanted)))
                total.append(off.square().mean() / variance.to(off))
        return torch.stack(total).mean()

    def held_out(self, tensors: Mapping[str, Tensor]) -> float:
        """The error on the batches that are held out."""
        count = len(self.targets)
        with torch.no_grad():
            rows = range(count - self.twins.held, count)
            return math.fsum(float(self.error([r], tensors)) for r in rows) / len(rows)

    def names(self) -> list[str]:
        """The parameters of the block that may change, and that no other block reads."""
        readers = Counter(n.name for node in self.block.nodes for n in node.all_input_nodes if n in self.block.reads)
        found = {n: self.twins.full.sources.get(n, ("", ""))[1] for n in readers}
        count = Counter(name for n, name in found.items() for _ in range(readers[n]))
        return [m for m in count if m in self.twins.trained and count[m] == self.twins.full.readers[m]]


def _trained(
    task: _Task, tensors: Mapping[str, Tensor], options: Descent, generator: torch.Generator
) -> tuple[dict[str, Tensor], Descended]:
    """Train one block. Returns the tensors that changed: none if the held-out error did not fall."""
    names = task.names()
    weights = tuple(name for name in names if tensors[name].dim() > 1)
    before = task.held_out(tensors)
    if not names:
        return {}, Descended(weights, before, before, False)
    start = {name: tensors[name].detach() for name in names}
    free = {name: t.to(t.dtype if t.element_size() >= 4 else torch.float32).clone() for name, t in start.items()}
    for value in free.values():
        value.requires_grad_(True)
    # Relative rates as in the distillation. The lower limit lets tensors of zeros move.
    rates = [options.lr * max(float(t.detach().double().square().mean().sqrt()), _SMALLEST) for t in free.values()]
    adam = torch.optim.Adam([{"params": [t], "lr": rate} for t, rate in zip(free.values(), rates, strict=True)])
    count = len(task.targets) - task.twins.held
    each = min(count, max(1, round(options.batch_size / task.twins.size)))
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
    # Half of the way is tried, too: the whole way may go beyond what the queries can tell.
    ends = [{n: start[n].lerp(t.detach().to(start[n].dtype), w) for n, t in free.items()} for w in (1.0, 0.5)]
    errors = [task.held_out({**tensors, **end}) for end in ends]
    after, new = min(zip(errors, ends, strict=True), key=lambda pair: pair[0] if pair[0] == pair[0] else math.inf)
    if not after < before:
        return {}, Descended(weights, before, before, False)
    return new, Descended(weights, before, after, True)
