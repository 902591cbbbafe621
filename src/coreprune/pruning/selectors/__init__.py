"""Selectors: which units of a layer stay. `base` has the interface, `lookup` the names, `own` what users write."""

from __future__ import annotations

from coreprune.pruning.layer.weights import LayerWeights, NormStatistics, Reader
from coreprune.pruning.selectors.base import Ranking, Selector, ranked
from coreprune.pruning.selectors.checks import ranking_of
from coreprune.pruning.selectors.folding import Folding
from coreprune.pruning.selectors.functional import DOptimal, Functional
from coreprune.pruning.selectors.lookup import SELECTORS, Method, resolve
from coreprune.pruning.selectors.merging import Merging
from coreprune.pruning.selectors.norms import L1, L2, BnScale, Fpgm, Magnitude, Random
from coreprune.pruning.selectors.own import Own
from coreprune.pruning.selectors.pfp import Pfp
from coreprune.pruning.selectors.sampling import Cone, Lewis, Loewner, Mussay, Norm, Uniform, sampled

__all__ = [
    "L1",
    "L2",
    "SELECTORS",
    "BnScale",
    "Cone",
    "DOptimal",
    "Folding",
    "Fpgm",
    "Functional",
    "LayerWeights",
    "Lewis",
    "Loewner",
    "Magnitude",
    "Merging",
    "Method",
    "Mussay",
    "Norm",
    "NormStatistics",
    "Own",
    "Pfp",
    "Random",
    "Ranking",
    "Reader",
    "Selector",
    "Uniform",
    "ranked",
    "ranking_of",
    "resolve",
    "sampled",
]
