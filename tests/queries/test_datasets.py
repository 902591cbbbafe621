"""A torch Dataset as samples: each item is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from coreprune import Budget, InputError, prune
from coreprune.queries import make_queries
from queries.small import gen, mlp

X = torch.randn(20, 12, generator=gen(5))
EXAMPLE = torch.zeros(1, 12)


class Items(Dataset[Any]):
    def __init__(self, change: Any, n: int = 20) -> None:
        self.change, self.n = change, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return self.change(X[i], i)


class Forward(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(X)


ITEMS = {
    "tensor": lambda x, i: x,
    "with a label": lambda x, i: (x, i),
    "array": lambda x, i: (x.numpy(), np.int64(i)),
    "list": lambda x, i: [x],
}


@pytest.mark.parametrize("kind", ITEMS)
def test_items_are_single_samples(kind: str) -> None:
    queries = make_queries(mlp(), EXAMPLE, Items(ITEMS[kind]), seed=0)
    assert torch.equal(queries.args[0], X)
    assert queries.note.startswith("20 samples of the user")


def test_a_part_is_random_and_the_same_for_a_seed() -> None:
    a, b, other = (make_queries(mlp(), EXAMPLE, Items(ITEMS["tensor"]), n=6, seed=s).args[0] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert len({int((row == X).all(dim=1).nonzero()) for row in a}) == 6


def test_a_dataset_of_torch_and_one_that_only_goes_forward() -> None:
    labels = torch.arange(20)
    assert torch.equal(make_queries(mlp(), EXAMPLE, TensorDataset(X, labels), seed=0).args[0], X)
    assert torch.equal(make_queries(mlp(), EXAMPLE, Forward(), n=7, seed=0).args[0], X[:7])


def test_items_that_are_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, *, x: Tensor) -> Tensor:
            return self.inner(x)

    queries = make_queries(Named(), {"x": EXAMPLE}, Items(lambda x, i: {"x": x, "label": i}), seed=0)
    assert torch.equal(queries.kwargs["x"], X)
    assert "label left out" in queries.note


def test_samples_that_do_not_lie_along_the_first_axis() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0][-1])

    items = Items(lambda x, i: x.reshape(4, 3))
    queries = make_queries(TimeFirst(), torch.randn(4, 1, 3), items, seed=0, batch_axis=1)
    (stored,) = (x for x in queries.args if isinstance(x, Tensor))
    assert torch.equal(stored, X.reshape(20, 4, 3))


def test_prune_takes_a_dataset() -> None:
    result = prune(mlp(), EXAMPLE, Budget(keep=0.5), queries=Items(ITEMS["with a label"]), seed=0)
    assert "20 samples of the user" in result.report.queries


def broken(x: Tensor, i: int) -> Tensor:
    raise KeyError("no such file")


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (Items(broken), r"Items gives no samples \(KeyError: 'no such file'\)"),
        (Items(ITEMS["tensor"], n=0), "empty"),
        (Items(lambda x, i: x[:5]), "shape"),
        (Items(lambda x, i: "image.png"), "a str where a tensor is needed"),
        (Dataset(), "It needs __len__"),
    ],
)
def test_bad_datasets(dataset: Dataset[Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make_queries(mlp(), EXAMPLE, dataset, seed=0)
