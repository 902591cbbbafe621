"""What the distillation makes small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coreprune._masked import entries, floored, mean_square
from coreprune.coreset import kl_divergence
from coreprune.errors import ModelError
from coreprune.pruning.calibration.padding import Padding
from coreprune.pruning.calibration.vocabulary import over_words
from coreprune.pruning.distill.channel_maps import Readout
from coreprune.pruning.distill.lessons import Part, Watching
from coreprune.pruning.distill.options import Settled


def comparable(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[int]:
    """Which outputs can be compared. Raises ModelError if there are none."""
    same = [i for i, (s, t) in enumerate(zip(found, wanted, strict=False)) if s.shape == t.shape]
    if not same:
        raise ModelError(
            "the outputs of student and teacher cannot be compared: they have no floating-point tensor of the same "
            "shape. The student must be a pruned copy of the teacher."
        )
    return same


def losses(
    student: Watching, maps: Sequence[Readout | None], lesson: Sequence[Part], options: Settled, words: frozenset[int]
) -> Iterator[Tensor]:
    """The loss of one step in summands, one for every part of the lesson, so that each can be differentiated and
    forgotten before the next one is computed.

    Every mean of the loss is one over all inputs of the step: a part counts as much as it has of the entries. Variances
    are those of all parts. What is computed at padding does not count. words: the sizes of vocabularies; of logits over
    them the divergence alone counts.
    """
    pads = [part.padding for part in lesson]
    outputs = [_Target(every, words, pads) for every in zip(*(part.outputs for part in lesson), strict=True)]
    features = [_Target(every, frozenset(), pads) for every in zip(*(part.features for part in lesson), strict=True)]
    for i, part in enumerate(lesson):
        found, now = student(part.inputs)
        same = comparable(found, part.outputs)
        spoken = [k for k in same if outputs[k].words]
        terms = [outputs[k].error(found[k], i) for k in same if not outputs[k].words]
        terms += [outputs[k].divergence(found[k], i, options.temperature) for k in spoken]
        total = torch.stack(terms).mean()
        if not spoken and found[k := same[0]].dim() in (2, 3):
            total = total + outputs[k].divergence(found[k], i, options.temperature)
        apart = [of.error(m(s) if m else s, i) for m, s, of in zip(maps, now, features, strict=True)]
        yield total + options.features * torch.stack(apart).mean() if apart else total


class _Target:
    """What the teacher computes at one place from all parts of a lesson.

    words: whether it is logits over a vocabulary, whose errors do not count. padding: of every part.
    """

    def __init__(self, parts: Sequence[Tensor], words: frozenset[int], padding: Sequence[Padding]) -> None:
        self.words, self.padding = over_words(parts[0], words), padding
        self.parts = parts = [pad.without(t) for pad, t in zip(padding, parts, strict=True)]
        self.shares = _shares([t.numel() for t in parts])
        if not self.words:
            finite = [entries(_real(t)) for t in parts]
            self.finite = _shares([x.numel() for x in finite])
            variance = torch.cat(finite).var(correction=0)
            self.variance = torch.where(variance > 0, variance, 1.0)

    def error(self, found: Tensor, part: int) -> Tensor:
        """What one part adds to the mean squared error, relative to the variance of all parts."""
        found = self.padding[part].without(found)
        return self.finite[part] * mean_square(_real(found), _real(self.parts[part])) / self.variance

    def divergence(self, found: Tensor, part: int, temperature: float) -> Tensor:
        """What one part adds to T² · KL(softmax(wanted/T) ‖ softmax(found/T)) over the last axis, averaged over all
        others."""
        found = self.padding[part].without(found)
        here, wanted = (floored(_real(x)).flatten(0, -2) / temperature for x in (found, self.parts[part]))
        return self.shares[part] * temperature**2 * kl_divergence(wanted, here).mean()


def _shares(sizes: Sequence[int]) -> list[float]:
    return [size / max(1, sum(sizes)) for size in sizes]


def _real(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
