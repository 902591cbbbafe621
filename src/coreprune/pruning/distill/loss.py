"""What the distillation makes small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coreprune._masked import entries, floored, mean_square
from coreprune.coreset import kl_divergence
from coreprune.errors import ModelError
from coreprune.pruning.calibration.vocabulary import over_words
from coreprune.pruning.distill.channel_maps import Readout
from coreprune.pruning.distill.lessons import Lesson, Watching
from coreprune.pruning.distill.options import Settled


def compared(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The pairs of outputs of student and teacher that can be compared. Raises ModelError if there are none."""
    pairs = [(s, t) for s, t in zip(found, wanted, strict=False) if s.shape == t.shape]
    if not pairs:
        raise ModelError(
            "the outputs of student and teacher cannot be compared: they have no floating-point tensor of the same "
            "shape. The student must be a pruned copy of the teacher."
        )
    return pairs


def loss_of(
    student: Watching, maps: Sequence[Readout | None], lesson: Lesson, options: Settled, words: frozenset[int]
) -> Tensor:
    """The loss of one step. words: the sizes of vocabularies; of logits over them the divergence alone counts."""
    outputs, now = student(lesson.parts)
    pairs = compared(outputs, lesson.outputs)
    errors = [_error(s, t) for s, t in pairs if not over_words(t, words)]
    spoken = [_divergence(s, t, options.temperature) for s, t in pairs if over_words(t, words)]
    total = torch.stack([*errors, *spoken]).mean()
    if not spoken and pairs[0][0].dim() in (2, 3):
        total = total + _divergence(*pairs[0], options.temperature)
    features = [_error(m(s) if m else s, t) for m, s, t in zip(maps, now, lesson.features, strict=True)]
    return total + options.features * torch.stack(features).mean() if features else total


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error, relative to the variance of what is wanted."""
    found, wanted = (x if x.dtype == torch.float64 else x.float() for x in (found, wanted))
    variance = entries(wanted).var(correction=0)
    return mean_square(found, wanted) / torch.where(variance > 0, variance, 1.0)


def _divergence(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(wanted/T) ‖ softmax(found/T)) over the last axis, averaged over all others."""
    found, wanted = (
        floored(x if x.dtype == torch.float64 else x.float()).flatten(0, -2) / temperature for x in (found, wanted)
    )
    return temperature**2 * kl_divergence(wanted, found).mean()
