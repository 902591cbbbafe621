"""Convex geometry on point clouds. Functions take tensors and return tensors, and compute in float64."""

from coreprune.geometry.clustering import Clusters, kmeans
from coreprune.geometry.convex_combination import Combination, caratheodory, caratheodory_many
from coreprune.geometry.ellipsoid import Ellipsoid, Status, mvee
from coreprune.geometry.lewis import leverage_scores, lewis_weights
from coreprune.geometry.recombination import recombine
from coreprune.geometry.subspace import Span, span

__all__ = [
    "Clusters",
    "Combination",
    "Ellipsoid",
    "Span",
    "Status",
    "caratheodory",
    "caratheodory_many",
    "kmeans",
    "leverage_scores",
    "lewis_weights",
    "mvee",
    "recombine",
    "span",
]
