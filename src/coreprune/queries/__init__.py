"""Inputs for a model whose data is missing.

    queries = make_queries(model, example_inputs, "auto", seed=0)
    for args, kwargs in queries.batches(64):
        model(*args, **kwargs)

`QUERIES` maps names to sources. A source is a frozen dataclass, and its fields are its options. Instead of a source you
can pass a function (n, generator) that returns n inputs, or unlabelled samples. Other packages can register sources in
the entry-point group `coreprune.queries`.
"""

from coreprune.queries.make import make_queries
from coreprune.queries.queries import Queries
from coreprune.queries.sources.base import Source, Target
from coreprune.queries.sources.batch_norm_inversion import BatchNormInversion, invert
from coreprune.queries.sources.class_impressions import ClassImpressions
from coreprune.queries.sources.dead_leaves import Leaves
from coreprune.queries.sources.mixture import Mixture
from coreprune.queries.sources.noise import Blobs, PinkNoise, WhiteNoise
from coreprune.queries.sources.propagated_moments import PropagatedMoments
from coreprune.queries.sources.self_generated import SelfGenerated
from coreprune.queries.sources.strokes import Strokes
from coreprune.queries.sources.text import MachineText
from coreprune.queries.sources.token_mixture import MadeTokens, TokenMixture
from coreprune.queries.sources.tokens import RandomTokens, ZipfTokens
from coreprune.queries.spec import QUERIES

__all__ = [
    "QUERIES",
    "BatchNormInversion",
    "Blobs",
    "ClassImpressions",
    "Leaves",
    "MachineText",
    "MadeTokens",
    "Mixture",
    "PinkNoise",
    "PropagatedMoments",
    "Queries",
    "RandomTokens",
    "SelfGenerated",
    "Source",
    "Strokes",
    "Target",
    "TokenMixture",
    "WhiteNoise",
    "ZipfTokens",
    "invert",
    "make_queries",
]
