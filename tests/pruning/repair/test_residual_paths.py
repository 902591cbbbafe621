"""Where an output goes: residual sums, the affine steps before them, and the order that they ask for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune import Budget, Repair, prune
from coreprune.graph import capture
from coreprune.graph.execution import Execution
from coreprune.graph.ops import op_name
from coreprune.pruning.layer.linear_maps import operators
from coreprune.pruning.repair.residual_paths import affine, path_of, schedule
from graph.zoo import randomise


class Block(nn.Module):
    """y = other(x) + scale · dropout(norm(conv(x))): every affine step on the way to a sum."""

    def __init__(self, inplace=False, scale=True, norm=True, bias=False):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(4, 1, 1)) if scale else None
        self.inplace = inplace

    def forward(self, x):
        x = torch.relu(x)
        y, z = self.drop(self.norm(self.conv(x))), self.other(x)
        y = y if self.scale is None else self.scale * y
        if self.inplace:
            y += z
            return y.relu_()
        return torch.relu(z + y)


class AtWork(nn.Module):
    """Dropout in evaluation as well."""

    def forward(self, x):
        return nn.functional.dropout(x, training=True)


class Dropped(Block):
    """One kind of dropout, and a scale in place, before the sum."""

    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.drop(self.conv(x)).mul_(self.scale) + self.other(x)


class TwoReaders(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.other(x) + y + y.mean((2, 3), keepdim=True)


class Dependent(Block):
    """The other operand is made from the same output (a gate): matching it would chase itself."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return (y + self.other(y)) if self.inplace else y + torch.sigmoid(y.mean((2, 3), keepdim=True)) * y


class Broadcast(Block):
    def forward(self, x):
        return self.conv(x) + self.other(x).mean((2, 3), keepdim=True)


class Weighted(Block):
    def forward(self, x):
        return torch.add(self.conv(x), self.other(x), alpha=2)


class SharedNorm(Block):
    def forward(self, x):
        return self.norm(self.conv(x)) - torch.relu(self.norm(self.other(x)))


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def traced(model, x=X):
    captured = capture(model, x.clone(), batch=len(x))
    return captured, {o.weight: (o, path_of(o, captured)) for o in operators(captured).values()}


@pytest.mark.parametrize(
    ("drop", "found"),
    [
        (nn.Dropout(), True),
        (nn.Dropout2d(), True),
        (nn.AlphaDropout(), True),
        (nn.FeatureAlphaDropout(), True),
        (AtWork(), False),
    ],
)
def test_every_dropout_is_passed_unless_it_drops(drop, found):
    _, paths = traced(randomise(Dropped(drop)))
    assert (paths["conv.weight"][1].join is not None) == found


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_sum_is_found_through_norm_dropout_and_scale(inplace, scale, norm):
    _, paths = traced(randomise(Block(inplace, scale, norm)))
    operator, path = paths["conv.weight"]
    assert path.join is not None
    assert op_name(path.join).startswith("add")
    assert path.other is paths["other.weight"][0].node
    assert path.gated
    assert (path.norm is not None) == norm
    assert path.steps[-1:] != (operator.node,)
    assert sum(op_name(s) == "mul" for s in path.steps) == scale
    other = paths["other.weight"][1]
    assert other.join is path.join
    assert other.steps == ()


class ByRows(nn.Module):
    """The linear layers of GPT-2: rows of all positions, whose axes come back before the sum."""

    def __init__(self, back):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Parameter(torch.randn(12, 6))
        self.bias, self.back = nn.Parameter(torch.randn(6)), back

    def forward(self, x):
        y = torch.addmm(self.bias, torch.relu(self.up(x)).flatten(0, 1), self.down)
        return self.back(y, x)


@pytest.mark.parametrize(
    ("back", "found"),
    [
        (lambda y, x: x + y.view(x.shape), True),
        (lambda y, x: nn.functional.dropout(y.reshape(x.shape), 0.1, False) + x, True),
        (lambda y, x: x + y.unflatten(0, x.shape[:2]), True),
        (lambda y, x: x + y.T.reshape(x.shape), False),
        (lambda y, x: x + y.view(x.shape[1], x.shape[0], 6).transpose(0, 1), False),
        (lambda y, x: x.flatten(1) + y.view(len(x), -1), False),
    ],
)
def test_rows_that_get_their_axes_back_lead_to_the_sum(back, found, gen):
    model = randomise(ByRows(back))
    x = torch.randn(2, 5, 6, generator=gen, dtype=torch.float64)
    captured, paths = traced(model, x)
    operator, path = paths["down"]
    assert (path.join is not None) == found
    if not found:
        return
    run = Execution(captured, dict(model.named_parameters()), [((x,), {})])
    for node in captured.graph.graph.nodes:
        run.run(node)
    own, total, rest = (operator.outputs(run.batch(n, 0)) for n in (operator.node, path.join, path.other))
    torch.testing.assert_close(own, total - rest)


class Factor(nn.Module):
    """A norm and a scale, along an axis that sizes do not give away: there are as many channels as rows and columns."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.line = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)
        self.norm, self.scale, self.what = nn.BatchNorm2d(6), nn.Parameter(torch.rand(6)), what

    def forward(self, x):
        return torch.relu(x + self.what(self, x))


@pytest.mark.parametrize(
    ("what", "layer", "found"),
    [
        (lambda m, x: m.norm(m.conv(x)) * m.scale[:, None, None], "conv", True),
        (lambda m, x: m.norm(m.conv(x)).mul(m.scale.reshape(1, -1, 1, 1)), "conv", True),
        (lambda m, x: m.conv(x) * m.scale, "conv", False),
        (lambda m, x: m.conv(x) * m.scale.flip(0)[:, None, None], "conv", False),
        (lambda m, x: m.line(x) * m.scale, "line", True),
        (lambda m, x: m.line(x) * m.scale[:, None, None], "line", False),
        (lambda m, x: m.norm(m.line(x)), "line", False),
    ],
)
def test_norms_and_scales_count_along_the_channels_alone(what, layer, found, gen):
    model = randomise(Factor(what)).eval()
    x = torch.randn(2, 6, 6, 6, generator=gen, dtype=torch.float64)
    captured, paths = traced(model, x)
    operator, path = paths[f"{layer}.weight"]
    assert (path.join is not None) == found
    assert (path.norm is not None) == (found and any(op_name(s) == "batch_norm" for s in path.steps))
    if not found:
        return
    run = Execution(captured, {**dict(model.named_parameters()), **dict(model.named_buffers())}, [((x,), {})])
    for node in captured.graph.graph.nodes:
        run.run(node)
    scale, shift = affine(path, 6, lambda n: run.batch(n, 0))
    own, total, rest = (operator.outputs(run.batch(n, 0)) for n in (operator.node, path.join, path.other))
    torch.testing.assert_close(scale * own + shift, total - rest)


class NormOfSteps(nn.Module):
    """A batch norm of time steps, which are more than the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(12, 24), nn.Linear(24, 8), nn.BatchNorm1d(9), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(torch.relu(self.norm(self.b(torch.relu(self.a(x))))))


def test_a_norm_of_time_steps_does_not_end_the_repair(gen):
    model, x = randomise(NormOfSteps()).eval(), torch.randn(64, 9, 12, generator=gen, dtype=torch.float64)
    result = prune(model, x[:1], Budget(macs=0.7), queries=x, repair=Repair(descent=False), progress=False)
    errors = {one.name: one.error for one in result.report.compared}
    assert errors["the repaired cut"] < errors["the cut without repair"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_affine_is_what_the_steps_compute(bias, scale):
    model = randomise(Block(scale=scale, bias=bias))
    captured, paths = traced(model)
    run = Execution(captured, {n: t.detach() for n, t in model.state_dict().items()}, [((X,), {})])
    for node in captured.graph.graph.nodes:
        run.run(node)
    operator, path = paths["conv.weight"]
    a, c = (t.reshape(1, -1, 1, 1) for t in affine(path, 4, lambda n: run.batch(n, 0)))
    assert path.join is not None
    found = a * run.batch(operator.node, 0) + c
    assert torch.allclose(found, run.batch(path.steps[-1], 0), atol=1e-12)
    assert torch.allclose(found + run.batch(path.other, 0), run.batch(path.join, 0), atol=1e-12)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (TwoReaders, "two readers"),
        (Dependent, "the other operand depends on the output"),
        (lambda: Dependent(inplace=True), "the norm's output has two readers"),
        (Broadcast, "the other operand is broadcast"),
        (Weighted, "alpha is not 1"),
    ],
)
def test_no_sum_is_claimed_that_cannot_be_matched(build, why):
    _, paths = traced(randomise(build()))
    assert paths["conv.weight"][1].join is None, why


def test_a_norm_that_two_layers_share_is_not_theirs_to_move():
    _, paths = traced(randomise(SharedNorm()))
    assert paths["conv.weight"][1].norm is None
    assert len(paths["conv.weight"][1].steps) == 1


class Bottleneck(nn.Module):
    """As torchvision's: the shortcut is computed after the main branch."""

    def __init__(self, inplace=True):
        super().__init__()
        self.stem, self.conv1, self.conv3 = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bn, self.down = nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.relu(self.stem(x))
        out = self.bn(self.conv3(self.relu(self.conv1(x))))
        out += self.down(x)
        return self.head(self.relu(out))


class Written(Bottleneck):
    def forward(self, x):
        out = super().forward(x)
        out[:, 0].add_(out[:, 1])  # no plain write, which would be traced as a concatenation
        return out


@pytest.mark.parametrize("build", [Bottleneck, lambda: Bottleneck(False), Block, lambda: Block(True), Written])
def test_the_schedule_is_an_order_of_execution_with_the_other_operand_first(build):
    captured, paths = traced(randomise(build()))
    nodes = list(captured.graph.graph.nodes)
    order, kept = schedule(nodes, {o.node: p for o, p in paths.values()})
    place = {n: i for i, n in enumerate(order)}
    assert sorted(map(str, order)) == sorted(map(str, nodes))
    assert all(place[read] < place[n] for n in nodes for read in n.all_input_nodes)
    assert set(kept) == {o.node for o, _ in paths.values()}
    joins = [(n, p) for n, p in kept.items() if p.join is not None]
    assert len({p.join for _, p in joins}) == len(joins)
    assert all(place[p.other] < place[n] for n, p in joins)


def test_the_shortcut_comes_before_the_layer_that_is_matched_to_it():
    captured, paths = traced(randomise(Bottleneck()))
    nodes = list(captured.graph.graph.nodes)
    last, down = paths["conv3.weight"], paths["down.0.weight"]
    assert nodes.index(last[0].node) < nodes.index(down[0].node)
    order, kept = schedule(nodes, {last[0].node: last[1], down[0].node: down[1]})
    assert kept[last[0].node].join is not None
    assert kept[down[0].node].join is None
    assert order.index(down[0].node) < order.index(last[0].node)


def test_what_is_written_through_views_keeps_the_order_of_the_graph():
    captured, paths = traced(randomise(Written()))
    nodes = list(captured.graph.graph.nodes)
    order, kept = schedule(nodes, {o.node: p for o, p in paths.values()})
    assert order == nodes
    assert kept[paths["conv3.weight"][0].node].join is None
    assert kept[paths["down.0.weight"][0].node].join is not None


def test_running_in_the_scheduled_order_gives_the_models_output():
    model = randomise(Bottleneck())
    captured, paths = traced(model)
    run = Execution(captured, {n: t.detach() for n, t in model.state_dict().items()}, [((X,), {})])
    order, _ = schedule(list(captured.graph.graph.nodes), {o.node: p for o, p in paths.values()})
    for node in order:
        value = run.run(node)
    assert torch.allclose(value[0][0], model(X), atol=1e-12)
