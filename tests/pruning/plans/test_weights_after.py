"""weights_after and pour_: what a plan does to the weights, on architectures whose channels lie in every odd way."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from coreprune import InputError, Plan
from coreprune.graph import Traced, capture, find_groups, normalise_example, remove
from coreprune.graph.groups import layout
from coreprune.pruning.plans.plan import GroupPlan
from coreprune.pruning.plans.weights_after import pour_, weights_after
from graph.zoo import ZOO, randomise
from small_networks import bits
from sweeps import in_turn
from zoo_examples import call, example

# Dense and flattened consumers, concatenation, shuffles, joins, depthwise filters, heads, gates, units of four.
MERGED = ("mlp", "vgg", "cifar-resnet56-a", "densenet", "shufflenet-v2", "mobilenet-v2", "unet", "pixel-shuffle")
MERGED_WHOLE = ("bert", "llama-gqa", "conv1d-glu", "conv3d", "swin", "se-resnet", "timm-style-vit", "t5", "autoencoder")


def positions(piece, group, unit):
    """All positions of one unit on an axis, in order. Written without `layout`, from the description of the group."""
    return [p for p, c in enumerate(piece.index.tolist()) if c >= 0 and c // group.unit == unit]


def mergeable(groups):
    """Groups whose units see the same inputs and are read through weights."""
    for group in groups:
        plain = group.sections is None and "functional" not in group.flags and "norm-statistics" not in group.flags
        if group.locked_because is None and plain and all(s.index.ndim == 1 for s in group.slices):
            yield group


def traced(name):
    entry = ZOO[name]
    model = randomise(entry.build())
    groups = find_groups(capture(model, *normalise_example(example(entry.inputs(1)))))
    return entry, model, groups


def pair(group):
    """Two units of a group, anywhere."""
    units = group.size // group.unit
    return torch.randperm(units, generator=torch.Generator().manual_seed(units))[:2].tolist()


def clone(model, group):
    """Make the second unit of the pair a copy of the first, in everything that makes it."""
    tensors, (first, second) = {**dict(model.named_parameters()), **dict(model.named_buffers())}, pair(group)
    with torch.no_grad():
        for piece in (*group.producers, *group.others):
            rows = tensors[piece.param].movedim(piece.dim, 0)
            rows[positions(piece, group, second)] = rows[positions(piece, group, first)].clone()


def drop_second(group, **more):
    """A plan that lets the second unit of the pair go into the first."""
    (first, second), unit = pair(group), group.unit
    targets = list(range(group.size))
    targets[second * unit : (second + 1) * unit] = range(first * unit, (first + 1) * unit)
    kept = tuple(c for c in range(group.size) if c // unit != second)
    return GroupPlan(group.size, kept, targets=tuple(targets), **more)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mean"), in_turn([*MERGED, *MERGED_WHOLE], [False, True], step=2))
def test_merging_twins_loses_nothing(name, mean):
    """The oracle is the network itself: two units that are copies of each other, one of which goes into the other."""
    entry, model, groups = traced(name)
    found = list(mergeable(groups))
    assert found
    for group in found:
        clone(model, group)
    plans = {g.name: drop_second(g, mean=mean) for g in found}
    captured = capture(model, *normalise_example(example(entry.inputs(1))))
    removed = remove(Traced(model, captured, groups), {n: torch.tensor(p.kept) for n, p in plans.items()})
    plans = {n: p for n, p in plans.items() if n not in removed.locked}
    assert plans
    before = bits(model)
    after = weights_after(Traced(model, captured, groups), plans)
    assert bits(model) == before
    pour_(removed.model, after, removed.masks)
    wanted, found = (call(m, entry.inputs(2)) for m in (model, removed.model))
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "densenet", "resnext", "shufflenet-v2", "bert", "mixtral"])
def test_the_full_shaped_weights_compute_what_the_pruned_model_computes(name, gen):
    entry, model, groups = traced(name)
    plans = {}
    for group in mergeable(groups):
        factors = tuple((torch.rand(group.size - group.unit, generator=gen) + 0.5).tolist())
        scales = torch.ones(group.size)
        scales[pair(group)[1] * group.unit : (pair(group)[1] + 1) * group.unit] = 0.7
        plans[group.name] = drop_second(group, factors=factors, scales=tuple(scales.tolist()), mean=True)
    captured = capture(model, *normalise_example(example(entry.inputs(1))))
    removed = remove(Traced(model, captured, groups), {n: torch.tensor(p.kept) for n, p in plans.items()})
    plans = {n: p for n, p in plans.items() if n not in removed.locked}
    after = weights_after(Traced(model, captured, groups), plans)
    pour_(removed.model, after, removed.masks)
    full = copy.deepcopy(model)
    with torch.no_grad():
        for key, tensor in [*full.named_parameters(), *full.named_buffers()]:
            assert tensor.dtype == after[key].dtype
            tensor.copy_(after[key])
    wanted, found = (call(m, entry.inputs(2)) for m in (full, removed.model))
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_merged_columns_are_summed_with_their_scales_and_rows_averaged(gen):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    randomise(model).float()
    captured = capture(model, torch.zeros(2, 3))
    groups = find_groups(captured)
    plan = GroupPlan(
        4, (0, 3), (2.0, 1.0), None, (0, 0, -1, 3), (1.0, 0.5, 1.0, 1.0), True, {"1.weight": (3.0, 1.0, 1.0, 1.0)}
    )
    after = weights_after(Traced(model, captured, groups), {"0": plan})
    v, w, scale = model[3].weight.double(), model[0].weight.double(), model[1].weight.double()
    wanted = torch.stack([2 * v[:, 0] + 0.5 * v[:, 1], torch.zeros(2), torch.zeros(2), v[:, 3]], dim=1)
    assert torch.allclose(after["3.weight"].double(), wanted, atol=1e-6)
    assert torch.allclose(after["0.weight"][0].double(), (w[0] + w[1]) / 2, atol=1e-6)
    assert torch.equal(after["0.weight"][3], model[0].weight[3])
    assert after["1.weight"][0].item() == pytest.approx((3 * scale[0] + scale[1]).item() / 2, rel=1e-6)
    assert torch.equal(after["3.bias"], model[3].bias)
    assert after["0.weight"].dtype == torch.float32


def test_units_that_lie_differently_cannot_be_merged():
    """A plan from elsewhere must not add the weights of one position to those of another."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(8, 2)

        def forward(self, x):
            y = torch.relu(self.a(x))
            return self.b(torch.cat([y, y.flip(1) ** 2], dim=1))

    model = Odd()
    captured = capture(model, torch.zeros(1, 3))
    groups = find_groups(captured)
    group = next(g for g in groups if g.name == "a")
    assert layout(group.consumers[0].slices[0].index, group) is None
    with pytest.raises(InputError, match=r"do not lie alike in b\.weight"):
        weights_after(Traced(model, captured, groups), {"a": drop_second(group)})


GOOD = {"size": 4, "kept": [0, 3], "factors": None, "negative_factors": None}
MERGE = {
    **GOOD,
    "targets": [0, 0, -1, 3],
    "scales": [1.0, 0.5, 1.0, 1.0],
    "mean": True,
    "gains": {"bn.weight": [1, 2, 0, 1]},
}


def read(entry):
    return Plan.from_json(
        json.dumps(
            {"schema": 1, "groups": {"a": entry}, "fingerprint": "", "method": "", "seed": 0, "budget": {"keep": 0.5}}
        )
    )


def test_plans_with_and_without_merges_are_read_back():
    old = read(GOOD).groups["a"]
    assert old == GroupPlan(4, (0, 3))
    plan = read(MERGE)
    assert plan.groups["a"].targets == (0, 0, -1, 3)
    assert plan.groups["a"].gains == {"bn.weight": (1.0, 2.0, 0.0, 1.0)}
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": [0, 0, -1]}, "for each of 4 channels"),
        ({"targets": [0, 1, -1, 3]}, "does not keep"),
        ({"targets": [3, 0, -1, 3]}, "does not keep"),
        ({"targets": [0, 0, -2, 3]}, "does not keep"),
        ({"targets": [0, 0, 7, 3]}, "does not keep"),
        ({"targets": [0, True, -1, 3]}, "whole number"),
        ({"targets": [0, 0.0, -1, 3]}, "whole number"),
        ({"targets": "0033"}, "whole number"),
        ({"targets": None}, "has no targets"),
        ({"targets": None, "scales": None}, "has no targets"),
        ({"scales": [1.0, 0.5]}, "2 scales"),
        ({"scales": [1.0, float("nan"), 1.0, 1.0]}, "finite"),
        ({"scales": [1.0, "0.5", 1.0, 1.0]}, "finite"),
        ({"scales": [0.5, 0.5, 1.0, 1.0]}, "its scale is 1"),
        ({"mean": "yes"}, "true or false"),
        ({"mean": 1}, "true or false"),
        ({"gains": {"bn.weight": [1.0]}}, "1 gains"),
        ({"gains": {"bn.weight": [1.0, -2.0, 1.0, 1.0]}}, "below 0"),
        ({"gains": {"bn.weight": None}}, "below 0"),
        ({"gains": {"bn.weight": [1.0, float("inf"), 1.0, 1.0]}}, "finite"),
        ({"mean": False}, "takes no mean"),
        ({"gains": [1.0, 2.0]}, "not a plan"),
        ({"factors": [1.0, float("nan")]}, "finite"),
        ({"factors": [True, False]}, "finite"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        read({**MERGE, **change})
