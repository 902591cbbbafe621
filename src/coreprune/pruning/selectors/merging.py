"""Neuron merging: every removed channel is added to the kept one that is most like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset import Coreset, Merge
from coreprune.errors import InputError
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.selectors.base import Ranking, ranked
from coreprune.pruning.selectors.norms import distances, lengths


@dataclass(frozen=True)
class Merging:
    """Rank channels by their weights, and add every removed one, scaled, to the kept one that is most like it.

    Kim, Kim, Park & Jeon, *Neuron Merging: Compensating for Pruned Neurons*, NeurIPS 2020. The layer's weights are
    decomposed into W ≈ Z W_S, with Z ≥ 0 and one entry for each removed channel. If the activation is positively
    homogeneous, Z passes through it into the layers that read the channels: V'_jk = V_jk + Σ_{i→k} S_i V_ji
    (`decompose`).

    Without a norm, k is the kept channel with the largest cosine to i (weights and bias together), S_i = ‖w_i‖/‖w_k‖.
    Behind a batch norm, w_i = s w_k makes channel i equal S·(channel k) + B before the activation, with

        S = s (γ_i/γ_k)(σ_k/σ_i),   B = β_i − γ_i μ_i/σ_i − S (β_k − γ_k μ_k/σ_k),   s = ‖w_i‖/‖w_k‖,

    and k minimises λ·(1 − cosine) + (1 − λ)·(|B|/S, scaled to [0, 1] over the kept channels). A channel whose cosine to
    the chosen one is below t is dropped.

    This deviates from the paper in two ways. First, everything is computed on the weights with the norm folded in
    (γw/σ and its bias), where |S| is a ratio of norms, and B a difference of biases. If γ has opposite signs in the two
    channels, then S < 0, and a ReLU lets nothing through. The cosine of the folded weights then has the other sign, so
    that such a pair is not taken for a similar one. Second, S is as derived above. The authors' script exchanges γ and
    σ of i and k, and then proportional filters are not merged without loss. If several layers meet in a residual sum,
    their weights are put side by side.

    by: what keeps a channel: its L1 norm ("l1"), its L2 norm ("l2"), or its distance to the others ("gm", as in
        `Fpgm`). Without a norm the bias counts as a weight, as in the paper.
    threshold: t. None takes the paper's values, 0.45 without a norm and 0.1 behind one.
    balance: λ.

    Some channels cannot be merged: those of heads, sections and gates, and those in front of an activation that is not
    positively homogeneous. They are removed without merging, and the ranking's note says why.
    """

    by: Literal["l1", "l2", "gm"] = "l1"
    threshold: float | None = None
    balance: float = 0.85
    reads = False
    name = "merging"

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        if self.by not in ("l1", "l2", "gm"):
            raise InputError(f"unknown criterion {self.by!r}; known: l1, l2, gm.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"threshold is a cosine between 0 and 1, but it is {self.threshold!r}.")
        if not 0 <= self.balance <= 1:
            raise InputError(f"balance lies between 0 (bias only) and 1 (cosine only), but it is {self.balance!r}.")

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002 (one signature)
        """Rank the units of one layer."""
        bias = not layer.norms
        scores = distances(layer, bias) if self.by == "gm" else lengths(layer, 1.0 if self.by == "l1" else 2.0, bias)
        if layer.no_scale:
            return ranked(self.name, scores, f"by {self.by}, nothing merged: {layer.no_scale}")
        order = torch.argsort(scores, descending=True, stable=True)

        def rule(k: int) -> Coreset:
            kept = order[:k].sort().values
            target, scale = decompose(layer, kept, self.threshold, self.balance)
            ones = torch.ones(k, dtype=torch.float64, device=kept.device)
            return Coreset(kept, ones, merge=Merge(target, scale))

        return ranked(self.name, scores, f"by {self.by}, removed channels merged", rule=rule)


def decompose(
    layer: LayerWeights, kept: Int[Tensor, " k"], threshold: float | None = None, balance: float = 0.85
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Into which channel every channel goes, and with which scale: `Merge.target` and `Merge.scale`. See `Merging`."""
    rows = layer.effective
    weights = rows[:, : rows.shape[1] - layer.bias_columns] if layer.norms else rows
    size = weights.norm(dim=1)
    unit = weights / size.clamp(min=1e-300)[:, None]
    cosine = unit @ unit[kept].mT  # (n, k)
    scale = size[:, None] / size[kept].clamp(min=1e-300)
    if layer.norms:
        bias = rows[:, -1]
        loose = (bias[:, None] - scale * bias[kept]).abs() / scale.clamp(min=1e-300)
        score = balance * (1 - cosine) + (1 - balance) * _unit_range(loose, usable=size[kept] > 0)
    else:
        score = 1 - cosine
    score = torch.where(size[kept] > 0, score, torch.inf)  # a kept channel with no weights stands for nothing
    best = score.argmin(dim=1)
    rank = torch.arange(len(rows), device=rows.device)
    if threshold is None:
        threshold = 0.1 if layer.norms else 0.45
    merged = (cosine[rank, best] >= threshold) & (cosine[rank, best] > 0)
    target = torch.where(merged, kept[best], -1)
    factor = torch.where(merged, scale[rank, best], 0.0)
    target[kept], factor[kept] = kept, 1.0
    return target, factor


def _unit_range(values: Tensor, usable: Tensor) -> Tensor:
    """Shift and scale every row to [0, 1] over its usable columns; 0 where all of them are equal."""
    low = torch.where(usable, values, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(usable, values, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low), 0.0)
