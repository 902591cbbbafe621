"""Layers whose weight is computed from other tensors."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize


class Standardised(nn.Conv2d):
    """Weight standardisation, written out."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return self._conv_forward(x, w, self.bias)


class Scaled(nn.Conv2d):
    """Weight standardisation by a batch norm, with a gain, as in networks without normalisation."""

    def __init__(self, *args: int, **more: int) -> None:
        super().__init__(*args, **more)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Silent(Scaled):
    """The last layer of a branch before training: its gain is zero."""

    def __init__(self, *args: int, **more: int) -> None:
        super().__init__(*args, **more)
        nn.init.zeros_(self.gain)


class Centred(nn.Linear):
    """Rows without a mean."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, bias=self.bias, weight=self.weight - self.weight.mean(1, keepdim=True))


class Masked(nn.Linear):
    """Connections that are switched off: a factor on single entries."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("mask", (torch.arange(n_in * n_out).reshape(n_out, n_in) % 3 > 0).to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Padded(Standardised):
    """A layer that also does something to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return utils.weight_norm(layer)


def with_parametrization(layer: nn.Module, what: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", what)


def twice(layer: nn.Module) -> nn.Module:
    """Two parametrizations on one tensor, and one on another."""
    parametrizations.spectral_norm(with_parametrization(layer, nn.Tanh()))
    return parametrize.register_parametrization(layer, "bias", nn.Tanh())


MAKE = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 12, 3)),
    "weight norm over the other axis": lambda: parametrizations.weight_norm(nn.Conv2d(8, 12, 3), dim=1),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 12, 3)),
    "transposed": lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(8, 12, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(8, 12, 1)),
    "old weight norm": lambda: old_weight_norm(nn.Conv2d(8, 12, 3)),
    "old spectral norm": lambda: utils.spectral_norm(nn.Conv2d(8, 12, 3)),
    "somebody's own": lambda: with_parametrization(nn.Conv2d(8, 12, 3), Symmetric()),
    "several": lambda: twice(nn.Conv2d(8, 12, 3)),
    "standardised": lambda: Standardised(8, 12, 3, stride=2),
    "standardised, in groups": lambda: Standardised(8, 12, 3, groups=2),
    "scaled": lambda: Scaled(8, 12, 3, padding=1),
    "scaled, without a bias": lambda: Scaled(8, 12, 3, bias=False),
    "with a gain of zero": lambda: Silent(8, 12, 3),
}
