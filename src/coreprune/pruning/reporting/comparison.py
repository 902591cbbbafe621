"""How far a pruned model is from the original on queries that nothing else has used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from coreprune import _ranks
from coreprune._batch import usual
from coreprune._example import largest_batch, reals
from coreprune._masked import entries, finite, floored, mean_square
from coreprune._shapes import Float
from coreprune._single import answering
from coreprune.coreset import kl_divergence, variance_under
from coreprune.graph import Traced
from coreprune.pruning.calibration.padding import NOWHERE, Ends
from coreprune.pruning.calibration.vocabulary import in_parts, mean_row, over_words, vocabularies
from coreprune.pruning.reporting.answers import scores
from coreprune.queries import Queries

_BATCH = 32  # samples that are run together


@dataclass(frozen=True, eq=False)
class Apart:
    """The differences between two models.

    errors: (n,) float64, for every query the squared error of the outputs, relative to their variance over all queries;
    infinite where an output is NaN, or infinite in one model alone. Outputs over the words of a vocabulary count as
    they change the probabilities (T21): twice the divergence, relative to what the logits vary over the tokens of a
    query in the same measure. same: how many queries get the same class, or the same next token of a causal language
    model; None if the models return no such scores.
    """

    errors: Float[Tensor, " n"]
    same: int | None

    @property
    def error(self) -> float:
        """The mean over the queries."""
        return float(self.errors.mean())

    @property
    def agreement(self) -> float | None:
        """The share of the queries with the same class."""
        return None if self.same is None else self.same / len(self.errors)

    def better_than(self, other: Apart) -> bool:
        """Whether the mean error is lower by more than the standard error of the difference, query by query."""
        if not math.isfinite(other.error) or not math.isfinite(self.error):
            return math.isfinite(self.error)
        less = other.errors - self.errors
        noise = float(less.std()) / math.sqrt(len(less)) if len(less) > 1 else math.inf
        return float(less.mean()) > noise


def apart_from(traced: Traced, small: nn.Module, queries: Queries, ends: Ends) -> Apart | None:
    """`apart` for a model that is traced, whose vocabularies are known."""
    return apart(traced.model, small, queries, vocabularies(traced.captured), ends)


@torch.no_grad()
def apart(
    model: nn.Module,
    small: nn.Module,
    queries: Queries,
    words: frozenset[int] = frozenset(),
    ends: Ends = NOWHERE,
) -> Apart | None:
    """Run both models on the queries, a few at a time. None if they have no outputs that can be compared.

    words: the sizes of vocabularies. An output (…, tokens, words) of such a size is one of logits. ends: where texts
    have padding, whose outputs are not compared.

    Of several processes, each runs some of the queries, and all get the same result.
    """
    errors: list[Tensor] = []  # of every query: (outputs,)
    sums: list[Tensor] = []  # (outputs, 3): sum, sum of squares, count
    classes: list[bool] = []
    alike = True
    read = scores(model, queries)
    with answering(model) as full, answering(small) as left:
        size = largest_batch(next(queries.batches(2)), _BATCH, full, left)
        batches = list(queries.batches(size))
        share = _ranks.share(len(batches))
        for args, kwargs in (batches[b] for b in share.numbers if share.counts):
            axes = queries.axes or usual((args, kwargs))
            rows = axes.size((args, kwargs))
            outputs = [axes.rows(reals(m(*args, **kwargs)), rows) for m in (full, left)]
            pairs = [
                (x, y) for x, y in zip(*outputs, strict=False) if x is not None and y is not None and x.shape == y.shape
            ]
            if not pairs:
                alike = False
                break
            padding = ends.of((args, kwargs))
            for i in range(rows):  # one at a time: in float64 the logits of a batch of texts are gigabytes
                told = [_compared(padding.of_text(x[i], i), padding.of_text(y[i], i), words) for x, y in pairs]
                errors.append(torch.stack([error for error, _ in told]).cpu())
                sums.append(torch.stack([sums for _, sums in told]))
            chosen = [read((args, kwargs), output) for output in pairs[0]]
            if chosen[0] is not None and chosen[1] is not None:
                classes += (chosen[0].argmax(dim=1) == chosen[1].argmax(dim=1)).tolist()
    if not all(_ranks.gathered("the comparison", alike)):
        return None
    errors, sums = (list(chain(*_ranks.gathered("the comparison", [x.cpu() for x in each]))) for each in (errors, sums))
    classes = list(chain(*_ranks.gathered("the comparison", classes)))
    total, square, count = torch.stack(sums).sum(dim=0).unbind(dim=1)
    variance = square / count - (total / count).square()
    relative = torch.stack(errors) / torch.where(variance > 0, variance, 1.0)
    same = sum(classes) if len(classes) == len(relative) else None
    return Apart(torch.nan_to_num(relative.mean(dim=1), nan=math.inf, posinf=math.inf), same)


def _compared(x: Tensor, y: Tensor, words: frozenset[int]) -> tuple[Tensor, Tensor]:
    """How far an output y of one query is from x, and the sums from which the variance of x comes."""
    if not over_words(x, words, axes=2):
        x, y = x.double(), y.double()
        return mean_square(y, x), _sums(entries(x))
    if not (finite(x) and finite(y)) and bool(((torch.isinf(x) | torch.isinf(y)) & (x != y)).any()):
        return x.new_full((), math.inf, dtype=torch.float64), x.new_zeros(3, dtype=torch.float64)
    rows, others = floored(x).flatten(0, -2), floored(y).flatten(0, -2)
    mean = mean_row(rows, torch.ones_like(rows[:, 0], dtype=torch.float64))
    off = varies = torch.zeros((), dtype=torch.float64, device=x.device)
    for z, changed in zip(in_parts(rows), in_parts(others), strict=True):
        off = off + kl_divergence(z.double(), changed.double()).sum()
        varies = varies + variance_under(z.double(), z.double() - mean).sum()
    return 2 * off / len(rows), torch.stack([torch.zeros_like(varies), varies, torch.full_like(varies, len(rows))])


def _sums(x: Tensor) -> Tensor:
    """Sum, sum of squares and count, (3,)."""
    return torch.stack([x.sum(), x.square().sum(), torch.full_like(x[:1].sum(), x.numel())])
