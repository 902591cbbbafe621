"""Budgets of risk: the smallest model that samples, set aside for this alone, show to be good enough (T19).

Models of falling size are made one after the other, each from the same rankings, and repaired. Which sizes come next is
decided on the samples that pruning may use. Then each is tested once on those that were set aside; the first failure
ends the path.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from coreprune import _ranks
from coreprune._progress import Clock, Progress, silent
from coreprune._seed import seed_apart
from coreprune.coreset import Certificate
from coreprune.errors import BudgetError, InputError
from coreprune.graph import Cost, Traced
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.calibration.calibration import Asked, Calibration
from coreprune.pruning.reporting.certify import source_of
from coreprune.pruning.reporting.comparison import apart_from
from coreprune.pruning.reporting.losses import answers, losses, other_answers
from coreprune.pruning.reporting.report import Compared, Tested, TestedPath
from coreprune.pruning.safety_net import trained
from coreprune.pruning.settings import Settings
from coreprune.pruning.stages import Pruned, cut_to, prune_to, repair_
from coreprune.queries import Queries, make_queries
from coreprune.queries.samples import goes_on
from coreprune.queries.spec import is_source
from coreprune.risk import fixed_sequence, needed, upper_bound

log = logging.getLogger(__name__)

_STEP = 0.96  # from one size to the next
_LEAST = 0.02  # the smallest share of the cost that is tried
_AHEAD = 4  # so many sizes at once are passed over where the risk is far below the level
_FAR = 0.25  # of the level: that far
_FIT = 256  # samples that pruning gets before the rest is set aside, if there are at least twice as many
_MANY = 3  # times the least number that can show the level is set aside of what can be drawn without end


@dataclass(frozen=True, eq=False)
class Exam:
    """What a model must pass: the samples that were set aside, and the level of its loss."""

    budget: Budget
    delta: float
    held_out: Queries

    @property
    def level(self) -> float:
        """What the expected loss may be at most."""
        return level_of(self.budget)

    def losses(self, model: nn.Module, small: nn.Module, queries: Queries) -> Tensor:
        """(n,) of some queries, bool or in [0, 1]. Of several processes, the first one runs the models."""

        def found() -> Tensor:
            metric = self.budget.metric
            return other_answers(model, small, queries) if metric is None else losses(model, small, queries, metric)

        return _ranks.from_first("the losses", found)


@dataclass(eq=False)
class _Candidate:
    """A model of the path. share: of the dense model's cost that its budget allows."""

    share: float
    pruned: Pruned
    compared: list[Compared] = field(default_factory=list)


def level_of(budget: Budget) -> float:
    """The level of the loss."""
    return float(budget.limit) if budget.kind == "metric" else 1 - float(budget.limit)


def first_size(budget: Budget, cost: CostFunction | None) -> Budget:
    """The budget of the largest model that is tested."""
    return _sizes(budget, cost)[0]


def set_aside(
    traced: Traced, asked: Asked, budget: Budget, delta: float, seed: int, tell: Progress = silent
) -> tuple[Asked, Exam]:
    """Divide the samples: what pruning may use, and what only the test sees. Sources make inputs for each.

    Of several processes, the first one does this for all.

    Raises InputError if the queries are no independent draws, if they are too few to show the level, or if the loss of
    the dense model against itself shows that the budget cannot be met or not be measured.
    """
    mine: list[Asked] = []  # what the caller gave stays in the first process: it may not be possible to send it

    def divide() -> tuple[Queries, str]:
        fitting, held_out, whole = _divided(traced, asked, budget, delta, seed, tell)
        mine.append(fitting)
        return held_out, whole

    held_out, whole = _ranks.from_first("the samples of the test", divide)
    exam, level = Exam(budget, delta, held_out), level_of(budget)
    itself = exam.losses(traced.model, traced.model, held_out.take(min(len(held_out), 8)))
    best = upper_bound(torch.zeros(len(held_out), dtype=itself.dtype), delta)
    if best > level:
        raise InputError(
            f"{_said(budget)} at delta={delta:g} {_need(level, delta)} {len(held_out)}{whole} were set aside for the "
            f"test: the best that they can show is {1 - best if budget.kind == 'agreement' else best:.4g}. Pass more "
            "samples, ask for less, or allow a larger delta."
        )
    return (mine or [asked])[0], exam


def _divided(
    traced: Traced, asked: Asked, budget: Budget, delta: float, seed: int, tell: Progress
) -> tuple[Asked, Queries, str]:
    """What pruning may use, what is set aside, and of how many that is, in words."""
    level, spec = level_of(budget), asked.spec
    axes, model = traced.captured.axes, traced.model
    generator = torch.Generator().manual_seed(seed_apart(seed, 19))  # `gather` makes its inputs with the seed itself
    more: dict[str, Any] = {"seed": generator, "batch_axis": axes, "tokenizer": asked.tokenizer, "progress": tell}
    count = _MANY * needed(level, delta)
    if is_source(spec):
        few = make_queries(model, asked.example, spec, n=2, **more)
        if few.jointly:
            raise InputError(
                f"a budget of {budget.kind} needs inputs that are drawn one by one, but those from {few.source} are "
                "optimised together. Pass samples, or a source that draws each input alone, such as "
                f'queries="leaves".'
            )
        held_out = make_queries(model, asked.example, spec, n=count, **more)
        fitting, whole = asked, ""
    else:
        n = asked.n if asked.n is not None or not goes_on(spec) else _FIT + count
        given = make_queries(model, asked.example, spec, n=n, **more).distinct().shuffled(generator)
        if given.jointly:
            raise InputError(
                f"a budget of {budget.kind} needs inputs that are drawn one by one, but those from {given.source} "
                "were optimised together. Pass samples alone."
            )
        if len(given) < 4:
            raise InputError(
                f"a budget of {budget.kind} needs samples to test on; there are {len(given)}. {_need(level, delta)}"
            )
        first = min(len(given) // 2, max(_FIT, len(given) // 4))
        own, held_out = given.split(first)
        fitting, whole = replace(asked, spec=own, n=None), f" of {len(given)}"
    return fitting, held_out, whole


def smallest(
    traced: Traced, settings: Settings, calibration: Calibration, exam: Exam, clock: Clock
) -> tuple[Pruned, list[Compared], TestedPath]:
    """The last model of the path that passes. Raises BudgetError if the first one fails."""
    total = len(_sizes(settings.budget, settings.cost))
    last: list[_Candidate] = []  # two models at most: the others would fill the memory
    sizes: list[tuple[float, Cost]] = []

    def tests() -> Iterator[Callable[[], Tensor]]:
        for candidate in _path(traced, settings, calibration, exam, clock):
            last[:] = [*last[-1:], candidate]
            widths = {name: len(entry.kept) for name, entry in candidate.pruned.plan.groups.items()}
            sizes.append((candidate.share, traced.cost_model(widths)))

            def take() -> Tensor:
                with clock("test"):
                    clock.tell("test", len(sizes) - 1, total)
                    return exam.losses(traced.model, last[-1].pruned.removed.model, exam.held_out)

            yield take

    path = fixed_sequence(tests(), exam.level, exam.delta)
    clock.tell("test", total, total)
    rows = [
        Tested(share, cost.macs, cost.params, step.risk, step.bound, step.passed)
        for step, (share, cost) in zip(path.steps, sizes, strict=True)
    ]
    if path.chosen is None:
        raise BudgetError(_nothing(rows, exam))
    chosen = last[-1] if path.steps[-1].passed else last[-2]
    told = TestedPath(
        asked=_said(settings.budget),
        level=exam.level,
        delta=exam.delta,
        samples=len(exam.held_out),
        source=source_of(exam.held_out),
        steps=tuple(rows),
        certificate=_certificate(traced, exam, rows[path.chosen], len(rows)),
    )
    log.info("%s: %d models were tested; the last that passed has %.0f %%", told.asked, len(rows), 100 * chosen.share)
    return chosen.pruned, chosen.compared, told


def _certificate(traced: Traced, exam: Exam, chosen: Tested, tested: int) -> Certificate:
    """T19 about the model that was chosen. tested: how many were."""
    source, samples, trivial = source_of(exam.held_out), len(exam.held_out), 1.0
    told = "the expected loss is"
    if exam.budget.metric is None:
        told = "another answer has a probability of"
        found = answers(traced.model, traced.model, exam.held_out)
        trivial = 1.0 if found is None else 1 - int(found[0].bincount().max()) / samples
    return Certificate(
        theorem="T19",
        kind="sampled",
        bound=exam.level,
        trivial=trivial,
        statement=(
            f"on inputs like {source} {told} at most {exam.level:g} ({chosen.risk:.4g} on the {samples} samples that "
            f"were set aside; {tested} models were tested from the largest on)"
        ),
        assumptions=(
            f"the {samples} samples are independent draws from {source}",
            "none of them was used to make a model or to choose which are tested; the choice among those that were "
            "tested is accounted for",
        ),
        delta=exam.delta,
    )


def _path(
    traced: Traced, settings: Settings, calibration: Calibration, exam: Exam, clock: Clock
) -> Iterator[_Candidate]:
    """The models to test, from the largest on, each made when it is its turn. They depend on no sample of the test."""
    sizes = _sizes(settings.budget, settings.cost)
    first: Pruned | None = None
    ahead: tuple[int, _Candidate | None] = (-1, None)  # made to see whether the sizes before it can be passed over
    last: Any = None

    def made(number: int) -> _Candidate | None:
        """None if no widths are so small."""
        nonlocal first
        own = replace(settings, budget=sizes[number])
        try:
            if first is None:
                pruned = first = prune_to(traced, own, calibration, clock)
            else:
                pruned = cut_to(first.traced, first.decisions, own, clock)
        except BudgetError:
            if first is None:  # not even the largest: the reason is of use to the caller
                raise
            return None
        return _Candidate(sizes[number].limit, *_finished(pruned, settings, calibration, clock))

    at = 0
    while at < len(sizes):
        candidate = ahead[1] if ahead[0] == at else made(at)
        if candidate is None:
            return
        widths = {name: len(entry.kept) for name, entry in candidate.pruned.plan.groups.items()}
        if widths != last:
            last = widths
            yield candidate
        further = min(at + _AHEAD, len(sizes) - 1)
        at += 1
        if ahead[0] < at < further:
            ahead = (further, made(further))
            if ahead[1] is not None and _far(traced, ahead[1], calibration, exam):
                at = further


def _far(traced: Traced, candidate: _Candidate, calibration: Calibration, exam: Exam) -> bool:
    """Whether the loss is far below the level on the queries that pruning may use."""
    given = calibration.given
    if given is None:
        return False
    found = exam.losses(traced.model, candidate.pruned.removed.model, given)
    return float(found.double().mean()) <= _FAR * exam.level


def _finished(
    pruned: Pruned, settings: Settings, calibration: Calibration, clock: Clock
) -> tuple[Pruned, list[Compared]]:
    """A cut with its repair, and with the training of its blocks where that is better."""
    options = settings.repair
    if options is None or not calibration.useful:
        return pruned, []
    with clock("repair"):
        pruned = replace(pruned, fits=repair_(pruned, calibration, options, clock.tell))
    if not pruned.fits:
        return pruned, []
    found = None
    if calibration.fresh is not None:
        with clock("compare"):
            found = apart_from(pruned.traced, pruned.removed.model, calibration.fresh, calibration.ends)
    name = "the repaired cut"
    compared = [] if found is None else [Compared(name, found.error, found.agreement, chosen=True)]
    return trained(pruned, settings, calibration, compared, clock)


def _sizes(budget: Budget, cost: CostFunction | None) -> list[Budget]:
    """Budgets of falling shares of the dense model's cost, with the rules about widths of the one that is given."""
    shares = [_STEP]
    while shares[-1] * _STEP >= _LEAST:
        shares.append(shares[-1] * _STEP)
    return [budget.sized("macs" if cost is None else "cost", share) for share in shares]


def _said(budget: Budget) -> str:
    if budget.kind == "agreement":
        return f"agreement={budget.limit:g}"
    return f"{getattr(budget.metric, '__name__', 'metric')} ≤ {budget.limit:g}"


def _need(level: float, delta: float) -> str:
    return f"needs at least {needed(level, delta):,} held-out samples."


def _nothing(rows: list[Tested], exam: Exam) -> str:
    """Why no model can be returned, and what would help."""
    first, n = rows[0], len(exam.held_out)
    if first.risk < exam.level:
        more = n
        while more < sys.maxsize and _bound(first.risk, more, exam) > exam.level:
            more *= 2
        help_ = f"With about {more:,} samples of the same kind it might be shown."
    else:
        help_ = "Its loss itself is above the level: allow more, or pass more samples for the repair."
    return (
        f"{_said(exam.budget)} cannot be shown for any smaller model: with {first.share:.0%} of the cost the loss is "
        f"{first.risk:.4g} on the {n} samples that were set aside, and with confidence {1 - exam.delta:.0%} at most "
        f"{first.bound:.4g}. {help_}"
    )


def _bound(risk: float, n: int, exam: Exam) -> float:
    """T18's bound for so many samples, as if the loss were 0 or 1."""
    found = torch.zeros(n, dtype=torch.bool)
    found[: round(risk * n)] = True
    return upper_bound(found, exam.delta)
