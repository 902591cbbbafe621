"""The safety net: compare the repaired model with what could be returned instead, on queries that nothing has used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from coreprune._mapped import copies, write_
from coreprune._progress import Clock
from coreprune.errors import BudgetError
from coreprune.graph import Traced
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.padding import Ends
from coreprune.pruning.calibration.vocabulary import vocabularies
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.layer.read import tensors_of
from coreprune.pruning.plans.decide import plan_of, rank
from coreprune.pruning.plans.decision import Decision
from coreprune.pruning.plans.other_cuts import other_cuts
from coreprune.pruning.reporting.comparison import Apart, apart_from
from coreprune.pruning.reporting.report import Compared
from coreprune.pruning.selectors.norms import Magnitude
from coreprune.pruning.settings import Settings
from coreprune.pruning.stages import Pruned, carry_out, cut_once, cut_to, descend_, repair_
from coreprune.pruning.timing.pace import Pace
from coreprune.pruning.unfinished import Unfinished
from coreprune.queries import Queries

log = logging.getLogger(__name__)

UNREPAIRED = "the cut without repair"
MAGNITUDE = "magnitude pruning"
WITH_ALL = "the cut with all blocks"
_GOOD = 0.05  # of the outputs' variance: where the error is at most this, a large network is not repaired again
_MORE = 0.25  # a cut gets no repair there that would have to take off more orders of magnitude than the first one did,
# by more than this share. In our trials no cut that came out closer than the first had needed more than 0.13.
_LARGE = 1_000_000  # parameters; below that, a repair takes seconds


def best_of(
    pruned: Pruned, settings: Settings, calibration: Calibration, clock: Clock, state: Unfinished | None = None
) -> tuple[Pruned, list[Compared]]:
    """The best of several cuts under the same budget, and how each did on the queries that were held back.

    pruned: the result of selection and repair. It is compared with the cut without its repair, with the widest groups
    left whole, with the cut spread evenly over all groups, with all blocks left if some were dropped, and with
    magnitude pruning. Another one is taken only if its error is lower by more than the standard error of the
    difference. Without a repair, nothing else is taken: then the comparison is only a warning. In large networks a
    repair takes long: cuts of other widths are compared without theirs where the first repair leaves a small error, or
    where theirs would have to do clearly more than the first to make up for what they are farther off without it.

    Returns the model as it is, and no comparison, if no queries were held back.
    """
    fresh = calibration.fresh
    first = None if fresh is None else apart_from(pruned.traced, pruned.removed.model, fresh, calibration.ends)
    if fresh is None or first is None:
        return pruned, []
    name = "the cut" if settings.repair is None else "the repaired cut"
    best, best_name, best_apart = pruned, name, first
    seen: dict[str, Apart] = {name: first}
    large = sum(p.numel() for p in pruned.traced.model.parameters()) > _LARGE
    versions = 1  # of all cuts, one that may be compared with or without its repair counts twice
    for other, candidate, refit in _others(pruned, settings, clock):
        found = None if refit and not large else _apart(candidate, fresh, calibration.ends, clock)
        repaired, fits = refit, ()
        if refit and found is not None:
            repaired = first.error > _GOOD and _in_reach(found, first, seen[UNREPAIRED])
        if repaired:
            assert settings.repair is not None
            with clock("repair"):
                fits = repair_(candidate, calibration, settings.repair, clock.tell, state)
            found = _apart(candidate, fresh, calibration.ends, clock)
        assert found is not None
        versions += 2 if refit and large else 1
        label = f"{other}, without repair" if refit and not repaired else other
        seen[label] = found
        if settings.repair is not None and found.better_than(best_apart):
            best, best_name, best_apart = replace(candidate, fits=fits), label, found
        del candidate  # each holds the weights once more, and the next one is made before the name is bound again
    _tell(seen, name, best_name, len(fresh))
    # Each could be the one that is trained, and that could stay or not.
    trainings = (settings.repair is not None and settings.repair.descent is not False) + (settings.distill is not None)
    best = replace(best, choices=versions << trainings)
    return best, [Compared(n, a.error, a.agreement, n == best_name) for n, a in seen.items()]


def _in_reach(found: Apart, first: Apart, unrepaired: Apart) -> bool:
    """Whether a repair could make another cut as good as the first cut with its repair.

    found: the other cut without repair. unrepaired: the first cut without its own.
    """
    return found.error <= max(first.error, unrepaired.error * (unrepaired.error / first.error) ** _MORE)


def _apart(candidate: Pruned, fresh: Queries, ends: Ends, clock: Clock) -> Apart:
    with clock("compare"):
        found = apart_from(candidate.traced, candidate.removed.model, fresh, ends)
    assert found is not None  # its outputs have the same shapes
    return found


def trained(
    pruned: Pruned, settings: Settings, calibration: Calibration, compared: list[Compared], clock: Clock
) -> tuple[Pruned, list[Compared]]:
    """Train the blocks of the chosen model, and take that back if it is worse on the held-back queries.

    compared: from `best_of`. Without it the training is not checked on them. Returns the model, and the comparison with
    one more line if there was a training.
    """
    assert settings.repair is not None
    before = _weights(pruned, compared)
    with clock("descend"):
        blocks = descend_(pruned, calibration, settings.repair, settings.seed, clock.tell)
    if any(block.changed for block in blocks):
        stays, compared = _if_better(before, "with its blocks trained", pruned, calibration, compared, clock)
        if not stays:
            blocks = tuple(replace(block, after=block.before, changed=False) for block in blocks)
    return replace(pruned, descended=blocks), compared


def distilled(
    pruned: Pruned,
    settings: Settings,
    calibration: Calibration,
    compared: list[Compared],
    checkpoint: str | Path | None,
    clock: Clock,
) -> list[Compared]:
    """Distil the original into the chosen model, and take that back if it is worse on the held-back queries.

    compared: as in `trained`. Returns it with one more line.
    """
    before = _weights(pruned, compared)
    with clock("distill"):
        distill_(
            pruned.removed.model,
            pruned.traced.model,
            calibration.queries,
            settings.distill,
            words=vocabularies(pruned.traced.captured),
            seed=settings.seed,
            checkpoint=checkpoint,
            progress=clock.tell,
        )
    return _if_better(before, "distilled", pruned, calibration, compared, clock)[1]


def _weights(pruned: Pruned, compared: list[Compared]) -> dict[str, Tensor]:
    """Copies of the weights, to go back to; none where nothing is compared."""
    return copies(tensors_of(pruned.removed.model)) if compared else {}


def _if_better(
    before: Mapping[str, Tensor],
    how: str,
    pruned: Pruned,
    calibration: Calibration,
    compared: list[Compared],
    clock: Clock,
) -> tuple[bool, list[Compared]]:
    """Put a trained model back to the weights before, if it is worse on the held-back queries.

    how: what the trained model is called. Returns whether the training stays, and the comparison with one more line.
    """
    small, fresh = pruned.removed.model, calibration.fresh
    if fresh is None or not compared:
        return True, compared
    with clock("compare"):
        now = apart_from(pruned.traced, small, fresh, calibration.ends)
        after = copies(tensors_of(small))
        _fill(small, before)
        was = apart_from(pruned.traced, small, fresh, calibration.ends)
    assert now is not None
    assert was is not None
    first = next(one for one in compared if one.chosen)
    line = Compared(f"{first.name}, {how}", now.error, now.agreement)
    if was.better_than(now):
        log.warning(
            "the model as it was before is returned instead of %s: on the held-back queries the error rose from %.3g "
            "to %.3g",
            line.name,
            was.error,
            now.error,
        )
        return False, [*compared, line]
    _fill(small, after)
    return True, [*(replace(one, chosen=False) for one in compared), replace(line, chosen=True)]


def _fill(small: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        write_(tensor, values[name])


def _others(pruned: Pruned, settings: Settings, clock: Clock) -> Iterator[tuple[str, Pruned, bool]]:
    """The other cuts, by name, all without repair, and whether they may get one."""
    budget, options = settings.budget, settings.repair
    whole = pruned.traced.whole
    if options is not None:
        yield UNREPAIRED, _unrepaired(pruned, clock), False
        for name, other, locked in other_cuts(pruned.traced, pruned.plan, budget):
            traced = pruned.traced.locking(locked)
            if name in pruned.others:
                again = _carried_out(traced, pruned.others[name], settings, other, clock)
            else:
                again = _cut(traced, pruned.decisions, settings, other, clock, pruned.pace)
            if again is None or again.plan.groups == pruned.plan.groups:
                continue
            yield name, again, True
            del again
    if whole is not None and options is not None and (again := _with_all(whole, pruned, settings, clock)) is not None:
        yield WITH_ALL, again, True
    if budget.kind != "error" and (options is not None or settings.method.name not in ("magnitude", "l2")):
        selector = Magnitude()
        with clock("compare"):
            ranked = rank(whole or pruned.traced, selector, (), settings.seed, clock.tell)
        other = replace(settings, method=selector)
        magnitude = _cut(whole or pruned.traced, ranked, other, budget, clock, pruned.pace)
        if magnitude is not None:
            yield MAGNITUDE, magnitude, False


def _unrepaired(pruned: Pruned, clock: Clock) -> Pruned:
    with clock("surgery"):
        cut = carry_out(pruned.traced, pruned.plan)
    return replace(cut, decisions=pruned.decisions, pace=pruned.pace, met=pruned.met)


def _with_all(whole: Traced, pruned: Pruned, settings: Settings, clock: Clock) -> Pruned | None:
    """The cut in which all blocks stay, and are narrower; None if that does not meet the budget."""
    try:
        return cut_to(whole, pruned.ranked, settings, clock)
    except BudgetError:
        return None


def _cut(
    traced: Traced,
    ranked: Mapping[str, Decision],
    settings: Settings,
    budget: Budget,
    clock: Clock,
    pace: Pace | None,
) -> Pruned | None:
    """Rankings cut to a budget, without repair; None if the budget cannot be met so."""
    try:
        again = cut_once(traced, ranked, settings, budget, clock, pace)
    except BudgetError:
        return None
    return None if again.removed.locked else again


def _carried_out(
    traced: Traced, decisions: Mapping[str, Decision] | None, settings: Settings, budget: Budget, clock: Clock
) -> Pruned | None:
    """A cut that is decided already; None if its budget could not be met, or if a group has to stay whole after all."""
    if decisions is None:
        return None
    with clock("surgery"):
        again = carry_out(traced, plan_of(traced, decisions, settings.method, budget, settings.seed))
    return None if again.removed.locked else replace(again, decisions=decisions)


def _tell(seen: dict[str, Apart], first: str, chosen: str, queries: int) -> None:
    """Say which model was chosen, and warn if magnitude pruning agrees more often than it."""
    told = "; ".join(f"{name}: {found.error:.3g}" for name, found in seen.items())
    text = f"on {queries} queries that were held back, the errors relative to the outputs' variance are: {told}"
    if chosen != first:
        log.warning("%s is returned instead of %s, because it is better: %s", chosen, first, text)
    else:
        log.info("%s is returned: %s", chosen, text)
    magnitude, mine = seen.get(MAGNITUDE), seen[chosen]
    if magnitude is None or chosen == MAGNITUDE:
        return
    advice = "The queries may not suit the model, or the budget is too small: pass samples, or raise it."
    if magnitude.better_than(mine):
        log.warning(
            "magnitude pruning at the same budget is closer to the original on the held-back queries (%s). %s",
            text,
            advice,
        )
    elif magnitude.same is not None and mine.same is not None and magnitude.same > mine.same:
        log.warning(
            "magnitude pruning at the same budget gives the original's answer to %d of the %d held-back queries, and "
            "what is returned to %d. %s",
            magnitude.same,
            queries,
            mine.same,
            advice,
        )
