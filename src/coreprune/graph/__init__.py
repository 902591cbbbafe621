"""Find which channels of which parameters can only be removed together, what they cost, and remove them.

    captured = capture(model, args, kwargs)          # one torch.export trace; the model is not changed
    groups = find_groups(captured)                   # every group, free or locked with the reason
    traced = probe(Traced(model, captured, groups))  # lock groups that break the forward (literal sizes)
    traced.cost_model({"layer1.0.conv1": 32})        # Cost(macs, params, bytes)
    result = remove(traced, {"layer1.0.conv1": kept_channels})
    result.model, result.kept, result.locked

A `Group` has `size` channels. They form units of `unit` channels, which can only be removed whole (`group.units()`).
The units may lie in `sections` that all have to keep the same number of units. `group.legal(keep)` says whether a
choice of channels is possible. `group.consumers` says where the channels are read: parameter axes, graph node, module,
and the channel at every position of that input.

`rule` adds a rule for an operation that the trace does not know. Such a rule gets a `Call` and returns a `Value`.
`move`, `pointwise`, `product` and `statistic` make a `Value` from the arguments.
"""

from __future__ import annotations

from coreprune._batch import BatchAxes
from coreprune._batch_trials import batch_axes
from coreprune._example import normalise_example
from coreprune.graph.captured import Captured, capture
from coreprune.graph.costs import Cost, CostModel, cost
from coreprune.graph.grouping import find_groups
from coreprune.graph.groups import Consumer, Group, ParamSlice, describe, lock
from coreprune.graph.lengths import Extent, extents
from coreprune.graph.members import Element, elements
from coreprune.graph.recipe import Recipe, all_names, named_tensors, rebuilt, recipe_of
from coreprune.graph.rules.compute import product
from coreprune.graph.rules.einsum_space import pointwise, statistic
from coreprune.graph.rules.movement import move
from coreprune.graph.rules.registry import Call, rule
from coreprune.graph.shorter import passing_, shallow, shallow_
from coreprune.graph.slicing import cut, kept_positions
from coreprune.graph.surgery import Removed, adopt, probe, remove
from coreprune.graph.traced import Traced
from coreprune.graph.values import Value

__all__ = [
    "BatchAxes",
    "Call",
    "Captured",
    "Consumer",
    "Cost",
    "CostModel",
    "Element",
    "Extent",
    "Group",
    "ParamSlice",
    "Recipe",
    "Removed",
    "Traced",
    "Value",
    "adopt",
    "all_names",
    "batch_axes",
    "capture",
    "cost",
    "cut",
    "describe",
    "elements",
    "extents",
    "find_groups",
    "kept_positions",
    "lock",
    "move",
    "named_tensors",
    "normalise_example",
    "passing_",
    "pointwise",
    "probe",
    "product",
    "rebuilt",
    "recipe_of",
    "remove",
    "rule",
    "shallow",
    "shallow_",
    "statistic",
]
