"""The table of operations against torch itself: every claim of every row, on random inputs."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from coreprune.errors import InputError
from coreprune.graph import capture, find_groups
from coreprune.graph.ops import ALIASES, OPERATIONS, TABLE, Kind, Operation, canonical, of_kind, op_name, operation
from coreprune.graph.rules.registry import RULES, rule

# Names that not every torch has; they are of use where they exist.
NEWER = {"_grouped_mm", "_scaled_grouped_mm", "_weight_int4pack_mm_for_cpu", "_cudnn_attention_forward", "rms_norm"}
OTHERS = ("operator", "higher_order", "transformers", "torchvision", "quantized", "mkldnn", "mkl")  # namespaces
SIZES = {0: (2, 4, 6, 6), 1: (2, 4, 6), 2: (2, 4, 6, 6), 3: (2, 4, 4, 4, 4)}  # by spatial axes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OTHER = normal(2, 4, 6, 6, seed=1)
FLAT = torch.empty(4, 72)

# How an operation is called on x; the rest is called on x alone.
ARGUMENTS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "add": lambda x: (x, x.flip(0)),
    "sub": lambda x: (x, x.flip(0)),
    "mul": lambda x: (x, 3.0),
    "div": lambda x: (x, 3.0),
    "prelu": lambda x: (x, torch.full((4,), 0.3).to(x)),
    **dict.fromkeys(
        ["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"], lambda x: (x, 0.5, False)
    ),
    "to": lambda x: (x, torch.float64),
    "type_as": lambda x: (x, OTHER),
    **dict.fromkeys(["view", "reshape", "_unsafe_view"], lambda x: (x, [4, 72])),
    **dict.fromkeys(["view_as", "reshape_as"], lambda x: (x, FLAT)),
    "flatten": lambda x: (x, 1),
    "unflatten": lambda x: (x, 1, [2, 2]),
    "unsqueeze": lambda x: (x, 1),
    "permute": lambda x: (x, [0, 2, 3, 1]),
    "flip": lambda x: (x, [1]),
    "roll": lambda x: (x, [1], [1]),
    "rot90": lambda x: (x, 1, [2, 3]),
    "pixel_unshuffle": lambda x: (x, 2),
    "pixel_shuffle": lambda x: (x, 2),
    "channel_shuffle": lambda x: (x, 2),
    "native_channel_shuffle": lambda x: (x, 2),
    "transpose": lambda x: (x, 1, 2),
    "movedim": lambda x: (x, 1, 3),
    "slice": lambda x: (x, 1, 0, 2),
    "select": lambda x: (x, 1, 0),
    "narrow": lambda x: (x, 1, 1, 2),
    "expand": lambda x: (x, [3, *x.shape]),
    "unbind": lambda x: (x, 1),
    "split_with_sizes": lambda x: (x, [1, 3], 1),
    **dict.fromkeys(["split", "tensor_split", "chunk", "unsafe_split", "unsafe_chunk"], lambda x: (x, 2, 1)),
    **dict.fromkeys(["repeat", "tile"], lambda x: (x, [1, 2, 1, 1])),
    "repeat_interleave": lambda x: (x, 2, 1),
    "diagonal": lambda x: (x, 0, 2, 3),
    "unfold": lambda x: (x, 2, 2, 1),
    "pad": lambda x: (x, [1, 1]),
    "constant_pad_nd": lambda x: (x, [1, 1]),
    **dict.fromkeys(["cat", "stack"], lambda x: ([x, x.flip(0)], 1)),
    "operator::getitem": lambda x: ([x], 0),
    "index_select": lambda x: (x, 1, torch.tensor([0, 2])),
    **dict.fromkeys(["sum", "nansum", "mean", "amax", "amin"], lambda x: (x, [1])),
    **dict.fromkeys(["max", "min", "logsumexp", "softmax", "log_softmax"], lambda x: (x, 1)),
    # element-wise, with more arguments than one tensor
    "clamp": lambda x: (x, -0.5, 0.5),
    **dict.fromkeys(["gt", "ge", "lt", "le", "ne", "atan2", "xlogy"], lambda x: (x, OTHER.abs())),
    "masked_fill": lambda x: (x, OTHER > 0, 0.0),
    "where": lambda x: (OTHER > 0, x, OTHER),
    "isin": lambda x: (x, OTHER),
    "fill": lambda x: (x, 1.0),
    "threshold": lambda x: (x, 0.1, 0.0),
    **dict.fromkeys(["__and__", "__or__", "__xor__"], lambda x: (x > 0, OTHER > 0)),
    **dict.fromkeys(["logical_and", "logical_or", "logical_xor"], lambda x: (x > 0, OTHER > 0)),
    "lerp": lambda x: (x, OTHER, 0.3),
    "addcmul": lambda x: (x, OTHER, OTHER),
    "addcdiv": lambda x: (x, OTHER, OTHER),
    "rsub": lambda x: (x, 1.0),
    **dict.fromkeys(["complex", "polar"], lambda x: (x, OTHER)),
    "_conj": lambda x: (torch.complex(x, OTHER),),
    "matmul": lambda x: (x, x),
}


def sample(name: str) -> Tensor:
    return normal(*((4, 6) if name == "t" else SIZES[OPERATIONS[name].space]))


def arguments(name: str, x: Tensor) -> tuple[Any, ...]:
    if name in ARGUMENTS:
        return ARGUMENTS[name](x)
    space = OPERATIONS[name].space
    if "upsample" in name:
        return (x, [8] * space) if "nearest" in name else (x, [8] * space, False)
    if "adaptive" in name or "pool" in name:
        return (x, [2] * space)
    return (x, [1] * 2 * space) if name.startswith(("reflection", "replication")) else (x,)


def run(name: str, x: Tensor, alias: str = "") -> list[Tensor]:
    """The floating results of an operation, in float64; of a complex one a number that shows both parts."""
    function = operator.getitem if name == "operator::getitem" else getattr(torch.ops.aten, alias or name)
    out = function(*arguments(name, x))
    tensors = list(out) if isinstance(out, (tuple, list)) else [out]
    tensors = [t.real + math.pi * t.imag if t.is_complex() else t for t in tensors]
    return [t.double() for t in tensors if t.is_floating_point() or t.dtype is torch.bool]


# --- what each claim means --------------------------------------------------------------------------------------------
def homogeneous(name: str, row: Operation) -> None:
    x = sample(name)
    for factor in (0.0, 0.3, 2.5):
        for scaled, plain in zip(run(name, factor * x), run(name, x), strict=True):
            torch.testing.assert_close(scaled, factor * plain)


def bijective(name: str, row: Operation) -> None:
    x = sample(name)
    (y,) = run(name, x)
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    # The places do not depend on the numbers: other numbers go the same ways.
    places = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
    assert torch.equal(y.flatten(), x.flatten()[run(name, places)[0].flatten().long()])


def identity(name: str, row: Operation) -> None:
    x = sample(name)
    assert torch.equal(run(name, x)[0], x)


GRID = torch.linspace(-30, 30, 600_001, dtype=torch.float64)  # steps of 1e-4


def lipschitz(name: str, row: Operation) -> None:
    y = run(name, GRID)[0]
    slopes = y.diff().abs() / GRID.diff()
    assert float(slopes.max()) <= row.lipschitz * (1 + 1e-9)
    assert float(slopes.max()) >= row.lipschitz * 0.999, "a smaller constant would do"


def zero(name: str, row: Operation) -> None:
    assert not run(name, torch.zeros(3, dtype=torch.float64))[0].any()


def one_sided(name: str, row: Operation) -> None:
    assert torch.equal(run(name, GRID)[0], torch.where(GRID > 0, GRID, 0))


def keeps_sign(name: str, row: Operation) -> None:
    assert all(float(y.min()) >= 0 for y in run(name, sample(name).clamp(min=0)))


def nonnegative(name: str, row: Operation) -> None:
    """On what else the operation is called with, where the claim holds for that."""
    x = sample(name)
    if name in ("clamp", "hardtanh"):
        assert all(float(getattr(torch, name, getattr(F, name, None))(x, 0.0, top).min()) >= 0 for top in (0.0, 2.0))
        return
    assert all(float(y.min()) >= 0 for y in run(name, x))


def function(name: str, row: Operation) -> None:
    torch.testing.assert_close(row.function(GRID), run(name, GRID)[0])


def alone(name: str, row: Operation) -> None:
    """One number out for one number in: a change of one entry shows at its place only."""
    x = sample(name)
    (before,) = run(name, x)
    assert before.shape == x.shape
    for at in (0, 17, 200):
        other = x.clone()
        other.view(-1)[at] = -3 * other.view(-1)[at]
        changed = (run(name, other)[0].nan_to_num() != before.nan_to_num()).flatten().nonzero().flatten().tolist()
        assert set(changed) <= {at}


CLAIMS = (homogeneous, bijective, identity, lipschitz, zero, one_sided, keeps_sign, nonnegative, function, alone)


def made(claim: Callable, row: Operation) -> bool:
    """Whether a row makes a claim."""
    if claim is alone:
        return row.kind in ("elementwise", "like", "prelu")
    if claim is lipschitz:
        return row.lipschitz < float("inf")
    return bool(getattr(row, claim.__name__))


RANDOM = {"bernoulli"}
JOINT = {"add", "sub"}  # called on x and a mirror image of it


@pytest.mark.parametrize(
    ("claim", "name"),
    [(c, n) for c in CLAIMS for n, row in OPERATIONS.items() if made(c, row)],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_torch_confirms_every_claim(claim, name):
    if not hasattr(torch.ops.aten, name) and "::" not in name:
        pytest.skip(f"this torch has no {name}")
    if claim is alone and name in RANDOM | JOINT:
        return
    claim(name, OPERATIONS[name])


@pytest.mark.parametrize(
    ("claim", "name", "wrong"),
    [
        (homogeneous, "tanh", {}),
        (homogeneous, "relu6", {}),
        (homogeneous, "softmax", {}),
        (homogeneous, "clamp", {}),
        (bijective, "slice", {}),
        (bijective, "repeat", {}),
        (bijective, "relu", {}),
        (identity, "flip", {}),
        (identity, "abs", {}),
        (lipschitz, "gelu", {"lipschitz": 1.0}),
        (lipschitz, "hardswish", {"lipschitz": 1.4999}),
        (lipschitz, "sigmoid", {"lipschitz": 1.0}),
        (zero, "sigmoid", {}),
        (zero, "softplus", {}),
        (one_sided, "leaky_relu", {}),
        (one_sided, "relu6", {}),
        (keeps_sign, "upsample_bicubic2d", {}),
        (keeps_sign, "sub", {}),
        (nonnegative, "tanh", {}),
        (nonnegative, "leaky_relu", {}),
        (function, "gelu", {"function": lambda x: F.gelu(x, approximate="tanh")}),
        (alone, "softmax", {}),
        (alone, "roll", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", ""),
)
def test_a_wrong_entry_is_caught(claim, name, wrong):
    row = dataclasses.replace(OPERATIONS[name], **wrong)
    with pytest.raises(AssertionError):
        claim(name, row)


# --- with which arguments a claim holds -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "holds"),
    [
        (lambda x: F.leaky_relu(x, 0.2), True),
        (lambda x: F.leaky_relu(x, 1.5), False),
        (lambda x: F.leaky_relu(x, -0.1), False),
        (lambda x: F.hardtanh(x, -2.0, 3.0), True),
        (lambda x: F.hardtanh(x, 0.5, 1.0), False),
        (F.elu, True),
        (lambda x: F.elu(x, 2.0), False),
        (F.softplus, True),
        (lambda x: F.softplus(x, 2.0), False),
        (lambda x: x + x.flip(0), True),
        (lambda x: x + 1.0, False),
        (lambda x: torch.subtract(x, x.flip(0), alpha=2), True),
        (lambda x: x - 1, False),
        (lambda x: torch.multiply(x, 2.0), True),
        (lambda x: x * x, False),
        (lambda x: x / 2, True),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), False),
        (lambda x: x / x.flip(0), False),
        (lambda x: F.dropout(x, 0.5, training=False), True),
        (lambda x: F.dropout(x, 0.0, training=True), True),
        (lambda x: F.dropout(x, 0.5, training=True), False),
        (lambda x: F.pad(x, (1, 1)), True),
        (lambda x: F.pad(x, (1, 1), value=2.0), False),
        (lambda x: F.pad(x, (1, 1), mode="reflect"), True),
        (lambda x: torch.constant_pad_nd(x, (1, 1), 2.0), False),
        (lambda x: x.to(torch.float64), True),
        (lambda x: x.to(torch.int64), False),
    ],
)
def test_with_which_arguments_the_claims_hold(call, holds):
    class Calls(nn.Module):
        def forward(self, x):
            return call(x)

    graph = capture(Calls(), torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))).graph.graph
    last = [node for node in graph.nodes if node.op == "call_function"][-1]
    assert operation(last).holds_for(last) is holds


@pytest.mark.parametrize(
    ("call", "never"),
    [
        (F.relu, True),
        (F.relu_, True),
        (nn.ReLU6(), True),
        (lambda x: F.hardtanh(x, 0.0, 6.0), True),
        (F.hardtanh, False),
        (lambda x: x.clamp(0.0), True),
        (lambda x: x.clamp(min=0.0), True),
        (lambda x: x.clamp(0.0, -1.0), False),
        (lambda x: x.clamp(-0.1, 1.0), False),
        (torch.sigmoid, True),
        (F.softplus, True),
        (lambda x: F.softplus(x, -1.0), False),
        (lambda x: F.softmax(x, 1), True),
        (F.gelu, False),
        (F.leaky_relu, False),
    ],
)
def test_which_calls_never_return_a_negative_number(call, never):
    class Calls(nn.Module):
        def forward(self, x):
            return call(x + 0.0)

    graph = capture(Calls(), torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))).graph.graph
    last = [node for node in graph.nodes if node.op == "call_function"][-1]
    assert operation(last).nonnegative_for(last) is never


# --- names ------------------------------------------------------------------------------------------------------------
def test_every_name_stands_in_the_table_once_and_exists():
    names = [name for row in TABLE for name in row.names.split()] + list(ALIASES)
    assert len(names) == len(set(names))
    for name in names:
        space, _, _ = name.rpartition("::")
        assert space in OTHERS if space else hasattr(torch.ops.aten, name) or name in NEWER, name


def test_every_alias_takes_the_same_arguments_and_gives_the_same_numbers():
    for alias, name in ALIASES.items():
        mine, theirs = (getattr(torch.ops.aten, n) for n in (alias, name))
        forms = {types(getattr(theirs, o)) for o in theirs.overloads() if hasattr_safely(theirs, o)}
        assert {types(getattr(mine, o)) for o in mine.overloads()} <= forms, alias
        x = sample(name).sigmoid() + (1.0 if name == "acosh" else 0.0)
        for a, b in zip(run(name, x, alias), run(name, x), strict=True):
            assert torch.equal(a, b), alias


def types(overload: Any) -> tuple[str, ...]:
    return tuple(str(a.type) for a in overload._schema.arguments)


def hasattr_safely(packet: Any, overload: str) -> bool:
    """Some overloads are of TorchScript alone, and cannot be looked up."""
    try:
        return bool(getattr(packet, overload))
    except (AttributeError, RuntimeError):
        return False


def test_names_carry_their_namespace():
    aten = torch.ops.aten
    assert op_name(aten.add_.Tensor) == op_name(aten.add) == canonical("aten::add") == "add"
    assert op_name(aten.true_divide_.Tensor) == op_name(aten.divide.Tensor) == "div"
    assert op_name(aten.__and__.Tensor) == "__and__"
    assert op_name(aten._to_copy.default) == "_to_copy"
    assert canonical("mylib::add") == "mylib::add"
    assert canonical("mylib::multiply_") == "mylib::multiply_"
    assert op_name(operator.getitem) == "operator::getitem"
    assert op_name(torch.ops.higher_order.cond) == "higher_order::cond"
    assert op_name("x") == ""


def test_every_rule_is_of_an_operation_that_exists_and_every_kind_has_its_rules():
    own = {name for name, f in RULES.items() if f.__module__.startswith("coreprune.")}
    known = {name for name in own if name in NEWER or "::" in name or hasattr(torch.ops.aten, name)}
    assert own == known
    without = ("kernel", "getitem", "region", "unknown")  # of the clock alone, and of the interpreter itself
    assert own == set(of_kind(*(kind for kind in get_args(Kind) if kind not in without)))


def test_the_axis_is_where_the_table_says():
    for name in of_kind(
        "sum", "mean", "spread", "vector norm", "reduction", "mixing", "ranking", "gated", "scatter", "fourier"
    ):
        packet = getattr(torch.ops.aten, name)
        overloads = [getattr(packet, o) for o in packet.overloads() if hasattr_safely(packet, o)]
        at = {[a.name for a in o._schema.arguments if not a.kwarg_only][1:].index("dim") + 1
              for o in overloads
              if "dim" in [a.name for a in o._schema.arguments if not a.kwarg_only]}  # fmt: skip
        assert at == {OPERATIONS[name].dim}, name


def test_what_torch_counts_as_multiply_accumulates_is_a_product():
    counted = {op_name(op) for op in flop_registry}
    forward = {name for name in counted if "backward" not in name}
    assert forward
    assert {name for name in forward if not OPERATIONS[name].product} == set()
    assert not any(OPERATIONS[n].product for n in OPERATIONS if "upsample" in n or "pool" in n)


# --- in a model -------------------------------------------------------------------------------------------------------
class Aliased(nn.Module):
    """Operations under their other names, between two layers."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.what = nn.Linear(3, 8), nn.Linear(8, 2), what

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.what(self.a(x)))


@pytest.mark.parametrize(
    "what",
    [
        lambda y: torch.multiply(y, 2.0),
        lambda y: torch.divide(torch.true_divide(y, 2.0), y.exp()),
        lambda y: torch.subtract(y, torch.negative(y)),
        torch.absolute,
        lambda y: torch.moveaxis(torch.swapdims(y, 0, 1), 0, 1),
        lambda y: torch.special.softmax(y.unsqueeze(0), 0)[0] * torch.special.expit(y),
    ],
)
def test_aliases_lock_nothing(what):
    groups = find_groups(capture(Aliased(what), torch.ones(1, 3)))
    assert [g.locked_because for g in groups if g.name == "a"] == [None]


def test_volumes_are_sampled_channel_by_channel():
    """Two spatial axes were assumed, and all channels locked."""
    grid = torch.zeros(1, 2, 2, 2, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(2, 8, 1), nn.Conv3d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.grid_sample(self.a(x), grid, align_corners=False))

    groups = find_groups(capture(Net(), torch.ones(1, 2, 3, 3, 3)))
    assert [g.locked_because for g in groups if g.name == "a"] == [None]


def test_a_rule_for_an_operation_that_torch_does_not_have():
    with pytest.raises(InputError, match=r"no operation 'scale'.*mylib::scale"):
        rule("scale")
    with pytest.raises(InputError, match="above the function"):
        rule(len)
