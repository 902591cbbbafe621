"""Statistics of what the consumers of every group read on the queries: covariances, samples, weights of errors.

The graph is walked in segments. All but the last are run once, batch by batch, and what is alive between them is put on
the shelf. Then every segment is run again, from the last to the first, now with the moments of its readers and, by the
gradient that the segment behind it has left, with the worth of errors at their outputs. So the moments of one segment
and the tape of one segment and batch are in memory at a time, and every group is done when the walk has passed the
first of its readers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from coreprune import _ranks
from coreprune._masked import finite
from coreprune._progress import Progress
from coreprune.errors import InputError
from coreprune.graph import Group, Traced
from coreprune.graph.execution import Execution, last_uses, varying
from coreprune.graph.segments import Segment, segments
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.element_losses import ElementLosses
from coreprune.pruning.calibration.projection import projection
from coreprune.pruning.calibration.sites import Collect, Site, add, is_finite, pool_site_, reader_of, sites_of
from coreprune.pruning.calibration.vocabulary import vocabularies
from coreprune.pruning.calibration.worth import add_worth
from coreprune.pruning.layer.weights import Reader

log = logging.getLogger(__name__)

# The name of a group, and its readers; None if another process has them.
Read = tuple[str, tuple[Reader, ...] | None]


class _NoGradientError(Exception):
    """An operation has no gradient."""


def collect_readers(
    traced: Traced,
    calibration: Calibration,
    options: Collect,
    generator: torch.Generator,
    tell: Progress,
    losses: ElementLosses | None = None,
) -> Iterator[Read]:
    """The readers of every free group, group by group as they are done, and the groups without readers first.

    A reader is a linear map, or a product of two activations (q·k). A group that is only read in other ways (by a sum)
    has none. If a group comes twice, the second time counts: then the walk began again, because the model has no
    gradient.

    Of several processes, each runs its share of the batches. What they have seen is added up, segment by segment, and
    every group's readers are in the process that ranks it (`owners`).

    losses: gets what the outputs lose without its elements, on the same walk.
    """
    losses = losses or ElementLosses()
    seed = int(torch.randint(2**62, (), generator=generator))
    try:
        yield from _swept(traced, calibration, options, seed, tell, losses)
    except _NoGradientError as error:
        log.warning("output errors of all layers weigh the same, because the model has no gradient: %s", error)
        yield from _swept(traced, calibration, replace(options, worth=False), seed, tell, ElementLosses())


def owners(free: Mapping[str, Group]) -> dict[str, int]:
    """Which process ranks which group: each in turn goes to the one that has the least to do, n³ for n channels."""
    load, found = [0] * _ranks.world(), {}
    for name, group in free.items():
        found[name] = load.index(min(load))
        load[found[name]] += group.size**3
    return found


def _swept(
    traced: Traced, calibration: Calibration, options: Collect, seed: int, tell: Progress, losses: ElementLosses
) -> Iterator[Read]:
    sites = sites_of(traced.free, calibration.captured, calibration.operators)
    left = Counter(site.group for site in sites)
    yield from ((name, ()) for name in traced.free if not left[name])
    by_node: dict[fx.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.operator.node, []).append(site)
    walk = _Walk(traced.tensors, calibration, by_node, options, seed, losses)
    parts, owner, mine = segments(calibration.captured), owners(traced.free), walk.share.numbers
    steps = len(mine) * (2 * len(parts) - 1)
    for i, part in enumerate(parts[:-1]):
        for k, b in enumerate(mine):
            tell("statistics", i * len(mine) + k, steps)
            walk.forward(part, b)
    odd: Site | None = None
    for i, part in enumerate(reversed(parts), start=len(parts) - 1):
        failed = ""
        try:
            for k, b in enumerate(mine):
                tell("statistics", i * len(mine) + k, steps)
                walk.backward(part, b, last=part is parts[-1])
        except _NoGradientError as error:
            failed = str(error) or "none of an operation"
        walk.forget(part)
        passed = [site for node in part.nodes for site in by_node.get(node, ())]
        seen = _seen(passed, failed)
        odd = next((site for site, finite in zip(passed, seen.finite, strict=True) if not finite), odd)
        left.subtract(site.group for site in passed)
        if odd is None:
            for site, outputs in zip(passed, seen.outputs, strict=True):
                walk.pool_(site, outputs, owner[site.group])
        for name in dict.fromkeys(site.group for site in passed):
            if odd is None and not left[name]:
                found = [site for site in sites if site.group == name]
                yield name, tuple(map(walk.reader, found)) if owner[name] == _ranks.rank() else None
    tell("statistics", steps, steps)
    if odd is not None:  # the first one in the graph: what comes behind it is not finite for the same reason
        raise InputError(
            f"what {odd.operator.weight} reads is not finite on the queries, so nothing can be measured there. "
            "Check the queries (their range, their normalisation) and the model, or run it in float32."
        )


@dataclass(frozen=True)
class _Seen:
    """What all processes say about the sites of a segment: whether all is finite, and for how many outputs errors were
    weighed, if they were."""

    finite: list[bool]
    outputs: list[int | None]


def _seen(sites: Sequence[Site], failed: str) -> _Seen:
    """Hear the others. Raises _NoGradientError in all processes if an operation has no gradient in one of them."""
    mine = (
        ([], [])
        if failed
        else ([is_finite(s) for s in sites], [None if s.worth is None else len(s.worth) for s in sites])
    )
    told = _ranks.gathered("what was seen in a segment", (failed, *mine))
    if errors := [text for text, _, _ in told if text]:
        raise _NoGradientError(errors[0])
    finite = [all(each) for each in zip(*(x for _, x, _ in told), strict=True)]
    outputs = [next((n for n in each if n is not None), None) for each in zip(*(x for _, _, x in told), strict=True)]
    return _Seen(finite, outputs)


@dataclass(eq=False)
class _Walk:
    """What all batches have in common, and what is kept between segments.

    seed: of the projections; every batch has a generator of its own, so that it does not matter who runs it.
    values: for the nodes that later segments read, what they are for every batch, or once if it does not vary.
    taped: those of them that depend on a reader. gradients: what the segments behind have left for them, per batch.
    weighed: for every batch, whether errors could be weighed.
    """

    tensors: Mapping[str, Tensor]
    calibration: Calibration
    by_node: Mapping[fx.Node, list[Site]]
    options: Collect
    seed: int
    losses: ElementLosses
    values: dict[fx.Node, dict[int, Any]] = field(default_factory=dict)
    taped: set[fx.Node] = field(default_factory=set)
    gradients: dict[fx.Node, dict[int, Tensor]] = field(default_factory=dict)
    weighed: dict[int, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        captured = self.calibration.captured
        self._moving, self._words = varying(captured), vocabularies(captured)
        self.batches = len(self.calibration.batches)
        self.share = _ranks.share(self.batches)
        given = self.calibration.batches
        self._runs = {b: Execution(captured, self.tensors, [given[b]]) for b in self.share.numbers}

    def forward(self, part: Segment, b: int) -> None:
        """Run one batch through a segment, and keep what later segments read."""
        run, _, _ = self._run(part, b, self.options.worth)
        for node in self._kept(part):
            (value,) = run.values[node]
            if b != self.share.numbers[0] and node not in self._moving:
                continue
            if isinstance(value, Tensor) and value.requires_grad:
                self.taped.add(node)
                value = value.detach()
            self.values.setdefault(node, {})[b] = self.calibration.shelf.put(value)
        run.values.clear()

    def backward(self, part: Segment, b: int, *, last: bool) -> None:
        """Run one batch through a segment again, and add what its readers read and what errors there are worth."""
        worth = self.options.worth and (self.weighed.get(b - 1, True) if last else self.weighed[b])
        run, inputs, marked = self._run(part, b, worth, collect=True)
        if last:
            result = run.values[part.nodes[-1]][0]
            self.weighed[b] = worth and self._projected(result, inputs, marked, b)
        else:
            outputs = {n: run.values[n][0] for n in part.exits if b in self.gradients.get(n, ())}
            outputs = {n: y for n, y in outputs.items() if y.requires_grad}
            if outputs:
                self._weigh(list(outputs.values()), [self.gradients[n].pop(b) for n in outputs], inputs, marked, b)
        run.values.clear()
        self.losses.forget()

    def forget(self, part: Segment) -> None:
        """Drop what only segments behind this one read."""
        for node in self._kept(part):
            self.values.pop(node, None)
            self.gradients.pop(node, None)

    def pool_(self, site: Site, outputs: int | None, owner: int) -> None:
        """Give the process that ranks a site's group what all processes have seen; nothing is done in a single one."""
        if _ranks.world() > 1:
            pool_site_(site, self.share.counts, outputs, owner)
            if owner != _ranks.rank():
                site.halves, site.worth, site.kept, site.patches = [], None, None, None

    def _kept(self, part: Segment) -> list[fx.Node]:
        """The values that segments behind read, and those that enter an element, which may end in another segment."""
        return list(dict.fromkeys([*part.exits, *filter(self.losses.enters, part.nodes)]))

    def reader(self, site: Site) -> Reader:
        """What a site has seen, as selectors take it."""
        return reader_of(site, self.tensors, self.calibration.shelf.put)

    def _run(
        self, part: Segment, b: int, worth: bool, collect: bool = False
    ) -> tuple[Execution, dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
        """Run one batch through a segment.

        Returns the execution, the entries that gradients are wanted for, and the outputs of the readers.
        """
        run, uses = self._runs[b], last_uses(part.nodes)
        inputs: dict[fx.Node, Tensor] = {}
        marked: dict[fx.Node, Tensor] = {}
        for node in part.outer:
            run.run(node)
        for node in part.entries:
            value = self.values[node][b if node in self._moving else self.share.numbers[0]]
            if worth and node in self.taped:
                value = inputs[node] = value.detach().requires_grad_()
            run.values[node] = [value]
        with torch.set_grad_enabled(worth):
            for node in part.nodes:
                value = run.run(node)[0]
                if collect and node in self.by_node:
                    self._add(run, node, value, b)
                if collect and worth:
                    self.losses.see(node, value, lambda n: self.values[n][b])
                if worth and isinstance(value, Tensor) and (node in self.by_node or self.losses.weighs(node)):
                    # A copy in place of a view: a later in-place operation then works on another copy, and the gradient
                    # is that of the value before the operation.
                    value = value.clone() if value._is_view() else value
                    run.values[node] = [value if value.requires_grad else value.requires_grad_()]
                    marked[node] = value
                for gone in uses[node]:
                    if gone not in part.exits and not self.losses.enters(gone):
                        run.values.pop(gone, None)
        return run, inputs, marked

    def _add(self, run: Execution, node: fx.Node, value: Any, b: int) -> None:
        """Add what the readers at a node read."""
        for operator in dict.fromkeys(site.operator for site in self.by_node[node]):
            with torch.no_grad():
                x = run.batch(operator.source, 0).detach()
                sites = [site for site in self.by_node[node] if site.operator is operator]
                most = max(self.options.rows, 16 * max(site.features(self.options) for site in sites))
                padding = self.calibration.padding_of(b)
                rows = padding.rows(operator, value, most // self.batches + 1)
                features = operator.features(padding.levelled(operator, x), rows).transpose(0, 1).flatten(1)
                for site in sites:
                    add(site, features, self.options, self.batches, b)

    def _projected(
        self, result: Any, inputs: Mapping[fx.Node, Tensor], marked: Mapping[fx.Node, Tensor], b: int
    ) -> bool:
        """Start with a random projection of the model's outputs. Returns whether it has a gradient."""
        found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad and x.numel()]
        outputs = [x for x in found if _counts(x.detach())]
        if len(outputs) < len(found):
            log.warning("an output of the model is not finite on the queries, so what errors do to it does not count.")
        if not outputs:
            return False
        padding = self.calibration.padding_of(b)
        generator = torch.Generator().manual_seed(self.seed + b)
        noise = [projection(x.detach(), self._samples, self._words, generator, padding) for x in outputs]
        self._weigh(outputs, noise, inputs, marked, b)
        return True

    def _weigh(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        inputs: Mapping[fx.Node, Tensor],
        marked: Mapping[fx.Node, Tensor],
        b: int,
    ) -> None:
        """Add the second moments of the gradient at every reader's output, and leave the entries theirs."""
        wanted = {**inputs, **marked}
        if not wanted:
            return
        try:
            found = torch.autograd.grad(outputs, list(wanted.values()), gradients, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that has no gradient
            raise _NoGradientError(str(error)) from error
        for node, gradient in zip(wanted, found, strict=True):
            if gradient is None:
                continue
            if node in marked:
                samples = self._samples or len(gradient)
                if self.share.counts:
                    self.losses.add(node, gradient, samples, self.batches)
                for site in self.by_node.get(node, ()):
                    add_worth(site, gradient, self.options.window, samples * self.batches, self.tensors)
            else:
                mine = self.gradients.setdefault(node, {})
                mine[b] = self.calibration.shelf.put(mine[b] + gradient if b in mine else gradient)

    @property
    def _samples(self) -> int | None:
        """The samples of a batch; None: as many as the first axis of a tensor is long."""
        axes = self.calibration.captured.axes
        return None if axes.first else axes.size(self.calibration.batches[0])


def _counts(output: Tensor) -> bool:
    """Whether errors of an output can be weighed. Entries that are infinite are masked; they do not count."""
    return finite(output) or not bool(torch.isnan(output).any() or torch.isinf(output).all())
