"""Certificates for one pruned layer (T6, T7, T8)."""

from __future__ import annotations

import math

import torch

from coreprune.coreset import Certificate, Coreset, merge_bound, sampling_bound
from coreprune.pruning.selectors import LayerWeights, Ranking


def certificates(layer: LayerWeights, ranking: Ranking, coreset: Coreset, delta: float) -> tuple[Certificate, ...]:
    """What can be said about F' − F of this layer's consumers, for every input.

    T6 for sampled coresets (1−δ over the draws), T8 for any coreset if the activation is positively homogeneous and
    1-Lipschitz. Empty where the activation is not known to satisfy a theorem's assumptions.
    """
    phi = layer.activation
    found = []
    if not phi.zero or math.isinf(phi.lipschitz):
        return ()
    if ranking.stream is not None and coreset.draws:
        points, outgoing = layer.incoming, layer.outgoing
        if coreset.negative_weights is not None:  # two items per channel, one for each sign of the outgoing weight
            points = torch.cat([points, points])
            outgoing = torch.cat([outgoing.clamp(min=0), outgoing.clamp(max=0)], dim=1)
        bound = sampling_bound(
            points,
            outgoing,
            coreset.draws,
            delta,
            metric="lewis" if ranking.method == "lewis" else "euclidean",
            probabilities=None if ranking.method == "lewis" else ranking.stream.probabilities,
            lipschitz=phi.lipschitz,
            homogeneous=phi.homogeneous,
            stopped=True,
        )
        found.append(bound)
    if phi.homogeneous and phi.lipschitz <= 1:
        found.append(merge_bound(layer.incoming, layer.outgoing, coreset))
    return tuple(found)
