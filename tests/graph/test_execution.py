"""The graph, run node by node: the same numbers as the model's forward, and no more memory than needed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from coreprune.graph import capture, normalise_example
from coreprune.graph.execution import Execution, last_uses, mutates, overwritten
from graph.zoo import ZOO, randomise

QUICK = ("mlp", "conv1d-glu", "group-norm", "rms-norm-by-hand", "shared-and-tied", "einsum-attention")
SLOW = ("densenet", "shufflenet-v2", "inception", "unet", "lstm", "timm-style-vit", "bert", "gpt2", "llama-gqa", "swin")
NAMES = [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW if n in ZOO)]


class InPlace(nn.Module):
    """Everything that networks overwrite: activations, sums, parts of tensors, the input itself, a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.register_buffer("offset", torch.ones(6))

    def forward(self, x):
        h = self.a(x).relu_()
        y = self.b(h)
        z = self.c(h)  # before h is overwritten
        h += y
        view = h[:, :2]
        h.mul_(2)  # a view sees it
        z[:, :3] = z[:, :3] * 2 + view.sum(1, keepdim=True)
        whole = z + h
        out = x.new_zeros(len(x), 6)
        out[:, :3] = whole[:, 3:]
        out[:, 3:] = torch.sigmoid(z[:, :3])
        x[:, 0] = out[:, 1]
        self.offset[1:] *= 2
        return self.d(out.sub_(x)) + self.offset


def blocks_of(inputs, size):
    """One model input in blocks of `size` samples."""
    args, kwargs = normalise_example(inputs["x"] if set(inputs) == {"x"} else inputs)
    n = len(next(iter(inputs.values())))
    return [pytree.tree_map(lambda t, i=i: t[i : i + size].clone(), (args, kwargs)) for i in range(0, n, size)]


def tensors_of(model):
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def forward(model, block):
    found = model(*pytree.tree_map(torch.clone, block[0]), **block[1])
    return [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


def run(model, blocks, size, free=True):
    """All blocks in lockstep; the outputs per block."""
    captured = capture(model, *pytree.tree_map(torch.clone, blocks[0]), batch=size)
    execution, nodes = Execution(captured, tensors_of(model), blocks), list(captured.graph.graph.nodes)
    uses = last_uses(nodes)
    for node in nodes:
        value = execution.run(node)
        for gone in uses[node] if free else ():
            execution.values.pop(gone)
    return execution, [[t for t in pytree.tree_leaves(v) if isinstance(t, torch.Tensor)] for v in value]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_the_models_forward(name):
    model = randomise(ZOO[name].build())
    blocks = blocks_of(ZOO[name].inputs(6), 2)
    execution, found = run(model, blocks, 2)
    assert len(found) == len(blocks) == execution.batches
    for got, block in zip(found, blocks, strict=True):
        wanted = forward(model, block)
        assert len(got) >= 1
        for a, b in zip(got, wanted, strict=False):
            assert torch.allclose(a, b, atol=1e-10)
    assert set(execution.values) <= {n for n in execution.captured.graph.graph.nodes if n.op == "output"}


def inplace() -> tuple[nn.Module, list]:
    model = randomise(InPlace(), seed=3)
    return model, blocks_of({"x": torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()}, 2)


@torch.no_grad()
def test_models_that_overwrite_are_followed():
    model, blocks = inplace()
    before = {n: t.clone() for n, t in tensors_of(model).items()}
    given = pytree.tree_map(torch.clone, blocks)
    _, found = run(model, blocks, 2)
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(model).items())
    for got, block in zip(found, given, strict=True):
        wanted = forward(model, block)[0]
        with torch.no_grad():
            model.offset.copy_(before["offset"])
        assert torch.allclose(got[-1], wanted, atol=1e-12)


@torch.no_grad()
def test_running_changes_neither_the_inputs_nor_the_tensors():
    model, blocks = inplace()
    given, before = pytree.tree_map(torch.clone, blocks), {n: t.clone() for n, t in tensors_of(model).items()}
    captured = capture(model, *pytree.tree_map(torch.clone, blocks[0]), batch=2)
    execution = Execution(captured, tensors_of(model), blocks)
    for node in captured.graph.graph.nodes:
        execution.run(node)
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(model).items())
    for a, b in zip(pytree.tree_leaves(blocks), pytree.tree_leaves(given), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_an_operation_in_place_leaves_the_value_of_another_execution_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    block = ((torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double(),), {})
    captured = capture(model, *block, batch=4)
    one, two = (Execution(captured, tensors_of(model), [block]) for _ in range(2))
    for node in captured.graph.graph.nodes:
        one.run(node)
        two.values[node] = one.values[node]  # as the repair does with what has not changed
        if mutates(node):
            (read,) = node.all_input_nodes
            before = one.values[read][0].clone()
            two.run(node)
            assert bool((before < 0).any())
            assert torch.equal(one.values[read][0], before)


def test_only_memory_that_is_written_through_views_counts_as_overwritten():
    plain = capture(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(True), nn.Linear(3, 2)), torch.zeros(2, 3), batch=2
    ).graph.graph.nodes
    assert any(map(mutates, plain))
    assert overwritten(plain) == set()
    model, blocks = inplace()
    captured = capture(model, *blocks[0], batch=2)
    found = {n.name for n in overwritten(captured.graph.graph.nodes)}
    assert {n.name for n in captured.graph.graph.nodes if captured.sources.get(n.name, ("",))[0] == "input"} <= found
    assert {n.name for n in captured.graph.graph.nodes if "new_zeros" in n.name} <= found


@torch.no_grad()
def test_what_is_released_is_gone_and_nothing_is_released_early():
    """Every value is read for the last time where `last_uses` says, and its memory is then free."""
    model = randomise(ZOO["mlp"].build())
    blocks = blocks_of(ZOO["mlp"].inputs(4), 2)
    captured = capture(model, *blocks[0], batch=2)
    execution, nodes = Execution(captured, tensors_of(model), blocks), list(captured.graph.graph.nodes)
    uses = last_uses(nodes)
    assert sorted(n.name for gone in uses.values() for n in gone) == sorted(n.name for n in nodes if n.op != "output")
    alive: dict[str, weakref.ref] = {}
    for node in nodes:
        value = execution.run(node)
        if node.op == "call_function":
            alive[node.name] = weakref.ref(value[0])
        del value
        for gone in uses[node]:
            assert not {u for u in gone.users if nodes.index(u) > nodes.index(node)}
            execution.values.pop(gone)
    gc.collect()
    last = next(n.name for n in reversed(nodes) if n.op == "call_function")
    assert {name for name, ref in alive.items() if ref() is not None} == {last}
