"""Linear maps in a graph: X Wᵀ + b is what the module computes, whatever its kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coreprune.graph import Captured, capture
from coreprune.graph.execution import Execution
from coreprune.pruning.layer.linear_maps import Operator, even_rows, operators


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(build) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return build().double().eval()


class AddMM(nn.Module):
    """As transformers' Conv1D: the weight is stored the other way round."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], 7)


class MM(AddMM):
    def forward(self, x):
        return torch.mm(x, self.weight) + 0 * self.bias.sum()


CASES = {
    "linear": (lambda: nn.Linear(5, 7), (4, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 7, bias=False), (4, 3, 5)),
    "addmm": (AddMM, (4, 3, 5)),
    "mm": (MM, (4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 8, 7)),
    "conv2d uneven": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3), bias=False),
        (3, 4, 8, 9),
    ),
    "conv2d grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2, stride=2), (3, 6, 8, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 5, 5)),
    "depthwise multiplier": (lambda: nn.Conv2d(4, 12, 3, dilation=2, groups=4), (3, 4, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)), (3, 4, 8, 7)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 8, 7)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), padding=(0, 1, 2), stride=(1, 2, 1), groups=2), (2, 2, 4, 5, 3)),
}


class Setup:
    """One module, traced and run."""

    def __init__(self, name: str):
        build, shape = CASES[name]
        self.module = made(build)
        x = torch.randn(shape, generator=gen(), dtype=torch.float64)
        self.captured: Captured = capture(self.module, x, batch=shape[0])
        (self.operator,) = operators(self.captured).values()
        self.run = Execution(self.captured, dict(self.module.state_dict()), [((x,), {})])
        for node in self.captured.graph.graph.nodes:
            self.run.run(node)
        self.x, self.y = self.run.batch(self.operator.source, 0), self.run.batch(self.operator.node, 0)

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach()

    def bias(self) -> Tensor:
        o: Operator = self.operator
        if o.bias is None:
            return torch.zeros(1).double()
        return self.module.bias.detach().reshape(o.groups, 1, -1)


@pytest.mark.parametrize("name", CASES)
def test_features_times_the_matrix_are_the_outputs(name):
    s = Setup(name)
    o, matrix = s.operator, s.operator.matrix(s.weight)
    x, y = o.features(s.x), o.outputs(s.y)
    assert x.shape[0] == o.groups == matrix.shape[0]
    assert x.shape[1] == y.shape[1] == o.count(s.y)
    assert torch.allclose(x @ matrix.mT + s.bias(), y, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_goes_back_to_the_weight(name):
    s = Setup(name)
    matrix = s.operator.matrix(s.weight)
    back = s.operator.from_matrix(matrix, s.weight.float())
    assert back.dtype == torch.float32
    assert torch.equal(back, s.weight.float())


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_whole(name):
    s = Setup(name)
    rows = torch.tensor([0, 3, 2, s.operator.count(s.y) - 1])
    assert torch.equal(s.operator.features(s.x, rows), s.operator.features(s.x)[:, rows])
    assert torch.equal(s.operator.outputs(s.y, rows), s.operator.outputs(s.y)[:, rows])


@pytest.mark.parametrize("name", CASES)
def test_alive_channels_are_those_of_every_group(name):
    s = Setup(name)
    o = s.operator
    width = s.x.shape[o.channel_axis] // o.groups
    left = max(width - 1, 1)
    alive = torch.stack([torch.randperm(width, generator=gen(i))[:left].sort().values for i in range(o.groups)])
    whole = o.features(s.x).reshape(o.groups, -1, width, o.taps)
    found = o.features(s.x, None, alive).reshape(o.groups, -1, left, o.taps)
    for g in range(o.groups):
        assert torch.equal(found[g], whole[g][:, alive[g]])


def test_the_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    CASES["Conv1D"] = (lambda: Conv1D(7, 5), (4, 3, 5))
    try:
        test_features_times_the_matrix_are_the_outputs("Conv1D")
        s = Setup("Conv1D")
        assert (s.operator.out_dim, s.operator.in_dim) == (1, 0)
    finally:
        del CASES["Conv1D"]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.bias = self.left.bias
        self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(x)))
        x = self.left(x) + self.right(x)
        return self.head(torch.relu(self.embed(self.once(x))))


def test_what_others_read_too_is_left_out():
    """A refit of one reader would change the others: used twice, tied weights, and tied biases."""
    captured = capture(made(Shared), torch.zeros(2, 4).double(), batch=2)
    assert set(operators(captured)) == {"once.weight"}


class Even(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scaled = nn.Conv2d(2, 3, 2, padding="same"), nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.linear(self.conv(x), 2 * self.scaled.weight)


def test_what_is_not_a_plain_map_of_a_parameter_is_left_out():
    """An even kernel with padding "same" has more zeros on one side; a weight that is computed cannot be written."""
    captured = capture(made(Even), torch.zeros(2, 2, 4, 4).double(), batch=2)
    assert operators(captured) == {}


@pytest.mark.parametrize(("available", "most"), [(101, 11), (32768, 2049), (16384, 2049), (100, 99), (7, 2)])
def test_even_rows_are_one_of_every_stretch_and_only_where_there_are_too_many(available, most):
    assert even_rows(available, available, torch.device("cpu")) is None
    rows = even_rows(available, most, torch.device("cpu"))
    assert rows is not None
    assert rows.dtype == torch.int64
    assert (rows.diff() > 0).all()
    assert 0 <= rows[0] < available / most
    assert rows[-1] < available
    assert 0.6 * most <= len(rows) <= most
    assert rows.diff().max() <= 2 * available / most


def test_even_rows_see_every_column_of_an_image_alike():
    """A fixed step near a divisor of the width would visit a few columns only, and the borders too often or never."""
    rows = even_rows(32 * 32 * 32, 2049, torch.device("cpu"))
    assert rows is not None
    columns = torch.bincount(rows % 32, minlength=32)
    assert columns.min() >= 0.9 * len(rows) / 32
    assert columns.max() <= 1.1 * len(rows) / 32


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_do_not_depend_on_the_layout_in_memory(padding, channels):
    """Convolutions that run in channels_last hand on activations that are laid out that way."""
    conv = nn.Conv2d(channels, 2, 3, padding=padding).double()
    captured = capture(conv, torch.zeros(2, channels, 5, 6).double(), batch=2)
    operator = operators(captured)["weight"]
    x = torch.randn(2, channels, 5, 6, generator=gen(), dtype=torch.float64)
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(operator.features(other), operator.features(x))
