"""Which source suits a model if the user names none."""

from __future__ import annotations

from coreprune.queries.sources.base import Source, Target
from coreprune.queries.sources.batch_norm_inversion import BatchNormInversion
from coreprune.queries.sources.class_impressions import ClassImpressions, is_classifier
from coreprune.queries.sources.mixture import Mixture
from coreprune.queries.sources.noise_like import noise_like
from coreprune.queries.sources.norm_statistics import reached
from coreprune.queries.sources.strokes import Strokes
from coreprune.queries.sources.token_mixture import TokenMixture
from coreprune.queries.sources.tokens import RandomTokens, columns, known


def choose(target: Target) -> tuple[Source, str]:
    """The source, and the reason in words."""
    if not target.example.is_floating_point():
        if len(target.shape) != 1 or columns(target) is not None:
            return RandomTokens(), "the inputs are whole numbers"
        found = "no tokenizer is known" if known(target) is None else "a tokenizer is known"
        return TokenMixture(), f"the inputs are tokens, and {found}"
    normed = reached(target)
    if normed and target.together:
        return BatchNormInversion(), "the model holds batch norms with running statistics"
    source, fits = noise_like(target)
    # A batch norm's statistics are those of many inputs together.
    why = f"{'batch norms cannot be inverted one input at a time' if normed else 'no batch norm to invert'}, and {fits}"
    drawn = isinstance(source, Mixture) and isinstance(source.sources[0], Strokes)
    if drawn and is_classifier(target):  # this was measured on drawings only
        return ClassImpressions(source), f"{why} to classify"
    return source, why
