"""The table between and beyond what was measured, and which operations are measured at which lengths."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_clocks import work
from torch import Tensor, nn

from coreprune.graph import Group, Traced, capture, find_groups
from coreprune.pruning.timing.calls import Call, calls_of
from coreprune.pruning.timing.pieces import fits, prepared
from coreprune.pruning.timing.store import Store
from coreprune.pruning.timing.table import Entry, LatencyTable, measured_table

CPU = torch.device("cpu")


def group(name: str, size: int) -> Group:
    return Group(name, size, 1, (), (), ())


def traced(model: nn.Module, example: Tensor) -> Traced:
    captured = capture(model.eval(), (example,))
    return Traced(model, captured, find_groups(captured))


def table_of(model: nn.Module, example: Tensor, least: int, place, clock=None) -> tuple[LatencyTable, Traced, Store]:
    found, store = traced(model, example), Store(place / "times.json", "here")
    calls = calls_of(found.captured, found.groups, "eager", {})
    narrow = dict.fromkeys(found.free, least)
    clock = clock or (lambda runs: [work(run) for run in runs])
    return measured_table(calls, found.groups, narrow, "eager", CPU, store, clock, lambda *_: None), found, store


# --- interpolation --------------------------------------------------------------------------------------------------


def test_between_the_points_the_time_is_linear_in_both_widths():
    """A bilinear function is its own interpolation, in every cell of an uneven grid."""
    xs, ys = [1, 5, 16], [2, 3, 11, 40]

    def time(x: float, y: float) -> float:
        return 3 + 2 * x + 5 * y + 0.5 * x * y

    grid = np.array([[time(x, y) for y in ys] for x in xs])
    entry = Entry(((0.0, {"a": 1.0}), (2.0, {"b": 0.5})), (xs, ys), grid, count=3)
    table = LatencyTable([group("a", 16), group("b", 76), group("c", 9)], [entry])
    for a in (1, 2, 4, 5, 6, 16):
        for b in (0, 1, 2, 10, 18, 33, 76):
            assert table({"a": a, "b": b}) == pytest.approx(3 * time(a, 2 + b / 2)), (a, b)
    assert table({}) == pytest.approx(3 * time(16, 40)), "groups that are not named are whole"


def test_beyond_the_points_it_is_the_time_of_the_nearest():
    entry = Entry(((0.0, {"a": 1.0}),), ([4, 8],), np.array([1.0, 3.0]))
    table = LatencyTable([group("a", 8)], [entry])
    assert [table({"a": a}) for a in (1, 4, 6, 8)] == [1.0, 1.0, 2.0, 3.0]


def test_entries_of_different_forms_add_up():
    one = Entry(((0.0, {"a": 1.0}),), ([1, 3, 4, 8],), np.array([1.0, 2.0, 3.0, 7.0]))
    two = Entry(((0.0, {"a": 1.0}), (0.0, {"b": 1.0})), ([1, 8], [2]), np.array([[10.0], [17.0]]))
    table = LatencyTable([group("a", 8), group("b", 2)], [one, two])
    assert table({"a": 2, "b": 2}) == pytest.approx(1.5 + 11.0)
    assert LatencyTable([group("a", 8)], [])({}) == 0.0


def test_a_narrower_operation_never_counts_as_slower():
    """Noise, or a width that kernels dislike, must not make the allocation remove channels for nothing."""
    entry = Entry(((0.0, {"a": 1.0}),), ([1, 2, 4, 8],), np.array([1.0, 9.0, 2.0, 5.0]))
    table = LatencyTable([group("a", 8)], [entry])
    times = [table({"a": a}) for a in range(1, 9)]
    assert times == sorted(times)
    assert table({"a": 2}) == 2.0
    grid = np.array([[1.0, 8.0, 3.0], [7.0, 2.0, 4.0]])
    both = Entry(((0.0, {"a": 1.0}), (0.0, {"b": 1.0})), ([1, 2], [1, 2, 3]), grid)
    table = LatencyTable([group("a", 2), group("b", 3)], [both])
    assert [[table({"a": a, "b": b}) for b in (1, 2, 3)] for a in (1, 2)] == [[1, 2, 3], [2, 2, 4]]


# --- what is measured -----------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Convolutions, one of them depthwise, norms, a concatenation of three, and equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.arms = nn.ModuleList([nn.Conv2d(16, 8, 1) for _ in range(3)])
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.depth(x)
        x = torch.cat([arm(x) for arm in self.arms], 1)
        return self.head(x.mean((2, 3)))


def test_the_table_is_what_a_model_of_these_widths_takes(tmp_path):
    """At full and at half widths, which are points of every grid, no interpolation comes in between."""
    table, found, _ = table_of(Branches(), torch.zeros(1, 3, 8, 8), 1, tmp_path)
    flops = {
        True: found.cost_model().macs,
        False: found.cost_model({n: g.size // 2 for n, g in found.free.items()}).macs,
    }
    for whole, macs in flops.items():
        widths = {} if whole else {n: g.size // 2 for n, g in found.free.items()}
        assert table(widths) == pytest.approx(1e-6 * 2 * macs / 1000, rel=0.05), "the flops of the fake clock"


def test_operations_that_widths_change_are_timed_once_each(tmp_path):
    seen: list[int] = []

    def clock(runs):
        seen.append(len(runs))
        return [1.0 for _ in runs]

    table, _, store = table_of(Branches(), torch.zeros(1, 3, 8, 8), 1, tmp_path, clock)
    assert sum(seen) == len(store.seconds), "equal layers share their times"
    names = {key.partition("(")[0] for key in store.seconds}
    wanted = {
        "aten.conv2d.default",
        "aten.batch_norm.default",
        "aten.relu.default",
        "aten.cat.default",
        "aten.linear.default",
    }
    assert wanted <= names
    arms = [
        key for key in store.seconds if key.startswith("aten.conv2d") and "[1,16,8,8]" in key and "[8,16,1,1]" in key
    ]
    assert len(arms) == 1
    assert table({}) > 0
    depthwise = [key for key in store.seconds if "[1,8,8,8]" in key and "[8,1,3,3]" in key]
    assert len(depthwise) == 1, "a depthwise convolution shrinks along one width"
    assert depthwise[0].endswith(", 8)"), "and its number of groups follows"


def test_a_layer_norm_is_over_the_width_that_is_timed(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x)))

    captured = capture(Normed().eval(), (torch.zeros(2, 4),))
    found = Traced(Normed(), captured, find_groups(captured, norm_statistics=True))
    store = Store(tmp_path / "times.json", "here")
    calls = calls_of(captured, found.groups, "eager", {})
    measured_table(calls, found.groups, {"up": 1}, "eager", CPU, store, lambda r: [work(x) for x in r], lambda *_: None)
    assert any(key.startswith("aten.layer_norm") and "[1,4]', [4]" in key for key in store.seconds)


def test_fused_runtimes_are_not_charged_for_what_they_fuse():
    found = traced(Branches(), torch.zeros(1, 3, 8, 8))
    kinds = {
        runtime: {str(c.target).split(".")[1] for c in calls_of(found.captured, found.groups, runtime, {})}
        for runtime in ("eager", "compile", "onnx")
    }
    assert {"relu", "batch_norm"} <= kinds["eager"]
    assert kinds["compile"] == kinds["onnx"] == kinds["eager"] - {"relu", "batch_norm"}


def test_what_cannot_be_run_is_found_without_running_it():
    found = traced(Branches(), torch.zeros(1, 3, 8, 8))
    call = next(c for c in calls_of(found.captured, found.groups, "eager", {}) if "linear" in str(c.target))
    full = {e: e.at({g.name: g.size for g in found.groups}) for e in call.varying}
    assert fits(call, full) == ""
    broken = Call(call.target, (call.args[0], call.args[2]), call.kwargs)
    assert "Error" in fits(broken, {e: n + 1 for e, n in full.items()})


def test_an_operation_that_fails_when_it_is_timed_costs_its_entries_alone(tmp_path, caplog):
    def clock(runs):
        times = []
        for run in runs:
            out = run()
            if out.shape == (1, 5):  # of the head
                raise RuntimeError("no kernel")
            times.append(1.0)
        return times

    with caplog.at_level(logging.INFO, "coreprune"):
        table, _, store = table_of(Branches(), torch.zeros(1, 3, 8, 8), 1, tmp_path, clock)
    assert "no kernel" in caplog.text
    assert not any(key.startswith("aten.linear") for key in store.seconds)
    everything, _, _ = table_of(Branches(), torch.zeros(1, 3, 8, 8), 1, tmp_path / "2", lambda runs: [1.0] * len(runs))
    assert table.entries == everything.entries - 1
    assert table({}) == everything({}) - 1


def test_channels_last_models_are_timed_channels_last():
    model = Branches().to(memory_format=torch.channels_last)
    example = torch.zeros(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    found = traced(model, example)
    calls = calls_of(found.captured, found.groups, "eager", {})
    full = {g.name: g.size for g in found.groups}
    depth = next(c for c in calls if "conv2d" in str(c.target) and c.args[-1] == 16)
    tensor = depth.operands[0].tensor({e: e.at(full) for e in depth.varying}, CPU)
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert not tensor.is_contiguous()


def test_timing_leaves_the_random_state_alone():
    found = traced(Branches(), torch.zeros(1, 3, 8, 8))
    call = calls_of(found.captured, found.groups, "eager", {})[0]
    before = torch.get_rng_state()
    prepared([(call, {e: 4 for e in call.varying})], CPU, "eager")[0]()
    assert torch.equal(torch.get_rng_state(), before)
