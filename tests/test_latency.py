"""What is timed, in which order, and what is made of the times; never how fast this machine is."""

from __future__ import annotations

import json
from collections import UserList

import pytest
import torch
from torch import Tensor, nn

from coreprune import _timing, latency
from coreprune._batch import usual
from coreprune.errors import InputError, ModelError
from coreprune.latency import compare_latency, measure_latency


class Shared(UserList):
    """A list that a model and its twins have in common."""

    def __deepcopy__(self, memo: object) -> Shared:
        return self


class Clock:
    """Moves when a model runs, and by `tick` when it is read."""

    def __init__(self) -> None:
        self.now, self.tick = 0.0, 0.0

    def __deepcopy__(self, memo: object) -> Clock:
        return self

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class Timed(nn.Module):
    """Takes the given seconds on the clock, one after the other, then the last of them for ever."""

    def __init__(self, clock: Clock, log: Shared, name: str, *seconds: float) -> None:
        super().__init__()
        self.clock, self.log, self.name, self.seconds = clock, log, name, Shared(seconds)
        self.layer = nn.Linear(3, 2)
        self.seen = Shared()

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        self.log.append(self.name)
        self.seen.append((x, self.training, torch.is_grad_enabled()))
        return self.layer(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(_timing, "perf_counter", made)
    monkeypatch.setattr(latency, "perf_counter", made)
    monkeypatch.setattr(latency, "batch_axes", lambda model, inputs, said: usual(inputs))
    return made


def test_models_take_turns_after_a_warm_up_of_each(clock):
    log = Shared()
    a, b = Timed(clock, log, "a", 5.0, 2.0, 1.0), Timed(clock, log, "b", 0.5)
    found = measure_latency({"a": a, "b": b}, torch.zeros(1, 3), batch_sizes=(4,), seconds=20)
    # Warm after three runs that agree: 5, 2, 1, 1, 1 for a and three at once for b. Then 40 seconds in turns of 1.5.
    assert "".join(log[:8]) == "aaaaabbb"
    assert log[8:] == ["a", "b"] * 27
    assert found.rows[0].repeats == 27


def test_a_slow_model_is_timed_the_least_number_of_times(clock):
    log = Shared()
    found = measure_latency(
        Timed(clock, log, "a", 100.0), torch.zeros(1, 3), batch_sizes=(1,), seconds=0.1, min_repeats=4
    )
    assert log == ["a"] * 5
    assert found.rows[0].repeats == 4


def test_median_and_quartiles(clock):
    log = Shared()
    a = Timed(clock, log, "a", 9.0, 4.0, 1.0, 2.0, 5.0, 3.0)  # the first one warms up
    b = Timed(clock, log, "b", 1.0)
    found = measure_latency({"a": a, "b": b}, torch.zeros(1, 3), batch_sizes=(2,), seconds=0, min_repeats=5)
    row = found.rows[0]
    assert [row.timings["a"].low, row.timings["a"].median, row.timings["a"].high] == [2, 3, 4]
    assert [row.timings["b"].low, row.timings["b"].median, row.timings["b"].high] == [1, 1, 1]
    assert row.speedup == 3


def test_plain_values_and_table(clock):
    log = Shared()
    before, after = Timed(clock, log, "a", 0.03), Timed(clock, log, "b", 0.012)
    found = compare_latency(before, after, torch.zeros(1, 3), seconds=0)
    plain = json.loads(json.dumps(found.as_dict()))
    assert set(plain) == {"device", "threads", "rows", "note"}
    assert plain["device"].startswith("cpu")
    assert plain["threads"] == torch.get_num_threads()
    assert [row["batch"] for row in plain["rows"]] == [1, 32]
    for row in plain["rows"]:
        assert set(row["before"]) == set(row["after"]) == {"median", "low", "high"}
        assert row["speedup"] == pytest.approx(2.5)
        assert row["repeats"] == 5
    assert "30.00 ms (30.00–30.00)  12.00 ms (12.00–12.00)     2.50×" in str(found)


def test_one_model_has_no_speedup(clock):
    found = measure_latency(Timed(clock, Shared(), "a", 0.03), torch.zeros(1, 3), seconds=0)
    assert set(found.as_dict()["rows"][0]) == {"batch", "model", "repeats"}
    assert "speed-up" not in str(found)


def test_batches_repeat_the_samples_of_the_example(clock):
    model = Timed(clock, Shared(), "a", 0.1)
    example = torch.arange(6.0).reshape(2, 3)
    measure_latency(model, example, batch_sizes=(1, 5), seconds=0, min_repeats=1)
    one, five = model.seen[0][0], model.seen[-1][0]
    assert torch.equal(one, example[:1])
    assert torch.equal(five, example[[0, 1, 0, 1, 0]])


def test_keyword_inputs_and_what_is_no_sample():
    class Pair(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, scale: Tensor, flag: bool) -> Tensor:
            assert len(x) == len(mask)
            assert scale.shape == (3,)
            assert flag
            return (x + scale) * mask[:, None]

    example = {"x": torch.ones(2, 3), "mask": torch.ones(2), "scale": torch.ones(3), "flag": True}
    assert [row.batch for row in measure_latency(Pair(), example, batch_sizes=(1, 7), seconds=0).rows] == [1, 7]


def test_models_run_in_evaluation_mode_without_gradients_and_are_left_as_they_were(clock):
    a, b = Timed(clock, Shared(), "a", 0.1), Timed(clock, [], "b", 0.1).eval()
    a.layer.eval()
    measure_latency({"a": a, "b": b}, torch.zeros(2, 3), seconds=0)
    assert all(not training and not grad for m in (a, b) for _, training, grad in m.seen)
    assert (a.training, a.layer.training, b.training, b.layer.training) == (True, False, False, False)
    assert torch.is_grad_enabled()


class Two(nn.Module):
    """A forward with the batch size written into it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3) + 1


def test_a_batch_that_a_model_does_not_run_at_is_left_out_with_a_note():
    found = measure_latency(Two(), torch.zeros(2, 3), batch_sizes=(2, 32), seconds=0, batch_axis=0)
    assert [row.batch for row in found.rows] == [2]
    assert found.note.startswith("Batch 32 is left out: RuntimeError")


def test_modes_are_restored_after_an_error():
    model = Two()
    with pytest.raises(InputError, match=r"but not with 1 .* 32 .*Pass batch_sizes=\(2,\)"):
        measure_latency(model, torch.zeros(2, 3), seconds=0, batch_axis=0)
    assert model.training


def test_a_model_that_does_not_run_on_the_example_is_named():
    good, bad = nn.Linear(3, 2), nn.Linear(4, 2)
    with pytest.raises(ModelError, match="'after' does not run on the example"):
        compare_latency(good, bad, torch.zeros(1, 3), seconds=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"models": {}}, "none is given"),
        ({"models": {"a": 3}}, r"\['a'\]"),
        ({"models": {"batch": nn.Linear(3, 2)}}, "cannot be called batch"),
        ({"batch_sizes": ()}, "whole numbers"),
        ({"batch_sizes": (0,)}, "whole numbers"),
        ({"batch_sizes": (1.5,)}, "whole numbers"),
        ({"min_repeats": 0}, "whole numbers"),
        ({"seconds": float("nan")}, "whole numbers"),
        ({"example": {"n": 3}}, "no tensor with samples"),
        ({"example": torch.zeros(0, 3)}, "no tensor with samples"),
        ({"example": 3}, "pass a tensor"),
    ],
)
def test_wrong_arguments_are_refused(change, match):
    given = {"models": nn.Linear(3, 2), "example": torch.zeros(1, 3), **change}
    with pytest.raises(InputError, match=match):
        measure_latency(given.pop("models"), given.pop("example"), **given)


class Slow(nn.Module):
    """A net with products and a rest, that takes the given seconds on the clock."""

    def __init__(self, clock: Clock, seconds: float, width: int) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        return self.net(x)


def test_a_speedup_behind_the_macs_is_explained_and_one_that_keeps_up_is_not(clock):
    before, after = Slow(clock, 1.0, 64), Slow(clock, 0.7, 30)
    x = torch.zeros(2, 16)
    assert compare_latency(before, after, x, macs=(170, 100), batch_sizes=(4,), seconds=0).note == ""
    assert compare_latency(before, after, x, batch_sizes=(4,), seconds=0).note == ""
    note = compare_latency(before, after, x, macs=(200, 100), batch_sizes=(4,), seconds=0).note
    assert "At batch 4 it is 1.43× as fast, with 2.00× fewer MACs." in note
    assert "noise" not in note
    assert "2 of 2 cut weights have a width that is no multiple of 8" in note


def test_operations_are_timed_one_by_one(clock):
    """Each takes one tick: two products, a relu and two transposed views."""
    before, after = Slow(clock, 1.0, 64), Slow(clock, 1.0, 32)
    clock.tick = 1e-6
    note = compare_latency(before, after, torch.zeros(2, 16), macs=(2, 1), batch_sizes=(4,), seconds=0).note
    assert "Convolutions and matrix products take 40% of the original's time and became 1.00× as fast" in note
    assert note.endswith("the rest became 1.00× as fast (mostly t, relu).")  # and 32 is a multiple of 8


def test_overlapping_quartiles_are_called_noise(clock):
    log = Shared()
    before = Timed(clock, log, "a", 1.0, *([1.0, 3.0] * 10))
    after = Timed(clock, log, "b", 1.0, *([0.9, 2.9] * 10))
    note = compare_latency(before, after, torch.zeros(1, 3), macs=(2, 1), batch_sizes=(1,), seconds=0, min_repeats=20)
    assert "The quartiles of the two overlap" in note.note


def test_operations_are_told_apart():
    products = (
        "addmm",
        "mkldnn_convolution",
        "bmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "cudnn_convolution",
    )
    rest = ("native_batch_norm", "clamp_min_", "relu", "max_pool2d_with_indices", "add_", "mean", "copy_", "softmax")
    assert all(map(latency._product, products))
    assert not any(map(latency._product, rest))
