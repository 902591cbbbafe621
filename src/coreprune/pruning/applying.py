"""apply_plan(): carry out a plan on a checkpoint of its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from coreprune._example import device_of, example_like
from coreprune._plain import computed
from coreprune._telling import Wanted, telling
from coreprune._twin import guarded
from coreprune.errors import BudgetError, InputError
from coreprune.graph import Traced, adopt, find_groups
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.configured import with_true_config
from coreprune.pruning.half import in_single_precision
from coreprune.pruning.memory import bytes_of
from coreprune.pruning.offloaded import of_offloaded
from coreprune.pruning.over_ranks import agree_on, over_ranks
from coreprune.pruning.part import of_a_part
from coreprune.pruning.plans.plan import Plan
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.settings import asked_queries
from coreprune.pruning.stages import carry_out, descend_, finished, repair_
from coreprune.pruning.tracing import trace
from coreprune.pruning.validate import (
    check_also,
    check_architecture,
    check_count,
    check_model,
    refuse_plain,
    repair_options,
)


@of_offloaded
@over_ranks
@with_true_config
@of_a_part
@in_single_precision
def apply_plan(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    also: Sequence[Any] = (),
    queries: Any = None,
    n_queries: int | None = None,
    repair: bool | Repair = True,
    inplace: bool = False,
    progress: Wanted = None,
    batch_axis: Any = "auto",
    norm_statistics: bool = False,
    tokenizer: Any = None,
    memory: int | str | None = None,
) -> nn.Module:
    """Carry out a plan on a checkpoint of the architecture that the plan was made for.

    example_inputs: as in `prune`. By default one is made with the structure, shapes and dtypes that the plan recorded.
    queries: as in `prune`. With queries the result is repaired. Without (None) it has the weights that the plan gives.

    The other arguments are those of `prune`. Raises InputError if the model has another architecture, and whatever
    `prune` raises.
    """
    if not isinstance(plan, Plan):
        raise InputError(f"plan must be a Plan (from make_plan() or Plan.from_json), not {type(plan).__name__}.")
    if plan.rotated:
        raise InputError(
            "the plan was made with residual='rotate': it names axes of a rotated copy, and fits no other model. Load "
            "what save() wrote, or prune this model with residual='rotate'."
        )
    check_count(n_queries, "n_queries")
    options, others, most = repair_options(repair), check_also(also), bytes_of(memory)
    if example_inputs is None:
        if plan.example is None:
            raise InputError("the plan says nothing of its example input. Pass one: apply_plan(model, plan, example).")
        example_inputs = example_like(plan.example, device_of(model))
    check_model(model, example_inputs)
    if not computed(model):
        check_architecture(model, plan)
    with telling(progress) as tell, guarded(model):
        traced = trace(model, example_inputs, tell, also=others, batch_axis=batch_axis, norm_statistics=norm_statistics)
        check_architecture(traced.model, plan)
        refuse_plain(inplace, traced.plain)
        sizes = {g.name: g.size for g in traced.groups}
        for name, entry in plan.groups.items():
            if sizes.get(name) != entry.size:
                raise InputError(
                    f"the plan prunes {name!r} with {entry.size} channels, but this model has "
                    f"{sizes.get(name, 'no such group')}. Make a plan for this model."
                )
        if entered := _needs_norm_statistics(traced, plan):
            raise InputError(
                f"the plan lets channels of {entered} leave, which enter the statistics of a norm. If it was made with "
                "norm_statistics=True, apply it with that, too."
            )
        said = {"norm_statistics": norm_statistics, "batch_axis": batch_axis, "repair": options, "n_queries": n_queries}
        agree_on(traced, {**said, "plan": plan, "queries": asked_queries(queries)})
        if plan.dropped:
            traced = _without(traced, plan, inplace)
        pruned = carry_out(traced, plan)
        if pruned.removed.locked:
            name, reason = next(iter(pruned.removed.locked.items()))
            raise BudgetError(f"the plan cannot be applied: {name} has to stay whole, because {reason}.")
        if queries is not None and options is not None:
            asked = Asked(example_inputs, queries, n_queries, tokenizer=tokenizer, memory=most)
            calibration = gather(traced, asked, plan.seed, tell)
            if calibration.useful and repair_(pruned, calibration, options, tell):
                descend_(pruned, calibration, options, plan.seed, tell)
    if inplace:
        adopt(model, pruned.removed.model)
        return model
    return finished(pruned.removed.model, traced, plan.dropped)[0]


def _without(traced: Traced, plan: Plan, inplace: bool) -> Traced:
    """The model without the blocks that the plan drops. Raises InputError if it has no such blocks, or needs them."""
    if inplace:
        raise InputError("the plan drops blocks, which leave a copy of the model alone. Leave inplace out.")
    found, refused = traced.elements
    for name in plan.dropped:
        if name not in found:
            why = refused.get(name, "there is no such element of a list of modules")
            raise InputError(f"the plan drops {name!r}, which this model needs: {why}. Make a plan for this model.")
    gone = [found[name] for name in plan.dropped]
    if problem := traced.check.without(gone):
        raise InputError(f"the plan drops {', '.join(plan.dropped)}, and without them {problem}.")
    return traced.dropping(gone)


def _needs_norm_statistics(traced: Traced, plan: Plan) -> str:
    """The first group that a plan cuts and that only `norm_statistics` would free, or ""."""
    cut = [g.name for g in traced.groups if g.name in plan.groups and len(plan.groups[g.name].kept) < g.size]
    locked = [name for name in cut if name not in traced.free]
    freed = {g.name for g in find_groups(traced.captured, True) if g.locked_because is None} if locked else set()
    return next((name for name in locked if name in freed), "")
