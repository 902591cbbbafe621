"""prune(): model in, physically smaller model, plan and report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreprune._example import device_of, example_like
from coreprune._progress import Clock, Progress, silent
from coreprune.errors import BudgetError, InputError
from coreprune.graph import Captured, CostModel, Group, Recipe, adopt, recipe_of
from coreprune.pruning.allocation.allocate import allocate
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.calibration.calibration import gather
from coreprune.pruning.distill.distill import Distill, distill_
from coreprune.pruning.plans.decide import options_of
from coreprune.pruning.plans.plan import Plan, fingerprint
from coreprune.pruning.repair.lockstep import Refit, Repair
from coreprune.pruning.reporting.report import Report
from coreprune.pruning.selectors import Ranking, Selector, resolve
from coreprune.pruning.stages import cut, cut_to, make_report, repair_, trace
from coreprune.pruning.validate import check_model, check_patterns, check_settings
from coreprune.queries import Queries


@dataclass(frozen=True)
class Result:
    """What `prune` returns.

    rankings: scores and order of every free group, by name. queries: what selection and repair went by, or None; pass
    them to the next call, or save them. recipe: what became of shapes and remembered numbers, for `save`.
    """

    model: nn.Module
    plan: Plan
    report: Report
    rankings: dict[str, Ranking]
    recipe: Recipe
    queries: Queries | None = None


def prune(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | None = None,
    method: str | Selector = "auto",
    *,
    queries: Any = "auto",
    exclude: Sequence[str] = (),
    repair: bool | Repair = True,
    distill: int | Distill = 0,
    seed: int = 0,
    delta: float = 0.01,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Make a model physically smaller without data.

    model: any module that torch.export can trace. It is not changed, unless `inplace`; a failure never changes it.
    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
    budget: what may stay; half of every group when absent.
    method: a selector or its name (`SELECTORS`): functional (ours), loewner (the paper), magnitude, … "auto" takes
        functional where the result is repaired, folding where it is not.
    queries: what selection, allocation and repair go by: "auto" makes inputs without data; the name of a source or a
        source (`coreprune.queries`); unlabelled samples (a tensor, a DataLoader, the path of an .npz file); `Queries`;
        None for none at all, and then nothing is repaired. They are made only if something needs them.
    exclude: names of groups that stay whole, or patterns of them, e.g. `("*attention*", "layer1.*")`. `list_groups`
        lists the names. A budget is met by the others.
    repair: refit what reads pruned channels, in closed form. False leaves the weights of the coreset.
    distill: steps of training towards the original's answers on the queries, after the repair, or `Distill(...)`.
    checkpoint: a file for the state of that training, so that an interrupted run goes on where it was.
    seed: of queries and sampling; the same seed on the same machine gives the same plan and weights.
    delta: δ of the sampled certificates.
    cache: a file for the queries, so that an interrupted run goes on where it was and a later one need not make them.
    progress: called as progress(phase, done, total) while it works.

    Raises InputError (arguments), ModelError (the model cannot be traced) and BudgetError (the budget cannot be met);
    all are CoreprunErrors.
    """
    options = _repair_options(repair) if queries is not None else None
    budget, selector = check_settings(budget, seed, delta), resolve(method, options is not None)
    clock = Clock(progress or silent)
    excluded = check_patterns(exclude)
    with clock("capture"):
        captured, groups = trace(model, example_inputs, clock.tell, excluded)
    distillation = _distill_options(distill, queries)
    _affordable(budget, captured, groups)
    calibration = None
    by_queries = queries is not None and _by_queries(selector, budget)
    if by_queries or options is not None or distillation is not None:
        with clock("queries"):
            calibration = gather(model, example_inputs, captured, queries, seed, clock.tell, cache)
    choice, small, groups = cut_to(model, captured, groups, budget, selector, calibration, seed, clock)
    fits: tuple[Refit, ...] = ()
    if calibration is not None and options is not None:
        with clock("repair"):
            fits = repair_(small, model, groups, choice.plan, calibration, options, clock.tell)
    if calibration is not None and distillation is not None:
        with clock("distill"):
            generator = torch.Generator().manual_seed(seed)
            distill_(
                small,
                model,
                calibration.queries,
                distillation,
                generator=generator,
                checkpoint=checkpoint,
                progress=clock.tell,
            )
    settings = {
        "method": selector.name,
        "options": options_of(selector),
        "budget": asdict(budget),
        "exclude": list(excluded),
        "queries": _asked(queries),
        "repair": None if options is None else asdict(options),
        "distill": None if distillation is None else asdict(distillation),
        "seed": seed,
        "delta": delta,
    }
    with clock("certify"):
        report = make_report(model, small, captured, groups, choice, calibration, fits, settings)
    report.settings["seconds"] = clock.seconds
    recipe = recipe_of(model, small)
    if inplace:  # the last step, so that a failure before it leaves the given model as it was
        adopt(model, small)
        small = model
    return Result(small, choice.plan, report, choice.rankings, recipe, calibration.queries if calibration else None)


def make_plan(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | None = None,
    method: str | Selector = "auto",
    *,
    queries: Any = "auto",
    exclude: Sequence[str] = (),
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Decide which channels stay, and touch no weight. Arguments and errors as in `prune`."""
    budget, selector = check_settings(budget, seed, 0.01), resolve(method, queries is not None)
    clock = Clock(progress or silent)
    captured, groups = trace(model, example_inputs, clock.tell, check_patterns(exclude))
    _affordable(budget, captured, groups)
    calibration = None
    if queries is not None and _by_queries(selector, budget):
        calibration = gather(model, example_inputs, captured, queries, seed, clock.tell, cache)
    return cut_to(model, captured, groups, budget, selector, calibration, seed, clock)[0].plan


def apply_plan(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    queries: Any = None,
    repair: bool | Repair = True,
    inplace: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Carry out a plan on a checkpoint of the architecture that it was made for.

    example_inputs: as in `prune`; by default made up after the example that the plan was made with.
    queries: as in `prune`; with them the result is repaired, without (None) it has the weights that the plan says.

    Raises InputError if the architecture is another one, and what `prune` raises.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan must be a Plan (from make_plan() or Plan.from_json), not {type(plan).__name__}.")
    if example_inputs is None:
        if plan.example is None:
            raise InputError("the plan says nothing of its example input. Pass one: apply_plan(model, plan, example).")
        example_inputs = example_like(plan.example, device_of(model))
    check_model(model, example_inputs)
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise InputError(
            f"this plan was made for another architecture (fingerprint {plan.fingerprint}, this model has {found}): "
            "names, shapes and dtypes of all parameters must agree. Make a plan for this model."
        )
    tell = progress or silent
    captured, groups = trace(model, example_inputs, tell)
    sizes = {g.name: g.size for g in groups}
    for name, entry in plan.groups.items():
        if sizes.get(name) != entry.size:
            raise InputError(
                f"the plan prunes {name!r} with {entry.size} channels, but this model has "
                f"{sizes.get(name, 'no such group')}. Make a plan for this model."
            )
    smaller, put_back = cut(model, captured, groups, plan)
    if put_back:
        name, reason = next(iter(put_back.items()))
        raise BudgetError(f"the plan cannot be applied: {name} has to stay whole, because {reason}.")
    options = _repair_options(repair)
    if queries is not None and options is not None:
        calibration = gather(model, example_inputs, captured, queries, plan.seed, tell)
        repair_(smaller, model, groups, plan, calibration, options, tell)
    if inplace:
        adopt(model, smaller)
        smaller = model
    return smaller


def _asked(queries: Any) -> str | None:
    """What was asked for, as text: a name, a path, a source with its options; the user's own tensors have no name."""
    if queries is None or isinstance(queries, (str, Path)):
        return queries if queries is None else str(queries)
    return repr(queries) if callable(queries) else "samples"


def _by_queries(selector: Selector, budget: Budget) -> bool:
    """Whether the plan depends on queries: through the selector, or through the allocation."""
    allocates = budget.kind == "error" or (budget.kind != "keep" and not budget.uniform)
    return allocates or getattr(selector, "reads", False)


def _affordable(budget: Budget, captured: Captured, groups: list[Group]) -> None:
    """Refuse a budget that cannot be met before any queries are made, which may take long. Raises BudgetError."""
    if budget.kind != "error":
        allocate(budget, groups, CostModel(captured, groups))


def _distill_options(distill: int | Distill, queries: Any) -> Distill | None:
    if (
        isinstance(distill, bool)
        or not isinstance(distill, (int, Distill))
        or (isinstance(distill, int) and distill < 0)
    ):
        raise InputError(f"distill must be a number of steps ≥ 0 or Distill(...), not {distill!r}.")
    if distill == 0:
        return None
    if queries is None:
        raise InputError("distill needs queries, and there are to be none. Have them made (auto), or pass samples.")
    return Distill(steps=distill) if isinstance(distill, int) else distill


def _repair_options(repair: bool | Repair) -> Repair | None:
    if not isinstance(repair, (bool, Repair)):
        raise InputError(f"repair must be True, False or Repair(...), not {repair!r}.")
    return repair if isinstance(repair, Repair) else Repair() if repair else None
