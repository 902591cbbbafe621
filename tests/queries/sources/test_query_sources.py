"""The sources that optimise nothing, against what their definitions promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import InputError
from coreprune.queries import Blobs, Leaves, Mixture, PinkNoise, PropagatedMoments, Strokes, Target, WhiteNoise
from coreprune.queries.sources.image_shape import guess_shape, levels
from queries.small import convnet, gen, mlp, none, seeded, target

RGB = target(convnet(), torch.zeros(1, 3, 32, 32))
GREY = target(convnet(1), torch.zeros(1, 1, 28, 28))
FLAT = target(mlp(784), torch.zeros(1, 784))
IMAGES = [PinkNoise(), Blobs(), Leaves(), Strokes()]


def slope(x: Tensor) -> float:
    """Exponent of the amplitude over the frequency, least squares between 2 and 12 periods an image."""
    power = torch.fft.fft2(x.double()).abs().square().mean(dim=(0, 1))
    f = torch.fft.fftfreq(x.shape[-1], dtype=torch.float64) * x.shape[-1]
    radius = torch.hypot(f[:, None], f[None, :])
    keep = (radius >= 2) & (radius <= 12)
    a = torch.stack([radius[keep].log(), torch.ones_like(radius[keep])], dim=1)
    return float(torch.linalg.lstsq(a, power[keep].sqrt().log()[:, None]).solution[0])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_pink_noise_has_its_spectrum(power: float) -> None:
    x = PinkNoise(power=power)(RGB, 200, gen(), none)
    assert slope(x) == pytest.approx(-power, abs=0.05)
    assert float(x.square().mean()) == pytest.approx(1, abs=1e-3)


def test_pink_noise_correlates_its_channels() -> None:
    x = PinkNoise(power=0.0, colour=0.7)(RGB, 100, gen(), none)
    found = torch.corrcoef(x.transpose(0, 1).flatten(1))
    assert torch.allclose(found, torch.eye(3) + 0.7 * (1 - torch.eye(3)), atol=0.02)


@pytest.mark.parametrize("shape", [(2, 40), (2, 6, 7, 8), (3, 24, 9)])
def test_pink_noise_of_any_dimension(shape: tuple[int, ...]) -> None:
    x = PinkNoise()(target(mlp(), torch.zeros(1, *shape)), 50, gen(), none)
    assert x.shape == (50, *shape)
    away = x.flatten(2).std(dim=-1).mean()
    assert float(x.diff(dim=-1).std()) < float(away) * math.sqrt(2) * 0.8  # neighbours are alike


def test_range() -> None:
    x = PinkNoise(low=0.0, high=1.0)(RGB, 50, gen(), none)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.03)
    for low, high in ((0.0, None), (1.0, 0.0), (0.0, math.nan)):
        with pytest.raises(InputError, match="pass both"):
            Leaves(low=low, high=high)(RGB, 2, gen(), none)


def test_blobs_cover_what_they_are_asked_to() -> None:
    for cover in (0.1, 0.4):
        x = Blobs(cover=cover, soft=0.01, low=0.0, high=1.0)(GREY, 40, gen(), none)
        assert float((x > 0.5).float().mean()) == pytest.approx(cover, abs=0.02)
    with pytest.raises(InputError, match="cover=0"):
        Blobs(cover=0.0)(GREY, 2, gen(), none)


def test_leaves_have_edges_that_gaussian_noise_lacks() -> None:
    """Natural images have heavy-tailed gradients; a Gaussian's kurtosis is 3."""

    def kurtosis(x: Tensor) -> float:
        d = x.diff(dim=-1).flatten()
        return float(d.pow(4).mean() / d.square().mean() ** 2)

    assert kurtosis(PinkNoise()(RGB, 64, gen(), none)) == pytest.approx(3, abs=0.2)
    x = Leaves()(RGB, 64, gen(), none)
    assert kurtosis(x) > 8
    assert slope(x) == pytest.approx(-1.3, abs=0.4)
    assert float(x.square().mean()) == pytest.approx(1, abs=1e-3)


def test_strokes_stay_inside_their_margin_and_vary() -> None:
    x = Strokes(margin=0.2, low=0.0, high=1.0)(GREY, 300, gen(), none)
    ink = x[:, 0] > 0.5
    edge = torch.ones(28, 28, dtype=torch.bool)
    edge[3:-3, 3:-3] = False  # margin of 5.6 pixels less a pen of 1.7 pixels
    assert not ink[:, edge].any()
    cover = ink.float().mean(dim=(1, 2))
    assert 0.05 < float(cover.mean()) < 0.3
    assert float(cover.std()) > 0.01
    assert len({tuple(image.flatten().tolist()) for image in ink}) > 290


def test_strokes_are_connected_lines_of_the_pens_width() -> None:
    """One stroke of a pen of radius r: every inked pixel lies within about 2r of the drawing's own pixels."""
    from scipy import ndimage

    pen = Strokes(count=(1, 1), radius=(0.05, 0.05), soft=0.001, low=0.0, high=1.0)
    for image in pen(GREY, 50, gen(), none)[:, 0]:
        ink = image.numpy() > 0.5
        assert ndimage.label(ink, structure=[[1, 1, 1]] * 3)[1] == 1
        assert ndimage.distance_transform_edt(ink).max() < 5  # no filled areas, but lines that cross


@pytest.mark.parametrize(
    "bad", [{"count": (0, 2)}, {"points": (3, 2)}, {"radius": (0.0, 0.1)}, {"margin": 0.5}, {"soft": 0.0}]
)
def test_impossible_pens(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Strokes(**bad)(GREY, 2, gen(), none)


def test_white_noise() -> None:
    x = WhiteNoise(mean=2.0, sd=3.0)(FLAT, 200, gen(), none)
    assert float(x.mean()) == pytest.approx(2, abs=0.03)
    assert float(x.std()) == pytest.approx(3, abs=0.03)


def test_propagated_moments_find_the_planted_directions() -> None:
    """First-layer weights: noise and multiples of inputs from three dimensions. Those get the variance."""
    basis = torch.linalg.qr(torch.randn(30, 3, generator=gen(1))).Q  # (30, 3)
    model = seeded(0, lambda: nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 2)))
    with torch.no_grad():
        learned = torch.randn(60, 3, generator=gen(3)) @ basis.T
        model[0].weight.copy_(0.1 * torch.randn(60, 30, generator=gen(2)) + learned)
    x = PropagatedMoments()(target(model, torch.zeros(1, 30)), 4000, gen(), none)
    inside = float((x @ basis).square().sum() / x.square().sum())
    assert inside > 0.85  # 0.1 for white noise
    assert float(x.square().mean()) == pytest.approx(1, abs=0.05)
    assert torch.linalg.matrix_rank(x.double().T @ x.double() / 4000, tol=1e-3) == 30


def test_propagated_moments_of_odd_layers() -> None:
    zero = mlp(6)
    nn.init.zeros_(zero[0].weight)
    x = PropagatedMoments()(target(zero, torch.zeros(1, 6)), 500, gen(), none)
    assert float(x.std()) == pytest.approx(1, abs=0.1)
    with pytest.raises(InputError, match="no linear layer"):
        PropagatedMoments()(RGB, 2, gen(), none)


def test_a_mixture_keeps_its_shares_in_random_order() -> None:
    mixed = Mixture((WhiteNoise(mean=100.0), WhiteNoise(mean=-100.0), WhiteNoise()), (2.0, 1.0, 1.0))
    x = mixed(FLAT, 10, gen(), none).mean(dim=1)
    assert (int((x > 50).sum()), int((x < -50).sum())) == (5, 3)
    assert len(Mixture((WhiteNoise(), PinkNoise()))(FLAT_SQUARE, 1, gen(), none)) == 1
    many = mixed(FLAT, 100, gen(), none).mean(dim=1)[:50]
    assert 15 <= int((many > 50).sum()) <= 35  # not sorted by source
    for weights in ((1.0,), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0)):
        with pytest.raises(InputError, match="one positive weight"):
            Mixture(mixed.sources, weights)(FLAT, 4, gen(), none)
    with pytest.raises(InputError, match="one positive weight"):
        Mixture(())(FLAT, 4, gen(), none)


def smooth_first_layer(channels: int, side: int) -> Target:
    d = channels * side * side
    model = mlp(d)
    x = PinkNoise(shape=(channels, side, side))(target(model, torch.zeros(1, d)), 10, gen(4), none)
    with torch.no_grad():
        model[0].weight.copy_(x)
    return target(model, torch.zeros(1, d))


FLAT_SQUARE = smooth_first_layer(1, 28)


def test_the_shape_of_flat_images_is_read_from_the_weights() -> None:
    assert guess_shape(FLAT_SQUARE) == (1, 28, 28)
    assert guess_shape(smooth_first_layer(3, 8)) == (3, 8, 8)
    assert guess_shape(FLAT) is None  # weights of an untrained layer
    shuffled = smooth_first_layer(1, 28)
    with torch.no_grad():
        shuffled.model[0].weight.copy_(shuffled.model[0].weight[:, torch.randperm(784, generator=gen())])
    assert guess_shape(shuffled) is None


@pytest.mark.parametrize("source", IMAGES, ids=lambda s: s.name)
def test_image_sources_take_images_and_flat_images(source: Any) -> None:
    assert source(RGB, 3, gen(), none).shape == (3, 3, 32, 32)
    assert source(FLAT_SQUARE, 3, gen(), none).shape == (3, 784)
    asked = type(source)(shape=(28, 28))
    assert asked(FLAT, 3, gen(), none).shape == (3, 784)
    with pytest.raises(InputError, match="do not look like images"):
        source(FLAT, 3, gen(), none)
    with pytest.raises(InputError, match="does not hold the 784 numbers"):
        type(source)(shape=(28, 27))(FLAT, 3, gen(), none)


@pytest.mark.parametrize("source", [*IMAGES, WhiteNoise()], ids=lambda s: s.name)
def test_dtype_and_reproducibility(source: Any) -> None:
    half = target(convnet(), torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16))
    x = source(half, 4, gen(3), none)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, source(half, 4, gen(3), none))
    assert not torch.equal(x, source(half, 4, gen(4), none))


def test_levels() -> None:
    assert levels(FLAT, None, None) == (-0.42, 2.38)
    assert levels(FLAT, -1.0, None) == (-1.0, 2.38)
    ink = torch.zeros(1, 784)
    ink[0, :50] = torch.linspace(0.1, 1, 50)
    assert levels(target(mlp(784), ink), None, None) == (0.0, 1.0)
    assert levels(target(mlp(784), 1 - ink), None, None) == (1.0, 0.0)  # dark on light
    assert levels(target(mlp(784), torch.rand(1, 784, generator=gen())), None, None) == (-0.42, 2.38)
    with pytest.raises(InputError, match="background and ink"):
        levels(FLAT, 1.0, 1.0)


@pytest.mark.data
@pytest.mark.slow
def test_what_is_fitted_on_queries_holds_on_mnist(data_dir: Any) -> None:
    """What queries are for: 30 hidden neurons, chosen and fitted to stand in for all 300, are then used on real digits.

    The share of the real variance that they miss is smallest with real digits; drawings come closer than noise.
    """
    import numpy as np
    from safetensors.torch import load_file

    from coreprune.queries import make_queries

    weights = load_file(data_dir / "lenet300_mnist.safetensors")
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    model.load_state_dict(weights)

    def covariance(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cov(model[:2](x).double().T)

    def missed(k: Tensor, real: Tensor) -> float:
        """Greedy pivots of k, least squares on k (a little ridge), residual variance under the real covariance."""
        k = k + 1e-4 * k.diagonal().mean() * torch.eye(300, dtype=torch.float64)
        rest, kept = k.clone(), []
        for _ in range(30):
            gain = rest.square().sum(dim=1) / rest.diagonal().clamp_min(1e-12)
            gain[kept] = -1
            i = int(gain.argmax())
            kept.append(i)
            rest = rest - torch.outer(rest[:, i], rest[i]) / rest[i, i]
        fit = torch.linalg.solve(k[kept][:, kept], k[kept]).T  # (300, 30)
        off = torch.eye(300, dtype=torch.float64)
        off[:, kept] -= fit
        return float((off @ real @ off.T).trace() / real.trace())

    images = torch.from_numpy(np.load(data_dir / "mnist.npz")["test_images"]).float().flatten(1)
    real = covariance((images / 255 - 0.1307) / 0.3081)
    found = {"real": missed(real, real)}
    for spec in ("auto", "propagated-moments", "white-noise"):
        queries = make_queries(model, torch.zeros(1, 784), spec, n=2000, seed=0)
        found[spec] = missed(covariance(queries.args[0]), real)
    assert found["real"] < found["auto"] < 0.8 * found["white-noise"]
    assert found["auto"] < found["propagated-moments"] < found["white-noise"]
