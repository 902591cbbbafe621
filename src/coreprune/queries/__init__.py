"""Where inputs come from when there is no data.

    queries = make_queries(model, example_inputs, "auto", generator=torch.Generator().manual_seed(0))
    for args, kwargs in queries.batches(64):
        model(*args, **kwargs)

`QUERIES` lists the sources by name; each is a frozen dataclass whose fields are its options. The user's own unlabelled
samples go the same way.
"""

from coreprune.queries.make import QUERIES, make_queries
from coreprune.queries.queries import Queries
from coreprune.queries.sources.base import Source, Target
from coreprune.queries.sources.batch_norm_inversion import BatchNormInversion, invert
from coreprune.queries.sources.class_impressions import ClassImpressions
from coreprune.queries.sources.dead_leaves import Leaves
from coreprune.queries.sources.mixture import Mixture
from coreprune.queries.sources.noise import Blobs, PinkNoise, WhiteNoise
from coreprune.queries.sources.propagated_moments import PropagatedMoments
from coreprune.queries.sources.strokes import Strokes
from coreprune.queries.sources.tokens import RandomTokens, SelfGenerated, ZipfTokens

__all__ = [
    "QUERIES",
    "BatchNormInversion",
    "Blobs",
    "ClassImpressions",
    "Leaves",
    "Mixture",
    "PinkNoise",
    "PropagatedMoments",
    "Queries",
    "RandomTokens",
    "SelfGenerated",
    "Source",
    "Strokes",
    "Target",
    "WhiteNoise",
    "ZipfTokens",
    "invert",
    "make_queries",
]
