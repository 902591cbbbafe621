"""Batch-norm inversion: the statistics match, the model is left alone, the padding of the training is recognised."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from coreprune import CoreprunError, InputError, ModelError
from coreprune.queries import BatchNormInversion, Leaves, PinkNoise, Strokes, invert, make_queries
from coreprune.queries.sources.batch_norm_inversion import _stalled, _steps
from coreprune.queries.sources.norm_statistics import _Moments
from coreprune.queries.sources.starting import crops
from coreprune.queries.sources.work import work
from queries.small import Alone, assert_same, calibrated, convnet, gen, mlp, none, seeded, state, target

EXAMPLE = torch.zeros(1, 3, 16, 16)


def data(n: int = 200, seed: int = 11) -> Tensor:
    """Images of another kind than the starting ones: stripes and offsets."""
    x = Leaves(count=3, colour=0.2)(target(convnet(), EXAMPLE), n, gen(seed), none)
    return 1.5 * x + torch.tensor([0.8, -0.3, 0.1]).view(3, 1, 1) + 0.7 * torch.sin(torch.arange(16.0) * 2)


def statistics(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Mean and deviation at every batch norm, by running the layers one by one."""
    found = []
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.BatchNorm2d):
            values = x.transpose(0, 1).flatten(1)
            found.append((values.mean(1) - layer.running_mean) / layer.running_var.sqrt())
            found.append(values.std(1) / layer.running_var.sqrt() - 1)
        x = layer(x)
    return found


def off(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float(torch.cat(statistics(model, x)).square().mean())


def test_statistics_match_after_inversion() -> None:
    model = calibrated(convnet(), data())
    x = invert(model, (3, 16, 16), 32, seed=0, padding=0)
    assert x.shape == (32, 3, 16, 16)
    start = PinkNoise()(target(model, EXAMPLE), 32, gen(), none)
    assert off(model, x) < 0.005
    assert off(model, x) < 0.05 * off(model, start)


@pytest.mark.slow
def test_hidden_covariances_come_closer_than_those_of_noise() -> None:
    real, model = data(), calibrated(convnet(), data())

    def error(x: Tensor) -> float:
        with torch.no_grad():
            a, b = (torch.cov(model[:3](t).transpose(0, 1).flatten(1)) for t in (x, real))
        return float((a - b).norm() / b.norm())

    found = invert(model, (3, 16, 16), 64, seed=0)
    assert error(found) < 0.5 * error(PinkNoise()(target(model, EXAMPLE), 64, gen(), none))


def test_crops_move_images_over_zeros() -> None:
    x = torch.arange(1.0, 26.0).reshape(1, 1, 5, 5).repeat(200, 2, 1, 1)
    moved = crops(x, 2, gen())
    seen = set()
    for image in moved:
        assert torch.equal(image[0], image[1])
        (dy, dx) = next(
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(torch.nn.functional.pad(x[0, 0], (2,) * 4)[2 + dy : 7 + dy, 2 + dx : 7 + dx], image[0])
        )
        seen.add((dy, dx))
    assert len(seen) == 25


def test_padding_is_recognised_from_the_statistics() -> None:
    """Random crops over zeros in training shift the running statistics; plain training does not."""
    example = torch.zeros(1, 3, 32, 32)
    images = Leaves()(target(convnet(), example), 400, gen(12), none)
    for padding, model in ((4, calibrated(convnet(), crops(images, 4, gen(1)))), (0, calibrated(convnet(), images))):
        with torch.no_grad():
            assert BatchNormInversion().start(target(model, example)).padding == padding
    big = target(convnet(), torch.zeros(1, 3, 96, 96))
    assert BatchNormInversion().start(big).padding == 0
    assert BatchNormInversion(padding=7).start(big).padding == 7


@pytest.mark.slow
def test_regression_cropped_statistics_are_met_by_cropped_images() -> None:
    """Matching the running statistics without the crops of the training leaves a bias that no step removes."""
    images = data()
    model = calibrated(convnet(), crops(images, 2, gen(1)))
    x = invert(model, (3, 16, 16), 64, steps=80, seed=0, padding=2)
    assert off(model, crops(x, 2, gen(5))) < 0.005
    assert off(model, x) > 4 * off(model, crops(x, 2, gen(5)))


class Frozen(nn.Module):
    """Torchvision's FrozenBatchNorm2d in short: no BatchNorm class, buffers only."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5), ("running_var", 4.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


def test_frozen_batch_norms_count() -> None:
    model = nn.Sequential(Frozen(3)).eval()
    x = invert(model, (3, 8, 8), 32, steps=100, seed=0, padding=0)
    assert torch.allclose(x.mean((0, 2, 3)), torch.full((3,), 0.5), atol=0.1)
    assert torch.allclose(x.std((0, 2, 3)), torch.full((3,), 2.0), atol=0.2)


@pytest.mark.parametrize("shape", [(12,), (3, 20), (2, 5, 5, 5)])
def test_vectors_signals_and_volumes(shape: tuple[int, ...]) -> None:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 4: nn.BatchNorm3d}[len(shape)](shape[0])
    model = nn.Sequential(norm).eval()
    model[0].running_mean.fill_(1.0)
    model[0].running_var.fill_(9.0)
    x = invert(model, shape, 100, steps=100, seed=0)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.15)
    assert float(x.std()) == pytest.approx(3.0, abs=0.3)


def test_the_model_is_left_as_it_was() -> None:
    model = calibrated(convnet(), data())
    model.train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before = state(model)
    calls = []
    invert(model, (3, 16, 16), 8, steps=3, seed=0, progress=lambda *call: calls.append(call))
    assert_same(before, state(model))
    assert calls == [("queries", 1, 3), ("queries", 2, 3), ("queries", 3, 3)]


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = calibrated(convnet(), data()).train()
    before = state(model)

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(model, (3, 16, 16), 8, seed=0, progress=stop)
    assert_same(before, state(model))


def test_several_batches_and_seeds() -> None:
    model = calibrated(convnet(), data())
    runs = [invert(model, (3, 16, 16), 20, steps=2, seed=gen(s), batch=8) for s in (0, 0, 1)]
    assert runs[0].shape[0] == 20
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][:7], runs[0][7:14])  # every batch has its own noise


def test_half_precision() -> None:
    model = calibrated(convnet(), data()).bfloat16()
    queries = make_queries(model, EXAMPLE.bfloat16(), BatchNormInversion(steps=20), n=16, seed=0)
    assert queries.args[0].dtype == torch.bfloat16
    assert bool(queries.args[0].isfinite().all())


class Cut(nn.Module):
    """No gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def refuse(error: type[CoreprunError], match: str, model: nn.Module, **options: object) -> None:
    before = state(copy.deepcopy(model))
    with pytest.raises(error, match=match):
        make_queries(model, EXAMPLE, BatchNormInversion(**options), n=4, seed=0)  # type: ignore[arg-type]
    assert_same({**before, "random": 0}, {**state(model), "random": 0})


def test_what_cannot_be_inverted() -> None:
    plain = seeded(0, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)))
    refuse(InputError, "no batch norm with running statistics", plain)
    refuse(ModelError, "no gradient reaches", nn.Sequential(Cut(), nn.BatchNorm2d(3)).eval(), padding=0)
    unused = plain.append(nn.Identity())
    unused[2].spare = nn.BatchNorm2d(3)
    refuse(ModelError, "no batch norm runs as a module", unused)
    refuse(InputError, "takes one at a time. If it is an exported program, export it again", Alone(convnet()))
    for options in (
        {"steps": 0},
        {"lr": 0.0},
        {"smoothness": -1.0},
        {"padding": -1},
        {"time": 0.0},
        {"time": -1.0},
        {"time": float("nan")},
    ):
        refuse(InputError, "have to be positive", convnet(), **options)
    tokens = nn.Sequential(nn.Embedding(9, 3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(InputError, match="optimises real numbers"):
        make_queries(tokens, torch.zeros(1, 3, dtype=torch.int64), BatchNormInversion(), n=4, seed=0)


def test_invert_a_model_without_tensors() -> None:
    with pytest.raises(InputError, match="nothing to invert"):
        invert(nn.Identity(), (3, 8, 8), 4, seed=0)
    with pytest.raises(InputError, match="nothing to invert"):
        invert(mlp(), (12,), 4, seed=0)


def ranged(low: float, high: float, n: int = 300) -> tuple[nn.Module, Tensor]:
    """Dead leaves in a range, and a network that was calibrated on them."""
    images = Leaves(low=low, high=high)(target(convnet(), EXAMPLE), n, gen(21), none)
    return calibrated(convnet(), images), images


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-2.1, 2.6), (0.0, 255.0)])
def test_regression_inverted_images_stay_in_the_range_of_the_training(low: float, high: float) -> None:
    """Without a range they had twice the deviation of real images, and a quarter of their values was impossible."""
    model, images = ranged(low, high)
    width = high - low
    x = invert(model, (3, 16, 16), 32, steps=15, seed=0)
    assert low - 0.4 * width < float(x.min())
    assert float(x.max()) < high + 0.4 * width
    assert float(x.std()) == pytest.approx(float(images.std()), rel=0.3)
    assert float(x.mean()) == pytest.approx(float(images.mean()), abs=0.15 * width)


def test_no_step_leaves_the_range() -> None:
    model, _ = ranged(-1.0, 1.0)
    source = BatchNormInversion(steps=5, lr=3.0, padding=0)  # steps that are far too large
    with torch.no_grad():
        low, high = source.start(target(model, EXAMPLE)).range
    x = make_queries(model, EXAMPLE, source, n=16, seed=0).args[0]
    assert low <= float(x.min()) < float(x.max()) <= high
    assert -1.5 < low < -0.7
    assert 0.7 < high < 1.5


@pytest.mark.parametrize("kind", ["strokes", "leaves"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.0, -1.0)])
def test_regression_the_start_is_of_the_kind_that_the_network_has_seen(kind: str, low: float, high: float) -> None:
    """On a network that reads writing, dead leaves as queries were worse than none."""
    example = torch.zeros(1, 1, 24, 24)
    first = target(convnet(1), example)
    seen = Strokes(low=low, high=high) if kind == "strokes" else Leaves(low=min(low, high), high=max(low, high))
    model = calibrated(convnet(1), seen(first, 400, gen(31), none))
    with torch.no_grad():
        start = BatchNormInversion(padding=0).start(target(model, example))
    assert start.kind in {"leaves": ("leaves",), "strokes": ("strokes", "blobs")}[kind]
    if kind == "strokes":
        assert (start.gain > 0) == (high > low)  # bright ink on dark ground, or the other way round


def test_the_start_is_the_same_every_time() -> None:
    model, _ = ranged(0.0, 1.0)
    with torch.no_grad():
        one, two = (BatchNormInversion(padding=0).start(target(model, EXAMPLE)) for _ in range(2))
    assert one == two
    assert one.off == two.off


def test_the_note_says_how_well_the_statistics_are_met() -> None:
    model = calibrated(convnet(), data())
    queries = make_queries(model, EXAMPLE, BatchNormInversion(padding=0), n=32, seed=0)
    found = re.search(r"statistics met to ([\d.e-]+) σ \(root mean square\), ([\d.e-]+) σ at the start", queries.note)
    assert found is not None
    met, before = map(float, found.groups())
    with torch.no_grad():
        errors = statistics(model, queries.args[0])  # per norm the means, then the deviations
    expected = torch.stack([e.square().mean() for e in errors]).mean().sqrt()
    assert met == pytest.approx(float(expected), rel=0.2)
    assert met < 0.3 * before
    assert "σ" not in make_queries(model, EXAMPLE, "leaves", n=4).note


def test_steps_end_when_the_statistics_come_no_closer() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    calls: list[tuple[int, int]] = []
    invert(model, (3, 8, 8), 32, steps=2000, seed=0, progress=lambda _, done, total: calls.append((done, total)))
    assert len(calls) < 1000
    assert calls[-1] == (2000, 2000)
    assert calls == sorted(calls)


def test_a_step_that_helps_is_not_the_last() -> None:
    assert not _stalled([0.9**i for i in range(40)])
    assert _stalled([0.9**i for i in range(40)] + [0.9**39] * 10)
    assert not _stalled([1.0] * 10)


def test_costly_images_get_fewer_steps_and_cheap_ones_all() -> None:
    small, large = target(convnet(), EXAMPLE), target(convnet(), torch.zeros(1, 3, 1024, 1024))
    assert _steps(small) == 60
    assert 4 <= _steps(large) < 60
    assert work(large) == pytest.approx(64**2 * work(small), rel=1e-3)  # but for the classifier
    assert BatchNormInversion().at_once(small) == 128
    assert BatchNormInversion().at_once(large) == 4


def test_a_limit_of_time_ends_the_steps() -> None:
    model = calibrated(convnet(), data())
    calls: list[tuple[int, int]] = []
    source = BatchNormInversion(steps=10**6, time=1e-4, padding=0, batch=8)
    x = make_queries(
        model, EXAMPLE, source, n=16, seed=0, progress=lambda _, done, total: calls.append((done, total))
    ).args[0]
    assert len(x) == 16
    assert len(calls) < 10**5
    assert calls == sorted(calls)
    assert calls[-1] == (2 * 10**6, 2 * 10**6)


def test_the_moments_and_their_gradient_are_those_of_torch() -> None:
    """The fast moments, in double precision, against torch.var_mean and against finite differences."""
    for shape in ((5, 3), (4, 3, 6), (2, 3, 4, 5)):
        x = (torch.randn(shape, generator=gen(), dtype=torch.float64) + 3).requires_grad_()
        mean, var = _Moments.apply(x)  # type: ignore[misc]
        expected = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
        torch.testing.assert_close((var, mean), expected)
        assert torch.autograd.gradcheck(_Moments.apply, (x,))
