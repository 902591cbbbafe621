"""Sums, means and maxima of rows of a table: the table's columns can leave."""

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, prune
from coreprune.graph import Traced, capture, find_groups, remove
from graph.oracle import assert_same, random_halves, zeroed_original
from graph.zoo import gen, randomise


class Bags(nn.Module):
    """Bags of words. offsets: whether they come in one row, as (words, where each bag begins, weights of the words)."""

    def __init__(self, mode: str, offsets: bool = False):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 12, mode=mode, include_last_offset=offsets, padding_idx=3)
        self.a, self.b, self.offsets = nn.Linear(12, 16), nn.Linear(16, 3), offsets

    def forward(self, words: Tensor, begin: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.b(torch.relu(self.a(self.bag(words, begin, weights))))


def words(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 20, (n, 7), generator=gen(seed))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_columns_leave(mode):
    model, x = randomise(Bags(mode)), words(5)
    captured = capture(model, x)
    groups = find_groups(captured)
    assert {g.name for g in groups if not g.locked_because} == {"bag", "a"}
    result = remove(Traced(model, captured, groups), random_halves(groups, gen(1)))
    assert result.model.bag.embedding_dim == 6 == result.model.bag.weight.shape[1]
    assert_same([result.model(words(9, 1))], [zeroed_original(model, groups, result.kept)(words(9, 1))])


def test_with_offsets_and_weights():
    model = randomise(Bags("sum", offsets=True))
    inputs = (words(3).flatten(), torch.tensor([0, 4, 4, 21]), torch.randn(21, dtype=torch.float64, generator=gen(2)))
    captured = capture(model, inputs)
    groups = find_groups(captured)
    result = remove(Traced(model, captured, groups), random_halves(groups, gen(1)))
    assert {"bag", "a"} <= set(result.kept)
    assert_same([result.model(*inputs)], [zeroed_original(model, groups, result.kept)(*inputs)])


@pytest.mark.parametrize("example", [torch.zeros(1, 7, dtype=torch.int64), words(1)])
@pytest.mark.parametrize("queries", ["auto", words(64, 2)], ids=["made", "given"])
def test_pruned_and_repaired(example, queries):
    model = Bags("mean").eval()
    result = prune(model, example, Budget(params=0.7), queries=queries, progress=False)
    assert result.report.parameters[1] <= 0.7 * result.report.parameters[0]
    assert result.model(words(4)).shape == (4, 3)
