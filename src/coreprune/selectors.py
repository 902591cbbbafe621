"""Selectors, which choose the channels that stay, and what a selector of your own takes and gives.

A function from a layer (`LayerWeights`) to one score for each of its units is a selector:

    def largest(layer):
        return layer.weights.abs().amax(dim=1)

    prune(model, example_inputs, Budget(macs=0.5), method=largest)

`SELECTORS` maps names to classes: those of coreprune, and those that installed packages register with an entry point in
the group "coreprune.selectors".
"""

from __future__ import annotations

from coreprune.pruning.selectors import (
    L1,
    L2,
    SELECTORS,
    BnScale,
    Cone,
    DOptimal,
    Folding,
    Fpgm,
    Functional,
    LayerWeights,
    Lewis,
    Loewner,
    Magnitude,
    Merging,
    Mussay,
    Norm,
    NormStatistics,
    Pfp,
    Random,
    Ranking,
    Reader,
    Selector,
    Uniform,
    ranked,
    sampled,
)

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
    "Mussay",
    "Norm",
    "NormStatistics",
    "Pfp",
    "Random",
    "Ranking",
    "Reader",
    "Selector",
    "Uniform",
    "ranked",
    "sampled",
]
