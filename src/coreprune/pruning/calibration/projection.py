"""A random projection of a model's outputs, whose gradient says what errors inside of the model are worth."""

from __future__ import annotations

import torch
from torch import Tensor

from coreprune._masked import entries, floored, infinite
from coreprune.coreset import divergence_noise, variance_under
from coreprune.pruning.calibration.padding import NONE, Padding
from coreprune.pruning.calibration.vocabulary import in_parts, mean_row, over_words


def projection(
    output: Tensor,
    samples: int | None,
    words: frozenset[int],
    generator: torch.Generator,
    padding: Padding = NONE,
) -> Tensor:
    """Noise g for every entry of an output, such that E⟨g, Δ⟩², summed over the samples, is what an error Δ is worth.

    That is the squared error as a share of the variance over all entries. An output (…, tokens, words) over a
    vocabulary of the model is read by a softmax: there errors count as they change the probabilities (T21), as a share
    of what the logits vary over the tokens, in the same measure.

    samples: how many the output holds; None: as many as its first axis is long. words: the sizes of vocabularies.
    padding: what the output is there is worth nothing, and is not among the entries.
    """
    noise = torch.randn(output.shape, generator=generator).to(output)
    masked = infinite(output)
    noise = padding.silent(noise if masked is None else noise.masked_fill_(masked, 0.0))
    samples = samples or output.shape[0] if output.dim() else 1
    if not over_words(output, words):
        counted = entries(padding.without(output))
        deviation = counted.double().std(correction=0).clamp_min(1e-12)
        return noise.div_((deviation * (counted.numel() / samples) ** 0.5).to(output))
    rows, drawn = floored(output).flatten(0, -2), noise.flatten(0, -2)
    there = padding.silent(torch.ones_like(output[..., :1])).flatten().double()
    mean, varies = mean_row(rows, there), 0.0
    for part, own, counts in zip(in_parts(rows), in_parts(drawn), in_parts(there, rows.shape[1]), strict=True):
        logits = part.double()
        varies += float(variance_under(logits, logits - mean) @ counts)
        own.copy_(divergence_noise(logits, own.double()))
    return noise.div_(max(varies / samples, 1e-12) ** 0.5)
