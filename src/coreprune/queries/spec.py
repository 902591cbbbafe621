"""What `queries=` takes: the name of a source, a source, a function, samples, or queries made before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from coreprune._plugins import Registry, imported
from coreprune.errors import InputError
from coreprune.queries.queries import Queries
from coreprune.queries.samples import is_samples
from coreprune.queries.sources.base import Source
from coreprune.queries.sources.batch_norm_inversion import BatchNormInversion
from coreprune.queries.sources.class_impressions import ClassImpressions
from coreprune.queries.sources.dead_leaves import Leaves
from coreprune.queries.sources.function import as_source
from coreprune.queries.sources.noise import Blobs, PinkNoise, WhiteNoise
from coreprune.queries.sources.propagated_moments import PropagatedMoments
from coreprune.queries.sources.self_generated import SelfGenerated
from coreprune.queries.sources.strokes import Strokes
from coreprune.queries.sources.text import MachineText
from coreprune.queries.sources.token_mixture import MadeTokens, TokenMixture
from coreprune.queries.sources.tokens import RandomTokens, ZipfTokens

_OURS = (
    BatchNormInversion,
    Leaves,
    PinkNoise,
    Blobs,
    Strokes,
    ClassImpressions,
    WhiteNoise,
    PropagatedMoments,
    RandomTokens,
    ZipfTokens,
    SelfGenerated,
    MachineText,
    MadeTokens,
    TokenMixture,
)
# Registered ones are a function (n, generator), a Source, or a class of sources.
QUERIES: Registry[Source] = Registry(
    "coreprune.queries",
    {source.name: source for source in _OURS},
    lambda name, found: as_source(found, name),
)
_REFERENCE = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def resolve(spec: Any) -> Source | Queries | Any:
    """Turn what `queries=` takes into a source, `Queries`, or samples as they are. None for "auto".

    Raises InputError for anything else.
    """
    if isinstance(spec, str):
        if spec == "auto":
            return None
        if spec in QUERIES:
            return QUERIES[spec]()
        if is_reference(spec):
            return as_source(imported(spec))
    if isinstance(spec, (str, Path)) and str(spec).endswith(".safetensors"):
        return Queries.load(spec)
    if isinstance(spec, type):
        raise InputError(f"queries is the class {spec.__name__}; pass an object of it: {spec.__name__}().")
    if isinstance(spec, Queries) or is_samples(spec):
        return spec
    if not isinstance(spec, str) and callable(spec):
        return as_source(spec)
    raise InputError(
        f"unknown queries {spec!r}; known: auto, {', '.join(sorted(QUERIES))}. Pass one of these names, an object such "
        "as Strokes(low=0.0, high=1.0), a function (n, generator) or its module:name, samples (a tensor, a dict, a "
        "loader), or the path of an .npz file."
    )


def is_source(spec: Any) -> bool:
    """Whether `spec` makes inputs, so that it can make more of them. False for samples and for queries made before."""
    if isinstance(spec, str):
        return not spec.endswith((".npz", ".safetensors"))
    return callable(spec) and not is_samples(spec)


def is_reference(spec: str) -> bool:
    """Whether a text reads module:name."""
    return _REFERENCE.fullmatch(spec) is not None
