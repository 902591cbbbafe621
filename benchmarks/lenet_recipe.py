"""Three epochs of fine-tuning for a pruned LeNet-300-100: the recipe of `lenet_mnist.py`.

Settings were chosen on 5,000 held-out training images (with a dense model trained on the other 55,000, because the
given one has memorised all of them). Each epoch shows 60,000 images once, slightly warped; labels and the dense model's
softened answers count the same; in the first 70 % of the steps a throw-away linear head also has to recover the dense
model's second pre-activation from the pruned first layer (FitNets, Romero et al. 2015).
The optimiser is Adam in the eigenbasis of Shampoo's statistics (SOAP, Vyas et al. 2024); the weights are averaged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 28


@dataclass(frozen=True)
class Recipe:
    """lr is the peak of a triangular schedule, multipliers are per layer, `hint_until` is a share of all steps."""

    epochs: int = 3
    batch_size: int = 64
    lr: float = 9e-3
    multipliers: tuple[float, float, float] = (0.75, 1.5, 1.5)
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.995)
    soft_labels: float = 0.5
    hint_until: float = 0.7
    warm_up: float = 0.15
    averaging: float = 0.995


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """A fresh small rotation, scaling, shear, shift and elastic wave for every flattened image (n, 784)."""
    n, background = len(images), images.min()

    def uniform(size: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * size

    angle, shear = uniform(math.radians(8.0)), uniform(0.08)
    width, height = 1 + uniform(0.08), 1 + uniform(0.08)
    right, down = uniform(1.4 / SIDE), uniform(1.4 / SIDE)  # 0.7 pixels
    rows = [
        torch.stack([width * angle.cos(), shear - height * angle.sin(), right], dim=1),
        torch.stack([width * angle.sin(), height * angle.cos(), down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [n, 1, SIDE, SIDE], align_corners=False)
    wave = torch.randn(n, 2, 4, 4, generator=generator) * (1.2 / SIDE)
    grid = grid + F.interpolate(wave, size=(SIDE, SIDE), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    shifted = (images - background).view(n, 1, SIDE, SIDE)
    return F.grid_sample(shifted, grid, align_corners=False).view(n, -1) + background


def fine_tune(student: nn.Sequential, dense: nn.Sequential, images: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """A fine-tuned copy of `student`. images (N, 784) normalised, labels (N,) int64."""
    recipe, generator = Recipe(), torch.Generator().manual_seed(seed)
    net = copy.deepcopy(student)
    first, second, third = (m for m in net if isinstance(m, nn.Linear))
    hidden = dense[:3]  # up to the second pre-activation
    with torch.no_grad():
        sample = images[torch.randperm(len(images), generator=generator)[:5000]]
        wanted = hidden(sample)
        mean, deviation = wanted.mean(dim=0), wanted.std(dim=0) + 1e-6
        head = _ridge_head(first(sample).relu(), (wanted - mean) / deviation)
    layers = (first, second, third, head)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    rates = [rate for rate in (*recipe.multipliers, 1.0) for _ in range(2)]
    soap = Soap(parameters, rates, recipe.betas, recipe.weight_decay)
    average = [p.detach().clone() for p in parameters]

    batches = len(images) // recipe.batch_size
    total, step = recipe.epochs * batches, 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        shown, soft, hints = _epoch(images[order], dense, hidden, generator)
        hints = (hints - mean) / deviation
        for k in range(batches):
            rows, share = slice(k * recipe.batch_size, (k + 1) * recipe.batch_size), step / total
            features = first(shown[rows]).relu()
            answers = third(second(features).relu()).log_softmax(dim=1)
            hard = F.nll_loss(answers, labels[order[rows]])
            loss = (1 - recipe.soft_labels) * hard - recipe.soft_labels * (soft[rows] * answers).sum(dim=1).mean()
            loss = loss + max(0.0, 1 - share / recipe.hint_until) * F.mse_loss(head(features), hints[rows])
            gradients = torch.autograd.grad(loss, parameters)
            up, down = share / recipe.warm_up, (1 - share) / (1 - recipe.warm_up)
            soap.step(gradients, recipe.lr * min(up, down))
            step += 1
            with torch.no_grad():
                for mean_p, p in zip(average, parameters, strict=True):
                    mean_p.lerp_(p, 1 - min(recipe.averaging, step / (9 + step)))
    with torch.no_grad():
        for mean_p, p in zip(average, parameters, strict=True):
            p.copy_(mean_p)
    return net


def _ridge_head(features: Tensor, wanted: Tensor) -> nn.Linear:
    """Least squares from features to wanted, ridge 1 % of the mean diagonal."""
    centred, goal = features - features.mean(dim=0), wanted - wanted.mean(dim=0)
    covariance = centred.T @ centred / len(features)
    ridge = 1e-2 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + ridge, centred.T @ goal / len(features)).T
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])  # leaves the global generator alone
    head.weight.copy_(weight)
    head.bias.copy_(wanted.mean(dim=0) - weight @ features.mean(dim=0))
    return head


@torch.no_grad()
def _epoch(
    images: Tensor, dense: nn.Sequential, hidden: Callable[[Tensor], Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Every image warped once, with the dense model's probabilities and second pre-activations."""
    shown = torch.cat([warp(part, generator) for part in images.split(2000)])
    hints = torch.cat([hidden(part) for part in shown.split(4000)])
    return shown, dense[3:](hints).softmax(dim=1), hints


@dataclass
class Soap:
    """Adam in the eigenbasis of Shampoo's statistics; the basis is renewed every tenth step.

    The input side of the widest layer (784 pixels) keeps the standard basis.
    """

    parameters: list[Tensor]
    rates: list[float]
    betas: tuple[float, float]
    weight_decay: float
    every: int = 10
    steps: int = 0
    state: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = [{"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], lr: float) -> None:
        """One update of all parameters."""
        self.steps += 1
        b1, b2 = self.betas
        for p, g, rate, s in zip(self.parameters, gradients, self.rates, self.state, strict=True):
            s["m"].lerp_(g, 1 - b1)
            left, right = self._bases(s, g) if g.ndim == 2 else (None, None)
            g_rotated, m_rotated = (_rotate(x, left, right) for x in (g, s["m"]))
            s["v"].mul_(b2).addcmul_(g_rotated, g_rotated, value=1 - b2)
            scale = (s["v"] / (1 - b2**self.steps)).sqrt() + 1e-8
            update = _rotate(m_rotated / (1 - b1**self.steps) / scale, _t(left), _t(right))
            if p.ndim == 2:
                update = update + self.weight_decay * p
            p.sub_(lr * rate * update)

    def _bases(self, s: dict[str, Tensor], g: Tensor) -> tuple[Tensor, Tensor | None]:
        b2 = self.betas[1]
        sides = {"left": g @ g.T}
        if g.shape[1] < 784:
            sides["right"] = g.T @ g
        for side, moment in sides.items():
            s[side] = (1 - b2) * moment + b2 * s.get(side, torch.zeros_like(moment))
            if self.steps == 1 or self.steps % self.every == 0:
                s[side + "-basis"] = torch.linalg.eigh(s[side]).eigenvectors
        return s["left-basis"].T, s.get("right-basis")


def _rotate(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    x = x if left is None else left @ x
    return x if right is None else x @ right


def _t(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.T
