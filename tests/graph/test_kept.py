"""Which positions of an activation stay: what the small model computes is what the masked original has there."""

from __future__ import annotations

import pytest
import torch

from coreprune.graph import Traced, capture, find_groups, probe, remove
from coreprune.graph.blocks import is_real
from coreprune.graph.execution import Execution
from coreprune.graph.kept import positions
from coreprune.graph.verify import zeroed
from graph.zoo import ZOO, randomise
from zoo_examples import example

EXACT = ("mlp", "conv3d", "vgg", "densenet", "resnext", "shufflenet-v2", "conv1d-glu", "gpt2", "llama-gqa")


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_the_kept_positions_hold_what_the_small_model_computes(name):
    if name not in ZOO:
        pytest.skip("this architecture needs transformers")
    model, inputs = randomise(ZOO[name].build()), example(ZOO[name].inputs(1))
    captured = capture(model, inputs)
    traced = probe(Traced(model, captured, find_groups(captured)))
    generator, keep = torch.Generator().manual_seed(0), {}
    for g in traced.free.values():
        if "norm-statistics" in g.flags or "functional" in g.flags:
            continue
        units = torch.randperm(len(g.units()), generator=generator)[: max(1, len(g.units()) // 2)]
        kept = g.units()[units].reshape(-1).sort().values
        if g.legal(kept) is None:
            keep[g.name] = kept
    removed = remove(traced, keep)
    assert removed.kept
    small = capture(removed.model, inputs)
    cut = [(g, removed.kept[g.name]) for g in traced.groups if g.name in removed.kept]
    tensors = {**traced.tensors, **zeroed(model, cut)}
    mine = {k: v.detach() for k, v in [*removed.model.named_parameters(), *removed.model.named_buffers()]}
    runs = [Execution(c, t, [(c.args, c.kwargs)]) for c, t in ((captured, tensors), (small, mine))]
    pairs = list(zip(captured.graph.graph.nodes, small.graph.graph.nodes, strict=True))
    known = positions(captured, [n for n, _ in pairs], removed.masks)
    shrunk = 0
    for node, twin in pairs[:-1]:
        value, found = runs[0].run(node)[0], runs[1].run(twin)[0]
        box = known[node]
        if not is_real(node) or box is None or not node.all_input_nodes:
            continue
        for axis, rows in box:
            value, shrunk = value.index_select(axis, rows), shrunk + 1
        assert value.shape == found.shape, node
        assert torch.allclose(value, found, atol=1e-9), node
    assert shrunk
