"""prune() on every architecture of the zoo: same signature, smaller model, given model untouched."""

from __future__ import annotations

import collections

import pytest
import torch

from coreprune import Budget, Norm, Plan, list_groups, prune
from coreprune.graph import capture, find_groups, normalise_example
from coreprune.selectors import Folding
from graph.zoo import ZOO, randomise
from small_networks import bits
from sweeps import in_turn, thinned
from zoo_examples import call, example

# Architectures whose consumers are dense, grouped or flattened, of several kinds; sampling re-weights all of them.
REWEIGHTED = (
    "vgg",
    "densenet",
    "resnext",
    "hf-resnet",
    "mobilenet-v2",
    "bert",
    "llama-gqa",
    "unet",
    "mixtral",
    "t5",
    "shufflenet-v2",
    "efficientnet",
    "swin",
    "clip",
    "detr",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(ZOO, 3))
def test_half_of_every_free_group_leaves(name):
    entry = ZOO[name]
    model = entry.build().double().eval()
    before = bits(model)
    result = prune(model, example(entry.inputs(1)), Budget(keep=0.5), "magnitude", queries=None)
    assert bits(model) == before
    free = [g for g in result.report.groups if g.locked_because is None]
    assert free or entry.free == 0
    assert all(g.kept < g.channels for g in free)
    assert all(g.locked_because for g in result.report.groups if g not in free)
    assert result.report.parameters[1] == sum(p.numel() for p in result.model.parameters())
    assert result.report.parameters[1] < result.report.parameters[0]
    for batch in (1, 3):
        wanted, found = (call(m, entry.inputs(batch)) for m in (model, result.model))
        assert found.shape == wanted.shape
        assert bool(torch.isfinite(found).all())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sign_split"), in_turn(REWEIGHTED, [False, True], step=2))
def test_sampled_networks_equal_the_original_with_scaled_consumers(name, sign_split):
    """The oracle scales the consumers' weights of the original, by zero for channels that left."""
    entry = ZOO[name]
    model = entry.build().double().eval()
    result = prune(model, example(entry.inputs(1)), Budget(keep=0.6), Norm(sign_split=sign_split), queries=None)
    assert any(p.factors for p in result.plan.groups.values())

    reference = entry.build().double().eval()
    reference.load_state_dict(model.state_dict())
    captured = capture(reference, *normalise_example(example(entry.inputs(1))))
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group in find_groups(captured):
            plan = result.plan.groups.get(group.name)
            if plan is None:
                continue
            factors = torch.zeros(2, group.size, dtype=torch.float64)
            factors[0, list(plan.kept)] = torch.tensor(plan.factors or [1.0] * len(plan.kept), dtype=torch.float64)
            factors[1] = factors[0]
            if plan.negative_factors:
                factors[1, list(plan.kept)] = torch.tensor(plan.negative_factors, dtype=torch.float64)
            for piece in {(s.param, s.dim): s for c in group.consumers for s in c.slices}.values():
                weight = parameters[piece.param]
                rows = piece.index if piece.index.ndim == 2 else piece.index[None]
                for block, index in zip(weight.chunk(len(rows), dim=0), rows, strict=True):
                    for position, channel in enumerate(index.tolist()):
                        if channel >= 0:
                            part = block.select(piece.dim, position)
                            part.copy_(part * torch.where(part >= 0, factors[0, channel], factors[1, channel]))
    wanted, found = (call(m, entry.inputs(3)) for m in (reference, result.model))
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-8)


def where(piece):
    """The positions of every channel on an axis, in order."""
    found = collections.defaultdict(list)
    for position, channel in enumerate(piece.index.tolist()):
        found[channel].append(position)
    return found


def carried_out(model, groups, plans):
    """The original with a plan's merges in it, one position at a time: columns summed, rows averaged, the rest zero."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in groups:
        plan = plans.get(group.name)
        if plan is None:
            continue
        targets = plan.targets or [c if c in plan.kept else -1 for c in range(group.size)]

        for piece in {(s.param, s.dim): s for c in group.consumers for s in c.slices}.values():
            if piece.index.ndim == 2:  # blocks: nothing is merged there
                rows = tensors[piece.param].chunk(len(piece.index), dim=0)
                for block, index in zip(rows, piece.index.tolist(), strict=True):
                    for position, channel in enumerate(index):
                        if channel >= 0 and channel not in plan.kept:
                            block.select(piece.dim, position).zero_()
                continue
            part, at = tensors[piece.param].movedim(piece.dim, 0), where(piece)
            for i, target in enumerate(targets):
                if target == i:
                    continue
                for mine, its in zip(at[i], at[target if target >= 0 else i], strict=True):
                    if target >= 0:
                        part[its] += part[mine] * (plan.scales[i] if plan.scales else 1.0)
                    part[mine] = 0
        for piece in (*group.producers, *group.others) if plan.mean else ():
            part, at = tensors[piece.param].movedim(piece.dim, 0), where(piece)
            gains = (plan.gains or {}).get(piece.param, [1.0] * group.size)
            for k in plan.kept:
                members = [i for i, target in enumerate(targets) if target == k]
                for nth, position in enumerate(at[k]):
                    part[position] = sum(gains[i] * part[at[i][nth]] for i in members) / len(members)


# An MLP, residual, depthwise, concatenated, grouped and flattened convolutions, gates, heads, experts.
MERGED = ("mlp", "resnet-bottleneck", "mobilenet-v2", "densenet", "inception", "unet", "resnext", "vgg")
MERGED += ("bert", "llama-gqa", "swin", "mixtral", "shufflenet-v2", "conv1d-glu", "t5")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), in_turn(MERGED, ["merging", "folding", Folding(repair=False)], step=2), ids=str
)
def test_merged_networks_equal_the_original_with_the_plan_carried_out(name, method):
    entry = ZOO[name]
    model = randomise(entry.build())
    before = bits(model)
    result = prune(model, example(entry.inputs(1)), Budget(keep=0.6), method, queries=None)
    assert bits(model) == before
    assert method == "merging" or any(p.mean for p in result.plan.groups.values()) or name == "mixtral"
    assert Plan.from_json(result.plan.to_json()) == result.plan
    captured = capture(model, *normalise_example(example(entry.inputs(1))))
    reference = randomise(entry.build())
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        carried_out(reference, find_groups(captured), result.plan.groups)
    wanted, found = (call(m, entry.inputs(3)) for m in (reference, result.model))
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"),
    in_turn(
        ["l1", "l2", "fpgm", "bn-scale", "random"], ["mlp", "resnet-bottleneck", "mobilenet-v1", "inception", "bert"]
    ),
)
def test_rankings_remove_channels_and_change_nothing_else(name, method):
    entry = ZOO[name]
    model = randomise(entry.build())
    result = prune(model, example(entry.inputs(1)), Budget(keep=0.5), method, queries=None)
    captured = capture(model, *normalise_example(example(entry.inputs(1))))
    with torch.no_grad():
        carried_out(model, find_groups(captured), result.plan.groups)
    wanted, found = (call(m, entry.inputs(3)) for m in (model, result.model))
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-8)


def test_inspect_names_every_group_and_changes_nothing():
    entry = ZOO["llama-gqa"]
    model = entry.build()
    before = bits(model)
    found = list_groups(model, entry.inputs(1))
    assert bits(model) == before
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < found.free_macs_share < 1
    assert any(g.locked_because for g in found.groups)
    heads = [g for g in found.groups if "heads" in g.flags]
    assert heads
    assert all(g.unit > 1 for g in heads)
    assert "locked" in str(found)


def test_positional_tuple_and_keyword_examples_give_the_same_plan():
    entry = ZOO["bert"]
    model = entry.build()
    inputs = entry.inputs(1)
    assert next(iter(inputs)) == "input_ids"
    one = prune(model, inputs, method="magnitude", queries=None).plan
    two = prune(model, (inputs["input_ids"],), method="magnitude", queries=None).plan
    assert one.groups == two.groups
