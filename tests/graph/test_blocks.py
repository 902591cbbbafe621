"""Blocks: where a graph can be cut so that one value alone leads from one part to the next."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from coreprune.graph import capture
from coreprune.graph.blocks import blocks, is_real
from coreprune.graph.execution import Execution
from graph.zoo import ZOO, randomise
from zoo_examples import example


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.c, self.d, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(x + self.d(torch.relu(self.c(x))))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Two branches that part at once and meet only at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d = (nn.Linear(n, 8) for n in (4, 8, 8, 8, 8))

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([self.b(self.a(x).relu()), self.d(self.c(x).relu())], 1)


class Masked(nn.Module):
    """A value that does not depend on any weight is read all the way, which is no reason not to cut."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, gate):
        gate = gate.sigmoid()
        for layer in self.layers:
            x = torch.relu(layer(x)) * gate
        return x


def found(model, *inputs):
    captured = capture(model, inputs)
    nodes = list(captured.graph.graph.nodes)
    parameters = [n for n in nodes if captured.sources.get(n.name, ("",))[0] == "parameter"]
    return captured, blocks(nodes, parameters, lambda n: n in parameters and n.meta["val"].dim() > 1)


def weights(captured, block):
    names = [captured.sources.get(n.name, ("", ""))[1] for n in block.reads]
    return [name.removesuffix(".weight") for name in names if name.endswith("weight")]


def test_a_residual_net_is_cut_behind_the_activations_of_its_sums():
    captured, parts = found(Residual(), torch.zeros(1, 3, 8, 8))
    assert [weights(captured, b) for b in parts] == [["stem", "a", "b"], ["c", "d"], ["head"]]
    assert [b.exits[0].meta["val"].shape for b in parts] == [(1, 8, 8, 8), (1, 8, 8, 8), (1, 5)]
    assert [str(b.exits[0].target).split(".")[1] for b in parts] == ["relu", "relu", "linear"]


def test_layers_of_a_plain_net_are_taken_together():
    sizes = (6, 32, 32, 32, 32, 32, 3)
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    captured, parts = found(nn.Sequential(*layers[:-1]), torch.zeros(1, 6))
    assert [weights(captured, b) for b in parts] == [["0", "2"], ["4", "6"], ["8", "10"]]


def test_a_block_of_an_inverted_bottleneck_ends_at_its_narrow_side():
    narrow = [
        nn.Conv2d(4, 24, 1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1),
    ]
    again = [nn.Conv2d(4, 24, 1), nn.ReLU(), nn.Conv2d(24, 4, 1), nn.Flatten(), nn.Linear(64, 2)]
    captured, parts = found(nn.Sequential(*narrow, *again), torch.zeros(1, 4, 4, 4))
    assert [weights(captured, b) for b in parts] == [["0", "2", "4"], ["5", "7"], ["9"]]


def test_branches_that_meet_at_the_end_are_one_block():
    captured, parts = found(Branches(), torch.zeros(1, 4))
    assert [weights(captured, b) for b in parts] == [["stem", "a", "b", "c", "d"]]
    assert parts[0].entry is None
    assert parts[0].exits[0].meta["val"].shape == (1, 16)


def test_what_no_weight_leads_to_is_read_from_outside():
    _, parts = found(Masked(), torch.zeros(2, 6), torch.zeros(2, 6))
    assert len(parts) == 2
    assert all(any(n.name == "sigmoid" for n in b.reads) for b in parts)


def test_several_outputs_are_the_exits_of_the_last_block():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x).relu()
            return self.b(x), self.c(x)

    _, parts = found(Two(), torch.zeros(1, 4))
    assert [e.meta["val"].shape[1] for e in parts[-1].exits] == [3, 2]


def test_without_a_change_there_is_no_block():
    nodes = list(capture(Residual(), torch.zeros(1, 3, 8, 8)).graph.graph.nodes)
    assert blocks(nodes, [], lambda n: False) == ()


def test_only_what_depends_on_the_change_is_in_a_block():
    captured = capture(Residual(), torch.zeros(1, 3, 8, 8))
    nodes = list(captured.graph.graph.nodes)
    changed = [n for n in nodes if captured.sources.get(n.name, ("", ""))[1].startswith("c.")]
    parts = blocks(
        nodes, changed, lambda n: is_real(n) and captured.sources.get(n.name, ("", ""))[1].endswith("weight")
    )
    assert weights(captured, parts[0])[0] == "c"
    assert parts[0].entry is None


@pytest.mark.parametrize("name", ["mlp", "conv1d-glu", "einsum-attention", "group-norm", "vgg", "densenet", "gpt2"])
def test_a_block_can_be_run_on_its_own(name):
    """Its entry and what it reads are all that it needs; together the blocks make the output."""
    if name not in ZOO:
        pytest.skip("this architecture needs transformers")
    model, inputs = randomise(ZOO[name].build()), example(ZOO[name].inputs(1))
    captured = capture(model, inputs)
    nodes = list(captured.graph.graph.nodes)
    tensors = {k: v.detach() for k, v in [*model.named_parameters(), *model.named_buffers()]}
    whole = Execution(captured, tensors, [(captured.args, captured.kwargs)])
    with torch.no_grad():
        for node in nodes[:-1]:
            whole.run(node)
    parameters = {n for n in nodes if captured.sources.get(n.name, ("",))[0] == "parameter"}
    parts = blocks(nodes, parameters, lambda n: n in parameters and n.meta["val"].dim() > 1)
    returned = {n for n in nodes[-1].all_input_nodes if is_real(n)}
    assert returned <= {*parts[-1].exits}
    for block in parts:
        alone = Execution(captured, tensors, [(captured.args, captured.kwargs)])
        needs = [*block.reads, *([block.entry] if block.entry is not None else [])]
        alone.values = {n: whole.values[n] for n in needs}
        with torch.no_grad():
            for node in block.nodes:
                alone.run(node)
        for node in block.exits:
            if is_real(node):
                assert torch.equal(alone.batch(node, 0), whole.batch(node, 0))
