"""Every architecture of the zoo: half of every free group leaves, and nothing but zeros is missing."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from coreprune.graph import CostModel, Traced, capture, find_groups, remove
from graph.oracle import assert_same, masked_activations, measured_macs, outputs, random_halves, zeroed_original
from graph.zoo import ZOO, Entry, gen, randomise


def traced(entry: Entry):
    model = randomise(entry.build())
    inputs = entry.inputs(2)
    captured = capture(model, inputs["x"]) if set(inputs) == {"x"} else capture(model, kwargs=inputs)
    return model, captured, find_groups(captured)


# More than about two seconds each.
SLOW = (
    "cifar-resnet56-a inception bert llama-gqa qwen3 mixtral t5 whisper clip swin mobilenet-v1 mobilenet-v2 "
    "efficientnet segformer detr"
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW.split() else ()) for n in ZOO])
def test_halves_of_every_free_group_leave(name: str) -> None:
    entry = ZOO[name]
    model, captured, groups = traced(entry)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    keep = random_halves(groups, gen(1))
    result = remove(Traced(model, captured, groups), keep)
    small = result.model
    assert len(result.kept) >= entry.free, result.locked
    assert not any("unusual arguments" in (g.locked_because or "") for g in groups)
    assert set(result.kept) | set(result.locked) == set(keep)

    # equal to the original with zeros, at two batch sizes, one of them not the traced one
    zeros = zeroed_original(model, groups, result.kept)
    with torch.no_grad():
        for batch in (1, 3):
            assert_same(outputs(small, entry.inputs(batch)), outputs(zeros, entry.inputs(batch)))

    # the same zeros at the activation points, where every reader is a layer of its own
    if all(c.hookable for g in groups if g.name in result.kept for c in g.consumers):
        with torch.no_grad(), masked_activations(model, groups, result.kept):
            assert_same(outputs(model, entry.inputs(3)), outputs(zeros, entry.inputs(3)))
    else:
        assert name in ("torch-encoder", "mixtral")

    # the cost model is exact, before and after
    costs = CostModel(captured, groups)
    widths = {n: len(k) for n, k in result.kept.items()}
    assert costs().params == sum(p.numel() for p in model.parameters())
    assert costs(widths).params == sum(p.numel() for p in small.parameters())
    assert costs(widths).bytes == sum(t.numel() * t.element_size() for t in [*small.parameters(), *small.buffers()])
    assert costs().macs == measured_macs(model, captured)
    assert costs(widths).macs == measured_macs(small, captured)

    # a state dict reloads into another pruned copy
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    other = remove(Traced(randomise(copy.deepcopy(model), seed=5), captured, groups), keep).model
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(outputs(other, entry.inputs(1)), outputs(small, entry.inputs(1)), 0)

    # gradients flow to every parameter that is used
    sum(x.square().sum() for x in outputs(small, entry.inputs(3))).backward()
    assert all(p.grad.shape == p.shape for p in small.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in small.parameters()) >= len(list(small.parameters())) // 2

    # the original was not touched
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 40
