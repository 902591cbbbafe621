"""Selectors that rank channels by their own weights, and the random choice. They re-weight nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Tensor
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.selectors.base import Ranking, ranked


def lengths(layer: LayerWeights, p: float, bias: bool = False) -> Tensor:
    """‖w_i‖_p of the incoming weights, (n,); with or without the bias as one of them."""
    return torch.linalg.vector_norm(layer.incoming if bias else layer.weights, ord=p, dim=1)


def distances(layer: LayerWeights, bias: bool = False) -> Tensor:
    """Σ_k ‖w_i − w_k‖₂ over all channels k, (n,)."""
    rows = layer.incoming if bias else layer.weights
    return torch.cdist(rows, rows).sum(dim=1)


@dataclass(frozen=True)
class Magnitude:
    """Keep the channels whose incoming weights have the largest Lp norm. No sampling.

    p: which norm. bias: whether the bias counts as a weight.
    """

    p: float = 2.0
    bias: bool = False
    reads = False
    name = "magnitude"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002 (one signature)
        """Rank the units of one layer."""
        return ranked(self.name, lengths(layer, self.p, self.bias))


@dataclass(frozen=True)
class L1:
    """Keep the filters whose weights have the largest L1 norm (Li, Kadav, Durdanovic, Samet & Graf, ICLR 2017)."""

    bias: bool = False
    reads = False
    name = "l1"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002
        """Rank the units of one layer."""
        return ranked(self.name, lengths(layer, 1.0, self.bias))


@dataclass(frozen=True)
class L2:
    """Keep the filters whose weights have the largest L2 norm: `Magnitude()` by another name."""

    bias: bool = False
    reads = False
    name = "l2"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002
        """Rank the units of one layer."""
        return ranked(self.name, lengths(layer, 2.0, self.bias))


@dataclass(frozen=True)
class Fpgm:
    """Remove the filters nearest to the geometric median of the layer: those with the least Σ_k ‖w_i − w_k‖₂.

    He, Liu, Wang, Hu & Yang, CVPR 2019. The other filters can best replace one near the median.

    bias: whether the bias counts as a weight.
    """

    bias: bool = False
    reads = False
    name = "fpgm"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002
        """Rank the units of one layer."""
        return ranked(self.name, distances(layer, self.bias))


@dataclass(frozen=True)
class BnScale:
    """Keep the channels with the largest |γ| in the batch norm behind the layer (Liu et al., ICCV 2017).

    Their network slimming also trains with an L1 penalty on γ; here γ is taken as it is. If residual branches meet, the
    scores of their norms are added. If no norm with a scale follows, channels are ranked by the L2 norm of their
    weights, and the ranking's note says so.
    """

    reads = False
    name = "bn-scale"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002
        """Rank the units of one layer."""
        scales = [norm.scale.abs() for norm in layer.norms if "scale" in norm.names]
        if not scales:
            return ranked(self.name, lengths(layer, 2.0), "no batch norm directly behind the layer, so ranked as by l2")
        return ranked(self.name, torch.stack(scales).sum(dim=0))


@dataclass(frozen=True)
class Random:
    """Keep channels at random, each with the same probability, without re-weighting. (`Uniform` re-weights.)"""

    reads = False
    name = "random"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        n = len(layer.incoming)
        draws = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        return ranked(self.name, draws.to(layer.incoming.device))
