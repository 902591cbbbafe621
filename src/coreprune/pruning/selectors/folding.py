"""Model folding: channels are clustered, and the mean of each cluster becomes one channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset import Coreset, Merge
from coreprune.errors import InputError
from coreprune.geometry import kmeans
from coreprune.pruning.layer.weights import LayerWeights, NormStatistics
from coreprune.pruning.selectors.base import Ranking, ranked
from coreprune.pruning.selectors.norms import lengths

# Bounds the repair's gain to 1000 √N where the directions of a cluster cancel out.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Folding:
    """Cluster the channels with k-means. The mean of a cluster makes the new channel, and its outgoing weights add up.

    Wang, Šikić, Thiele & Saukh, *Forget the Data and Fine-Tuning! Just Fold the Network to Compress*, ICLR 2025. With
    U (n, k) the 0/1 matrix of the clusters, the rows that make the channels become (UᵀU)⁻¹UᵀW, which stand for C W with
    C = U(UᵀU)⁻¹Uᵀ. The columns of the layers that read them become V U.

    Each channel is clustered by one row of numbers (`rows`): the layer's weights and bias, normalised as the batch norm
    does it, w/σ and (b − μ)/σ; γ and β of the norm; the channel's other parameters (depthwise filters, scales); and,
    with `outgoing`, the weights that read it. Residual branches that meet are clustered together.

    Repair (Fold-AR, without data). The mean of N normalised channels with mean correlation E has variance
    (1 + (N − 1) E)/N. That is less than 1, so every layer would shrink the signal a little more. So γ is multiplied by

        g = √(N / (1 + (N − 1) E)),   E = mean cosine of the weights w_i, w_j over the pairs i ≠ j of the cluster,

    which is exact for inputs whose covariance is proportional to the identity. For this, means are taken of normalised
    weights: w/σ, b/σ and μ/σ, each times the σ of the channel that stays. Every norm directly behind a layer of the
    group gets its own g. Other norms (behind a depthwise filter) are averaged as they are. 1 + (N − 1)E is kept above
    1e-6.

    repair: False averages weights, γ, β, μ and σ² as they are.
    outgoing: whether the weights that read the channels count in the clustering, as in the paper.
    restarts: how often k-means starts anew; the best result counts.

    The channel nearest to the centre of its cluster stays, and the mean is written into its place. Some channels cannot
    be folded, such as heads, and sections that see different inputs. They are removed by their L2 norm, and the
    ranking's note says why.
    """

    repair: bool = True
    outgoing: bool = True
    restarts: int = 10
    reads = False
    name = "folding"

    def __post_init__(self) -> None:
        """Refuse options that mean nothing."""
        if isinstance(self.restarts, bool) or not isinstance(self.restarts, int) or self.restarts < 1:
            raise InputError(f"restarts must be a whole number ≥ 1, but it is {self.restarts!r}.")

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        scores = lengths(layer, 2.0)
        if layer.no_mean:
            return ranked(self.name, scores, f"by l2, nothing folded: {layer.no_mean}")
        points = rows(layer, self.outgoing)
        # One seed per layer, so that a width has the same clusters whichever widths were asked for before.
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))

        def rule(k: int) -> Coreset:
            labels = kmeans(points, k, torch.Generator().manual_seed(seed), restarts=self.restarts).labels
            target = representatives(points, labels)
            gains = {}
            for norm in layer.norms if self.repair else ():
                gains.update(gains_of(norm, layer.incoming[:, slice(*norm.columns)], target))
            kept = (target == torch.arange(len(target), device=target.device)).nonzero()[:, 0]
            ones = torch.ones(len(target), dtype=torch.float64, device=target.device)
            return Coreset(kept, ones[:k], merge=Merge(target, ones, mean=True, gains=gains))

        note = "clusters averaged" + (", variance repaired" if self.repair and layer.norms else "")
        return ranked(self.name, scores, note, rule=rule)


def rows(layer: LayerWeights, outgoing: bool = True) -> Float[Tensor, "n w"]:
    """The row of numbers by which k-means sees each channel; see `Folding`."""
    incoming = layer.incoming.clone()
    columns = []
    for norm in layer.norms:
        incoming[:, slice(*norm.columns)] /= norm.deviation[:, None]
        incoming[:, -1] += (norm.bias - norm.mean) / norm.deviation - norm.bias
        columns += [norm.scale[:, None], norm.shift[:, None]]
    columns = [incoming, *columns] if layer.others is None else [incoming, *columns, layer.others]
    return torch.cat([*columns, layer.outgoing.mT] if outgoing else columns, dim=1)


def representatives(points: Float[Tensor, "n w"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """For every channel, the member of its cluster that is nearest to the cluster's mean; the first of equals."""
    k = int(labels.max()) + 1
    count = labels.bincount(minlength=k).to(points)
    centres = points.new_zeros(k, points.shape[1]).index_add_(0, labels, points) / count[:, None]
    away = (points - centres[labels]).norm(dim=1)
    nearest = [int(torch.where(labels == c, away, torch.inf).argmin()) for c in range(k)]
    return torch.tensor(nearest, device=labels.device)[labels]


def gains_of(
    norm: NormStatistics, weights: Float[Tensor, "n w"], target: Int[Tensor, " n"]
) -> dict[str, Float[Tensor, " n"]]:
    """`Merge.gains` of one norm and its layer: all members get the σ of the channel that stays, and the repair's gain.

    weights: (n, w) of the layer in front of the norm. A channel alone in its cluster is left as it is.
    """
    n = len(target)
    count = target.bincount(minlength=n).to(weights)
    unit = weights / weights.norm(dim=1).clamp(min=1e-300)[:, None]
    # ‖Σ u_i‖² = N + N(N−1)E, so N/(1 + (N−1)E) = N²/‖Σ u_i‖².
    summed = weights.new_zeros(weights.shape).index_add_(0, target, unit).square().sum(dim=1)
    variance = (summed / count.clamp(min=1)).clamp(min=_LEAST_VARIANCE)  # 1 + (N−1)E
    repair = torch.where(count > 1, (count / variance).sqrt(), 1.0)[target]
    level = (norm.deviation[target] / norm.deviation).clone()
    level[target] = 1.0
    # The variance becomes that of the channel that stays: the mean over N of N times it, and 0 times the others.
    stays = target == torch.arange(n, device=target.device)
    found = {"variance": torch.where(stays, count, 0.0), "mean": level, "weight": level, "bias": level}
    if "scale" in norm.names:
        found["scale"] = repair
    else:  # no γ to scale: then the layer and the mean are
        found |= {key: level * repair for key in ("weight", "bias", "mean")}
    return {norm.names[key]: value for key, value in found.items() if key in norm.names}
