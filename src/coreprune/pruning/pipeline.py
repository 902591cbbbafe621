"""prune(): from a model to a physically smaller model, a plan and a report."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils import _pytree as pytree

from coreprune._example import normalise_example
from coreprune._progress import Clock
from coreprune._telling import Wanted, telling
from coreprune._twin import guarded
from coreprune.errors import InputError
from coreprune.graph import Recipe, Traced, adopt
from coreprune.pruning.allocation.budget import RISKS, Budget
from coreprune.pruning.allocation.keeps import left_whole
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.calibration.calibration import Asked, Calibration, gather
from coreprune.pruning.configured import unsaid, with_true_config
from coreprune.pruning.controlled import set_aside, smallest
from coreprune.pruning.distill.options import Distill
from coreprune.pruning.half import in_single_precision
from coreprune.pruning.memory import Shelf, bytes_of
from coreprune.pruning.offloaded import of_offloaded
from coreprune.pruning.over_ranks import agree_on, agree_on_weights, over_ranks, refuse_over_ranks
from coreprune.pruning.part import of_a_part
from coreprune.pruning.planning import affordable, by_queries, say_what_queries_are_for
from coreprune.pruning.plans.plan import Plan
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.reporting.figures import figures
from coreprune.pruning.reporting.report import Compared, Memory, Report, versions
from coreprune.pruning.residual import with_residual
from coreprune.pruning.rotation import Rotated
from coreprune.pruning.safety_net import best_of, distilled, trained
from coreprune.pruning.selectors import Method, Ranking, resolve
from coreprune.pruning.settings import EXAMPLES, Settings, asked_queries
from coreprune.pruning.stages import Pruned, finished, prune_to, repair_
from coreprune.pruning.summing_up import make_report
from coreprune.pruning.timing.pace import Pace
from coreprune.pruning.tracing import exclude_names, trace
from coreprune.pruning.unfinished import Unfinished, unfinished
from coreprune.pruning.validate import (
    check_also,
    check_cost,
    check_count,
    check_depth,
    check_exclude,
    check_risk,
    check_settings,
    counterparts,
    refuse_plain,
    repair_options,
)
from coreprune.queries import Queries
from coreprune.queries.describe import description

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Result:
    """What `prune` returns.

    model: the smaller model. plan: which channels stay. report: sizes, certificates, settings. rankings: the scores and
    the order of the units of every free group, by the group's name. recipe: how shapes and stored numbers of the model
    changed; `save` needs it. queries: the queries that were used, or None. Pass them to the next call, or save them.
    config: the configuration of the dense model, if that is of Hugging Face; `model.config` says the pruned one.
    """

    model: nn.Module
    plan: Plan
    report: Report
    rankings: dict[str, Ranking]
    recipe: Recipe
    queries: Queries | None = None
    config: Any = None

    def __repr__(self) -> str:
        """One line: which model was pruned, and how much of it is left."""
        sizes = [(name, *getattr(self.report, name)) for name in ("parameters", "macs")]
        left = ", ".join(f"{name} {before:,} → {after:,}" for name, before, after in sizes)
        return f"Result({self.report.model}: {left}; see .model, .plan, .report)"

    def _repr_html_(self) -> str:
        """The report's summary, for a notebook."""
        return self.report._repr_html_()


@of_offloaded
@over_ranks
@with_residual
@with_true_config
@of_a_part
@in_single_precision
def prune(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | None = None,
    method: Method = "auto",
    *,
    queries: Any = "auto",
    n_queries: int | None = None,
    exclude: str | nn.Module | Collection[str | nn.Module] = (),
    also: Sequence[Any] = (),
    repair: bool | Repair = True,
    distill: int | Distill = 0,
    compare: bool = True,
    seed: int = 0,
    delta: float = 0.01,
    cost: CostFunction | None = None,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Wanted = None,
    log: str | Path | None = None,
    batch_axis: Any = "auto",
    part: str | nn.Module | None = None,
    norm_statistics: bool = False,
    stock: bool = False,
    tokenizer: Any = None,
    memory: int | str | None = None,
    resume: str | Path | None = None,
    depth: bool = False,
    residual: Literal["rotate"] | Rotated | None = None,
) -> Result:
    """Make a model physically smaller without data.

    model: any module that torch.export can trace. It is not changed unless `inplace` is set. A failure never changes
        it.
    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
    budget: what may stay; half of every group when absent.
    method: a selector or its name (`coreprune.selectors`): functional (ours), loewner (the paper), magnitude, … "auto"
        takes functional if the result is repaired, and folding if it is not.
    queries: the inputs on which selection, allocation and repair compare the two models. "auto" makes inputs without
        data. Or give a source or its name (`coreprune.queries`); unlabelled samples (a tensor, a Dataset, a DataLoader,
        the path of an .npz file); or `Queries`. None means no queries, and then nothing is repaired. Queries are made
        only if something needs them.
    n_queries: how many queries to make, or how many of the samples to take, from the first on. By default all samples,
        or 4,096 vectors, or 256 of anything else that is made; fewer if one costs much (see `make_queries`). Beside
        fewer than 15 samples, queries are made as well, and beside fewer than 128 texts at least 96 of every other
        kind, unless a number is said.
    exclude: what stays whole: names of groups, patterns of names, or modules of the model, e.g.
        `("*attention*", model.head)`. `list_groups` lists the names. The other groups meet the budget.
    also: further examples, each like `example_inputs`, that make other parts of the model run: another size of the
        images, another task. Their layers are pruned together with the rest. Costs are those of `example_inputs`. What
        runs in training mode alone is found without examples.
    repair: refit the layers that read pruned channels, in closed form, and where that is cheap train the blocks of
        layers after that (`Repair(descent=...)`). False keeps the weights that the selector gives.
    distill: after the repair, train for this many steps towards the original's outputs on the queries; or
        `Distill(...)`.
    compare: hold some of the queries back, and compare the result on them with what could be returned instead: the cut
        without repair, with the widest groups whole, spread evenly, and magnitude pruning. The best is returned, and
        the report says which. The other cuts are repaired, too, unless the model is large and the first error small.
        False returns the first.
    seed: for making queries and for sampling. The same seed on the same machine gives the same plan and weights.
    delta: the sampled certificates hold with probability 1 − delta.
    cost: a function from the widths of all groups to a number, such as milliseconds, for `Budget(cost=...)`. A budget
        of errors then makes that number small, instead of the MACs.
    inplace: shrink `model` itself, as the last step.
    checkpoint: a file for the state of the distillation. An interrupted run resumes from it.
    cache: a file for the queries. An interrupted run resumes from it, and a later run need not make them again.
    progress: True shows bars with the time left, and plain lines where there is no terminal; False shows nothing; a
        function is called as progress(phase, done, total). None, the default: bars in a terminal and in a notebook
        (both need `rich`); elsewhere lines of the logger "coreprune.progress" at level INFO, one for each phase, then
        at most one a minute.
    log: a file for programs to which rows are appended while the work goes on: one JSON object a line. Every row has
        the time, the phase and the seconds since the start; rows of progress have `done` and `total`, those of the
        distillation have the `loss` of that step, and the last row has the figures of the result.
    batch_axis: which axis of the inputs holds the samples. "auto" finds it out: the axes along which the model gives
        for two samples together what it gives for each alone. Or say it: a number for all tensors, a dict with a number
        or None for each input by its position or keyword, e.g. {"x": 1, "mask": 0}, or None for a model without a
        batch, such as one that takes a graph, a list of images or a single image. Its queries are whole examples of the
        same shapes, which run one at a time, and its MACs are those of one example.
    part: a module of the model, or its name, to prune alone, e.g. "backbone" of a detector whose other parts cannot be
        traced. The example and samples are still those of the model, and show what enters the part. The budget, names
        in `exclude`, plan and report are of the part; the result's model is the whole one, with the smaller part in it.
    norm_statistics: let channels leave that a LayerNorm, an RMSNorm or a GroupNorm with one group takes its statistics
        over, such as the residual stream of a transformer. Its mean and variance are then taken over fewer channels,
        so the result is not the original without these channels, and is run but not compared; the repair does the
        rest.
    residual: "rotate" lets the residual streams of a transformer shrink, too: in a copy of the model they are rotated
        to the principal axes of what flows in them on queries (`rotate_residual`), which changes nothing, and the axes
        that carry least can leave. It implies norm_statistics. A `Rotated` is taken as it is, with its own model.
    tokenizer: of a model that reads text, if none lies in the folder that the model was loaded from: a
        `tokenizers.Tokenizer`, a fast tokenizer of transformers, or a folder with a tokenizer.json. With it, queries
        that are made without data contain text of this machine (queries="made-tokens" leaves it out), and samples are
        accompanied by it. False: none, and no text of this machine.
    memory: how much of main memory may hold what the model computes on the queries, and moments that are needed again,
        in bytes or as text such as "8GiB"; half of what is free by default. The rest lies in files in the folder for
        temporary files (TMPDIR). The process takes more than that: the models, one batch, the matrices of one layer.
        The result is the same, up to rounding.
    depth: let whole elements of module lists leave, such as the blocks of a transformer, where the errors on the
        queries say that this is better than narrower layers. A skip connection has to lead around them on the graph.
        What enters them passes on. The budget limits macs, params or bytes.
    stock: cut only what the configuration of a Hugging Face model can say, with equal widths in equal layers, so that
        `from_pretrained` reads what `save_pretrained` writes. Groups that none of its numbers sizes stay whole.
    resume: a folder for what is finished: the queries, the decision about each group, each refitted layer, the state of
        the distillation. A run that was killed goes on from there, with the same arguments, and ends with the same bits
        as one that was not, on the same machine with the same number of threads and the same `memory`. A budget of
        agreement, another loss or time only resumes its queries. The folder is not deleted at the end. The state of
        another run is refused.

    Where torch.distributed is initialised, every process must make the call, with the same model and the same
    arguments. The queries are those of the first process. All of them share the work, and each gets the result. They
    wait for each other as long as the process group says (`timeout`).

    Raises InputError (wrong arguments), ModelError (the model cannot be traced), BudgetError (the budget cannot be met)
    and RankError (another process has failed). All are CoreprunErrors.
    """
    del part  # `of_a_part` has done what it asks for
    asked = repair_options(repair)
    options = asked if queries is not None else None
    budget = check_settings(budget, seed, delta)
    selector = resolve(method, options is not None, queries is not None)
    if resume is not None:
        cache = cache or Path(resume) / "queries.safetensors"
        checkpoint = checkpoint or (Path(resume) / "distill.safetensors" if distill else None)
    training = _distill_options(distill, queries, checkpoint)
    refuse_over_ranks(training is not None, budget)
    check_count(n_queries, "n_queries")
    check_cost(cost, budget)
    check_risk(budget, queries, training is not None)
    check_depth(depth, budget, queries, inplace, resume is not None)
    most = bytes_of(memory)
    excluded, others = check_exclude(exclude), check_also(also)
    with telling(progress, log) as tell, guarded(model):
        clock = Clock(tell)
        tell.note("start", model=type(model).__name__, version=version("coreprune"))
        with clock("capture"):
            traced = trace(model, example_inputs, clock.tell, excluded, others, batch_axis, norm_statistics)
        if isinstance(residual, Rotated):  # `with_residual` has made it
            traced = traced.flagging(residual.shares, "rotated")
        refuse_plain(inplace, traced.plain)
        excluded = counterparts(excluded, model, traced.model)
        if stock:
            odd, budget = unsaid(traced), replace(budget, uniform=True)
            traced, excluded = traced.locking(odd), (*excluded, *odd)
        pace = affordable(budget, traced, cost, clock, depth)
        traced = traced.locking(left_whole(budget, traced.groups))
        settings = Settings(
            budget=budget,
            method=selector,
            queries=asked_queries(queries),
            n_queries=n_queries,
            exclude=exclude_names(traced, excluded),
            also=EXAMPLES if others else "",
            repair=options,
            distill=training,
            compare=compare,
            seed=seed,
            delta=delta,
            cost=cost,
            batch_axis=batch_axis,
            norm_statistics=norm_statistics,
            tokenizer=tokenizer,
            memory=memory,
            depth=depth,
            residual="rotate" if residual else "",
        )
        agree_on(traced, {**settings.as_dict(), "resume": resume is not None})
        calibration = exam = None
        state = unfinished(resume, lambda: _identity(traced, settings, example_inputs, others, queries))
        needed = queries is not None and (depth or by_queries(selector, budget))
        if needed or options is not None or training is not None:
            if options is None and training is None:
                say_what_queries_are_for(selector, queries)
            with clock("queries"):
                asked = Asked(example_inputs, queries, n_queries, cache, tokenizer, most)
                if budget.kind in RISKS:
                    asked, exam = set_aside(traced, asked, budget, delta, seed, clock.tell)
                calibration = gather(traced, asked, seed, clock.tell)
            state = state.after(pytree.tree_leaves((calibration.batches, calibration.kinds)))
        path = None
        if calibration is not None and exam is not None:
            pruned, compared, path = smallest(traced, settings, calibration, exam, clock)
        else:
            kept = state if pace is None else Unfinished()  # what depends on measured times is not what it was
            pruned, compared = _pruned(traced, settings, calibration, clock, pace, kept)
        small = pruned.removed.model
        agree_on_weights(small)
        if calibration is not None and training is not None:
            compared = distilled(pruned, settings, calibration, compared, checkpoint, clock)
        with clock("certify"):
            report = make_report(pruned, settings, calibration, compared, path)
        report = replace(report, seconds=clock.seconds, memory=_used(most, calibration, clock))
        small, recipe = finished(small, traced, pruned.plan.dropped)
        tell.note("result", **figures(report))
        rankings = {name: decision.ranking for name, decision in pruned.decisions.items()}
    if inplace:  # the last step, so that a failure before it leaves the given model unchanged
        adopt(model, small)
        small = model
    return Result(small, pruned.plan, report, rankings, recipe, calibration.given if calibration else None)


def _pruned(
    traced: Traced,
    settings: Settings,
    calibration: Calibration | None,
    clock: Clock,
    pace: Pace | None,
    state: Unfinished,
) -> tuple[Pruned, list[Compared]]:
    """Cut to the budget, repair, and take the best on the queries that are held back."""
    pruned, options = prune_to(traced, settings, calibration, clock, pace, state), settings.repair
    compared: list[Compared] = []
    if calibration is None:
        return pruned, compared
    if options is not None and calibration.useful:
        with clock("repair"):
            pruned = replace(pruned, fits=repair_(pruned, calibration, options, clock.tell, state))
    if settings.compare and calibration.useful:
        pruned, compared = best_of(pruned, settings, calibration, clock, state)
    if options is not None and pruned.fits:
        pruned, compared = trained(pruned, settings, calibration, compared, clock)
    return pruned, compared


def _identity(
    traced: Traced, settings: Settings, example: Any, others: Sequence[Any], queries: Any
) -> Iterator[tuple[str, Any]]:
    """Everything that the result depends on, by name."""
    yield from traced.tensors.items()
    yield "example_inputs", pytree.tree_leaves(normalise_example(example))
    yield "also", [pytree.tree_leaves(normalise_example(other)) for other in others]
    given = pytree.tree_leaves((queries.args, queries.kwargs)) if isinstance(queries, Queries) else queries
    yield "queries", given if description(given) is not None else type(given).__name__  # what it yields is seen later
    yield from ((name, getattr(settings, name)) for name in ("budget", "method", "repair", "distill", "cost"))
    yield "settings", {name: repr(value) for name, value in settings.as_dict().items()}
    yield "versions", versions()


def _used(most: int, calibration: Calibration | None, clock: Clock) -> Memory:
    shelf = Shelf() if calibration is None else calibration.shelf
    return Memory(most, shelf.most, shelf.spilled, clock.peaks)


def _distill_options(distill: int | Distill, queries: Any, checkpoint: str | Path | None) -> Distill | None:
    if (
        isinstance(distill, bool)
        or not isinstance(distill, (int, Distill))
        or (isinstance(distill, int) and distill < 0)
    ):
        raise InputError(f"distill must be a number of steps ≥ 0 or Distill(...), not {distill!r}.")
    if distill == 0:
        if checkpoint is not None:
            raise InputError(
                "checkpoint is the file for the state of the distillation, and distill=0 asks for none. "
                "Set distill to a number of steps, or leave checkpoint out."
            )
        return None
    if queries is None:
        raise InputError("distill needs queries, and there are to be none. Have them made (auto), or pass samples.")
    return Distill(steps=distill) if isinstance(distill, int) else distill
