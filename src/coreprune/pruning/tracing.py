"""Trace a model for pruning: its groups, those that have to stay whole, and those that the caller excludes."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from coreprune._example import check_runs, normalise_example
from coreprune._patterns import no_match, shortened
from coreprune._plain import computed, plain
from coreprune._progress import Progress
from coreprune.errors import InputError, ModelError
from coreprune.graph import Captured, Group, Traced, capture, find_groups, probe
from coreprune.graph.check import IN_TRAINING
from coreprune.pruning.validate import REAL, Exclude, check_model, counterparts

log = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: Any,
    tell: Progress,
    exclude: Exclude = (),
    also: Sequence[Any] = (),
    batch_axis: Any = "auto",
    norm_statistics: bool = False,
) -> Traced:
    """Trace a model and find its groups.

    Weights that the model computes, and that could shrink, are plain parameters in `Traced.model`. Groups whose pruning
    would make the forward fail are locked, so that the allocation does not count on them. If it would fail in training
    mode, that mode is traced, too. A warning names parameters that nothing reads.

    exclude: names of groups, patterns of names, or modules of the model; these groups are locked too.
    also: further examples, which make other parts of the model run. batch_axis, norm_statistics: as for `prune`.

    Raises InputError if no group belongs to an item of `exclude`.
    """
    tell("capture", 0, 1)
    examples = (example_inputs, *also)
    for example in examples:
        check_model(model, example)
    found = _found(model, examples, batch_axis, norm_statistics)
    exclude = counterparts(exclude, model, found.model)
    traced = _probed(found, exclude, hopeless=IN_TRAINING)
    if any((group.locked_because or "").startswith(IN_TRAINING) for group in traced.groups):
        training = _in_training(found.model, found.captured)
        if training is not None:
            captured = replace(found.captured, more=(*found.captured.more, training))
            found = replace(found, captured=captured, groups=find_groups(captured, norm_statistics))
        traced = _probed(found, exclude)
    widths = {group.size for group in traced.free.values()}
    suspects = [n for n in traced.captured.unread if widths & set(traced.tensors[n].shape)]
    if suspects:
        log.warning(
            "nothing reads %s when the model runs on the example. Inputs that use it, such as larger ones, may fail "
            "in the pruned model. Pass examples of them: also=[...].",
            shortened(suspects),
        )
    tell("capture", 1, 1)
    return traced


def _found(model: nn.Module, examples: Sequence[Any], batch_axis: Any, norm_statistics: bool) -> Traced:
    """The groups of a model, or of its copy with plain weights, before a cut was tried."""
    weights = computed(model)
    found = _grouped(model, weights, examples, batch_axis, norm_statistics)
    if weights:
        free = {s.param for g in found.free.values() for s in g.slices}
        if any(name not in free for name in weights):  # these may stay as they are
            left = tuple(name for name in weights if name in free)
            found = _grouped(model, left, examples, batch_axis, norm_statistics)
    return found


def _grouped(
    model: nn.Module, weights: tuple[str, ...], examples: Sequence[Any], batch_axis: Any, norm_statistics: bool
) -> Traced:
    model = plain(model, weights)
    first, *others = (captured_of(model, example, batch_axis) for example in examples)
    captured = replace(first, more=tuple(others))
    return Traced(model, captured, find_groups(captured, norm_statistics), plain=weights)


def captured_of(model: nn.Module, example_inputs: Any, batch_axis: Any) -> Captured:
    """The graph of a model that runs on the example. Raises ModelError for one that does not."""
    captured = capture(model, *normalise_example(example_inputs), batch_axis=batch_axis)
    # Tracing misses some errors. Without this check they would make every group fail the probe, as if no group of the
    # model could shrink.
    check_runs(model, captured.args, captured.kwargs)
    return captured


def _in_training(model: nn.Module, captured: Captured) -> Captured | None:
    """The model traced in training mode, or None. Batch norms may need two samples for it."""
    for size in (1, 2):
        args, kwargs = captured.axes.repeated((captured.args, captured.kwargs), size)
        try:
            return capture(model, args, kwargs, size, training=True, batch_axis=captured.axes)
        except ModelError as error:
            log.info("training mode cannot be traced with a batch of %d: %s", size, error)
    return None


def _probed(found: Traced, exclude: Exclude, hopeless: str | None = None) -> Traced:
    return probe(found.locking(odd_weights(found) | excluded(found, exclude)), hopeless)


def odd_weights(traced: Traced) -> dict[str, str]:
    """The free groups with weights that are no finite real numbers: name -> the reason."""
    reasons: dict[str, str] = {}
    for name, group in traced.free.items():
        for param in dict.fromkeys(s.param for s in group.slices):
            tensor = traced.tensors[param]
            if param in traced.captured.parameters and tensor.dtype not in REAL:
                reasons.setdefault(name, f"{param} has dtype {tensor.dtype}")
            elif tensor.dtype in REAL and not bool(torch.isfinite(tensor).all()):
                reasons.setdefault(name, f"{param} has a NaN or infinite entry")
    return reasons


def excluded(traced: Traced, exclude: Exclude) -> dict[str, str]:
    """The free groups that the caller excludes: name -> the reason. Raises InputError."""
    reasons: dict[str, str] = {}
    for item in exclude:
        if isinstance(item, nn.Module):
            found, why = _made_by(item, traced)
        else:
            found = [g for g in traced.groups if fnmatch.fnmatchcase(g.name, item)]
            why = f"excluded by the caller (pattern {item!r})"
            if not found:
                raise InputError(no_match(f"exclude={item!r}", item, [g.name for g in traced.groups]))
        for group in found:
            if group.locked_because is None:
                reasons.setdefault(group.name, why)
    return reasons


def exclude_names(traced: Traced, exclude: Exclude) -> tuple[str, ...]:
    """The same exclusions, with every module replaced by the names of the groups that it makes."""
    named: list[str] = []
    for item in exclude:
        named += [item] if isinstance(item, str) else [g.name for g in _made_by(item, traced)[0]]
    return tuple(dict.fromkeys(named))


def _made_by(module: nn.Module, traced: Traced) -> tuple[list[Group], str]:
    """The groups that have a channel made by a layer inside `module`, and the reason for excluding them."""
    paths = [path for path, m in traced.model.named_modules(remove_duplicate=False) if m is module]
    kind = type(module).__name__
    if not paths:
        raise InputError(
            f"exclude: a {kind} is given that is not a module of this model. Pass one of its modules, "
            "e.g. exclude=(model.head,), or the names of groups."
        )
    inside = tuple(f"{path}." if path else "" for path in paths)
    found = [g for g in traced.groups if any(p.param.startswith(inside) for p in g.producers)]
    if not found:
        raise InputError(
            f"exclude: no layer inside {paths[0]!r} ({kind}) makes channels, so there is nothing to exclude."
        )
    place = f"module {paths[0]!r}" if paths[0] else "the whole model"
    return found, f"excluded by the caller ({place})"
