"""The user's own samples: what fits is taken, what does not is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from coreprune import InputError
from coreprune.queries import Queries, make_queries
from queries.small import convnet, gen, mlp

X = torch.randn(20, 12, generator=gen(5))
EXAMPLE = torch.zeros(1, 12)


def take(spec: Any, example: Any = EXAMPLE, **more: Any) -> Queries:
    return make_queries(mlp(), example, spec, seed=0, **more)


def test_a_tensor_is_taken_whole_or_a_random_part() -> None:
    assert torch.equal(take(X).args[0], X)
    assert take(X).source == "samples"
    assert "20 samples" in take(X).note
    part = take(X, n=6).args[0]
    rows = [int((row == X).all(dim=1).nonzero()) for row in part]
    assert len(set(rows)) == 6
    assert rows == sorted(rows)
    assert rows != list(range(6))  # files are often sorted by class, so the first rows would be one class
    assert len(take(X, n=99)) == 20


def test_dtype_and_arrays() -> None:
    assert take(X.double()).args[0].dtype == torch.float32
    assert torch.equal(take(X.numpy()).args[0], X)


def test_labels_are_dropped_everywhere() -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    assert torch.equal(take((X, labels)).args[0], X)
    loader = DataLoader(TensorDataset(X, labels), batch_size=8)
    assert torch.equal(take(loader, n=20).args[0], X)
    named = take([{"x": X[:3], "labels": labels[:3]}], {"x": EXAMPLE})
    assert list(named.kwargs) == ["x"]
    assert torch.equal(named.kwargs["x"], X[:3])


def test_what_was_left_out_is_noted() -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    assert take((X, labels)).note == "20 samples of the user; labels left out"
    assert take([X, labels]).note == "20 samples of the user; labels left out"
    assert take((X, labels), n=5).note == "5 samples of the user; labels left out"
    assert take(DataLoader(TensorDataset(X, X), batch_size=8)).note == "20 samples of the user; labels left out"
    assert take({"x": X, "labels": labels, "ids": labels}, {"x": EXAMPLE}).note.endswith("; labels, ids left out")
    assert take(X).note == "20 samples of the user"


def test_a_list_of_inputs_is_a_list_of_batches() -> None:
    """It was read as (inputs, labels), and the second half of the samples was lost without a word."""
    assert torch.equal(take([X[:9], X[9:]]).args[0], X)
    assert torch.equal(take([X[:9].numpy(), X[9:].numpy()]).args[0], X)
    assert torch.equal(take([X]).args[0], X)
    assert torch.equal(take([X[:3], X[3:5], X[5:]]).args[0], X)
    assert take([X] * 40).note == "800 samples of the user"  # they are in memory already: no limit
    assert torch.equal(take([X, X], {"x": EXAMPLE}).kwargs["x"], torch.cat([X, X]))
    part = take([X[:9], X[9:]], n=6).args[0]
    assert all(bool((row == X).all(dim=1).any()) for row in part)
    assert not torch.equal(part, X[:6])
    with pytest.raises(InputError, match=r"batch 1 of the samples: shape \(20, 5\)"):
        take([X, X[:, :5]])
    with pytest.raises(InputError, match="batch 1 of the samples"):
        take([X, torch.zeros(19)])
    with pytest.raises(InputError, match="batch 0 of the samples"):
        take([torch.tensor(1.0), X])


def test_two_inputs_for_a_model_that_takes_one_are_refused() -> None:
    with pytest.raises(InputError, match=r"queries=\[x1, x2\]"):
        take((X, X))
    with pytest.raises(InputError, match="3 tensors, but the example inputs have 1"):
        take((X, X, X))


def test_a_loader_is_read_only_as_far_as_needed_and_leaves_the_random_state() -> None:
    read = []

    def batches() -> Any:
        for i in range(10):
            read.append(i)
            yield X[2 * i : 2 * i + 2]

    before = torch.get_rng_state()
    many = DataLoader(TensorDataset(X.repeat(40, 1)), batch_size=100)
    assert len(take(many)) == 512
    assert torch.equal(take(batches(), n=5).args[0], X[:5])
    assert read == [0, 1, 2]
    take(DataLoader(TensorDataset(X), batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_samples_do_not_name_stays_as_in_the_example() -> None:
    example = {"ids": torch.zeros(1, 5, dtype=torch.int64), "mask": torch.ones(1, 5), "flag": True}
    ids = torch.arange(15).reshape(3, 5)
    queries = make_queries(mlp(), example, {"ids": ids.int()}, seed=0)
    assert torch.equal(queries.kwargs["ids"], ids)
    assert torch.equal(queries.kwargs["mask"], torch.ones(3, 5))
    assert queries.kwargs["flag"] is True


def test_several_positional_inputs() -> None:
    example = (EXAMPLE, torch.zeros(1, 2))
    queries = take((X, X[:, :2], torch.zeros(20)), example)
    assert len(queries.args) == 2
    with pytest.raises(InputError, match="1 tensors, but the example inputs have 2"):
        take(X, example)
    with pytest.raises(InputError, match=r"\[19, 20\] rows"):
        take((X, X[1:, :2]), example)


def test_npz_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", anything=X.numpy())
    assert torch.equal(take(tmp_path / "one.npz").args[0], X)
    assert torch.equal(take(str(tmp_path / "one.npz")).args[0], X)
    np.savez(tmp_path / "two.npz", x=X.numpy(), y=np.zeros(20))
    assert torch.equal(take(tmp_path / "two.npz", {"x": EXAMPLE}).kwargs["x"], X)
    with pytest.raises(InputError, match="holds x, y; the example inputs ask for one array"):
        take(tmp_path / "two.npz")
    with pytest.raises(InputError, match="holds x, y; the example inputs ask for pixels"):
        take(tmp_path / "two.npz", {"pixels": EXAMPLE})
    np.save(tmp_path / "one.npy", X.numpy())
    with pytest.raises(InputError, match="plain arrays"):
        take(tmp_path / "one.npy")
    with pytest.raises(InputError, match="no file"):
        take(tmp_path / "absent.npz")


@pytest.mark.parametrize("kind", ["pickled", "text", "empty", "cut", "bent"])
def test_a_file_that_cannot_be_read_is_not_advertised_as_a_pickle_to_trust(kind: str, tmp_path: Path) -> None:
    """numpy's advice, to load it unsafely, was passed on."""
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object) if kind == "pickled" else X.numpy())
    whole = path.read_bytes()
    bent = whole[:200] + bytes(99) + whole[299:]
    path.write_bytes({"text": b"hello", "empty": b"", "cut": whole[:-40], "bent": bent}.get(kind, whole))
    with pytest.raises(InputError) as caught:
        take(path)
    assert str(caught.value) == (
        f"{path} is no .npz file of plain arrays: it holds Python objects, or it is damaged. Write plain arrays with "
        "numpy.savez."
    )


def nan(row: int) -> torch.Tensor:
    x = X.clone()
    x[row, 3] = float("nan")
    return x


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (X[:, :5], r"one input has shape \(12,\)"),
        (X[0], "shape"),
        (torch.zeros(0, 12), "empty"),
        (X.long(), "normalised images"),
        (X > 0, "torch.bool"),
        (nan(7), "row 7"),
        (X.clone().index_fill_(0, torch.tensor(2), float("inf")), "row 2"),
        (DataLoader(TensorDataset(X), batch_size=30, drop_last=True), "yields no batch"),
        (["text"], "a str where a tensor is needed"),
        ({"wrong": X}, "positional"),
        (np.array(["a"]), "cannot be inputs"),
    ],
)
def test_bad_samples(spec: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        take(spec)


def test_keywords_that_the_example_lacks() -> None:
    with pytest.raises(InputError, match="are named pixels; the example inputs are x"):
        take({"pixels": X}, {"x": EXAMPLE})
    with pytest.raises(InputError, match="the example inputs are x, y"):
        take({"y": X}, {"x": EXAMPLE, "y": EXAMPLE})


def test_a_nan_sum_that_is_only_an_overflow_is_fine() -> None:
    x = torch.full((4, 12), 1e38)
    assert torch.equal(take(x).args[0], x)


def test_queries_of_before(tmp_path: Path) -> None:
    queries = take(X)
    assert torch.equal(take(queries, n=4).args[0], X[:4])
    queries.save(tmp_path / "q.safetensors")
    assert torch.equal(take(tmp_path / "q.safetensors").args[0], X)
    assert torch.equal(take(str(tmp_path / "q.safetensors")).args[0], X)
    with pytest.raises(InputError, match="structure, shapes and dtypes"):
        make_queries(convnet(), torch.zeros(1, 3, 8, 8), queries, seed=0)
    with pytest.raises(InputError, match="structure, shapes and dtypes"):
        take(queries, {"x": EXAMPLE})
    with pytest.raises(InputError, match="structure, shapes and dtypes"):
        take(queries, EXAMPLE.long())
    assert torch.equal(take(queries, EXAMPLE.double()).args[0], X.double())  # another precision is none the worse
