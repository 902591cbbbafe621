"""Which outputs are logits over the words of a vocabulary. A softmax reads those, and errors of them count by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from coreprune.graph import Captured
from coreprune.pruning.calibration.wider import looked_up

_TOGETHER = 1 << 18  # logits that are worked on at once, 2 MiB in float64: larger tensors leave the cache


def vocabularies(captured: Captured) -> frozenset[int]:
    """How long the tables are in which the model looks up the tokens that it is given.

    A table that is no longer than it is wide is left out: an output of that width may be anything.
    """
    nodes = (node.args[0] for node, _ in looked_up(captured))
    tables = (table.meta["val"].shape for table in nodes if isinstance(table, fx.Node))
    return frozenset(int(rows) for rows, columns in tables if rows > columns)


def embeddings(model: nn.Module) -> frozenset[int]:
    """The same of a model that is not traced, by its modules."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return frozenset(m.num_embeddings for m in tables if m.num_embeddings > m.embedding_dim)


def over_words(output: Tensor, words: frozenset[int], axes: int = 3) -> bool:
    """Whether an output (…, tokens, words) is over a vocabulary.

    words: the sizes of vocabularies. axes: the output has at least so many: 2 if it is that of one sample alone.
    """
    return output.dim() >= axes and output.shape[-1] in words and output[..., 0].numel() > 1


def in_parts(rows: Tensor, words: int | None = None) -> Sequence[Tensor]:
    """Rows of logits, a few at a time: in float64 those of a batch of texts are gigabytes.

    rows: (n, words), or something of every row, (n,), of so many words.
    """
    return rows.split(max(1, _TOGETHER // (rows.shape[1] if words is None else words)))


def mean_row(rows: Tensor, counts: Tensor) -> Tensor:
    """The mean of the rows, (words,) float64. rows: (n, words). counts: how much each counts, (n,) float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, own in zip(in_parts(rows), in_parts(counts, rows.shape[1]), strict=True):
        total += own @ part.double()
    return total / counts.sum().clamp_min(1)
