"""Coresets of a layer's channels, and their certificates. Functions take tensors and return tensors."""

from coreprune.coreset.agreement import agreement_bound
from coreprune.coreset.authors import authors_importance
from coreprune.coreset.bounds import (
    Certificate,
    RelativeLimit,
    importance,
    merge,
    merge_bound,
    merged_outgoing,
    relative_limit,
    sampling_bound,
)
from coreprune.coreset.cone import cone_sensitivities
from coreprune.coreset.divergence import divergence_bounds, divergence_noise, kl_divergence, variance_under
from coreprune.coreset.exchange import exchanged, swap_changes
from coreprune.coreset.functional import (
    FunctionalCoreset,
    Moments,
    d_optimal,
    function_space_ratio,
    functional_coreset,
    functional_order,
    in_order,
    unit_floor,
)
from coreprune.coreset.gaussian import relu_moments
from coreprune.coreset.held_out import Fold, held_out_curve
from coreprune.coreset.linf import LinfCoreset, linf_coreset
from coreprune.coreset.merging import Merge
from coreprune.coreset.patches import Patches, map_errors
from coreprune.coreset.products import bilinear_map
from coreprune.coreset.sampling import Coreset, DrawStream, draw_stream, from_stream, sample
from coreprune.coreset.sensitivity import Sensitivities, peel, sensitivities, spectral_ridge

__all__ = [
    "Certificate",
    "Coreset",
    "DrawStream",
    "Fold",
    "FunctionalCoreset",
    "LinfCoreset",
    "Merge",
    "Moments",
    "Patches",
    "RelativeLimit",
    "Sensitivities",
    "agreement_bound",
    "authors_importance",
    "bilinear_map",
    "cone_sensitivities",
    "d_optimal",
    "divergence_bounds",
    "divergence_noise",
    "draw_stream",
    "exchanged",
    "from_stream",
    "function_space_ratio",
    "functional_coreset",
    "functional_order",
    "held_out_curve",
    "importance",
    "in_order",
    "kl_divergence",
    "linf_coreset",
    "map_errors",
    "merge",
    "merge_bound",
    "merged_outgoing",
    "peel",
    "relative_limit",
    "relu_moments",
    "sample",
    "sampling_bound",
    "sensitivities",
    "spectral_ridge",
    "swap_changes",
    "unit_floor",
    "variance_under",
]
