"""Which channels of which parameters leave together, what they cost, and how to remove them.

    captured = capture(model, args, kwargs)          # one torch.export trace, the model is left as it was
    groups = find_groups(captured)                   # every group, free or locked with the reason
    traced = probe(Traced(model, captured, groups))  # lock what the forward does not survive (literal sizes)
    traced.cost_model({"layer1.0.conv1": 32})        # Cost(macs, params, bytes)
    result = remove(traced, {"layer1.0.conv1": kept_channels})
    result.model, result.kept, result.locked

A `Group` has `size` channels in units of `unit` that leave as a whole (`group.units()`), maybe in `sections` that all
have to keep the same number; `group.legal(keep)` says whether a choice is possible. `group.consumers` says where its
channels are read: parameter axes, graph node, module, and the channel at every position of that input.

`rule` teaches the trace an operation that it does not know. Such a rule gets a `Call` and returns a `Value`, which
`move`, `pointwise`, `product` and `statistic` make from the arguments.
"""

from __future__ import annotations

from coreprune._example import batch_of, normalise_example
from coreprune.graph.captured import Captured, capture
from coreprune.graph.costs import Cost, CostModel, cost
from coreprune.graph.grouping import find_groups
from coreprune.graph.groups import Consumer, Group, ParamSlice, describe, lock
from coreprune.graph.recipe import Recipe, all_names, named_tensors, rebuilt, recipe_of
from coreprune.graph.rules.compute import product
from coreprune.graph.rules.einsum_space import pointwise, statistic
from coreprune.graph.rules.movement import move
from coreprune.graph.rules.registry import Call, rule
from coreprune.graph.surgery import Removed, adopt, cut, kept_positions, probe, remove
from coreprune.graph.traced import Traced
from coreprune.graph.values import Value

__all__ = [
    "Call",
    "Captured",
    "Consumer",
    "Cost",
    "CostModel",
    "Group",
    "ParamSlice",
    "Recipe",
    "Removed",
    "Traced",
    "Value",
    "adopt",
    "all_names",
    "batch_of",
    "capture",
    "cost",
    "cut",
    "describe",
    "find_groups",
    "kept_positions",
    "lock",
    "move",
    "named_tensors",
    "normalise_example",
    "pointwise",
    "probe",
    "product",
    "rebuilt",
    "recipe_of",
    "remove",
    "rule",
    "statistic",
]
