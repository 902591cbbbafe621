"""`Queries`: blocks, parts, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from coreprune import InputError, _files
from coreprune.errors import ArtifactError
from coreprune.queries import Queries


def make(n: int = 7) -> Queries:
    rows = torch.arange(n, dtype=torch.float32)
    return Queries(
        (rows[:, None].expand(n, 3), torch.tensor([1.0, 2.0])),
        {"mask": torch.ones(n, 2, dtype=torch.bool), "scale": 0.5, "more": [rows.to(torch.bfloat16), None, "x"]},
        "test",
        "made by hand",
        frozenset({1}),
    )


def test_blocks_are_all_rows_once_in_order() -> None:
    queries = make(7)
    seen, sizes = [], []
    for args, kwargs in queries.batches(3):
        sizes.append(len(kwargs["mask"]))
        assert len(args[0]) == len(kwargs["more"][0]) == sizes[-1]
        assert torch.equal(args[1], torch.tensor([1.0, 2.0]))  # has no batch axis, although it has rows
        assert kwargs["scale"] == 0.5
        seen.append(args[0][:, 0])
    assert sizes == [3, 3, 1]
    assert torch.equal(torch.cat(seen), torch.arange(7.0))


def test_blocks_is_the_former_name_of_batches() -> None:
    queries = make(7)
    with pytest.warns(DeprecationWarning, match=r"Queries\.blocks is now Queries\.batches"):
        found = [len(kwargs["mask"]) for _, kwargs in queries.blocks(3)]
    assert found == [3, 3, 1]


def test_a_shared_tensor_as_long_as_the_batch_is_not_cut() -> None:
    queries = Queries((torch.zeros(4, 2), torch.ones(4, 4)), {}, "test", shared=frozenset({1}))
    (args, _), *_ = queries.batches(1)
    assert args[0].shape == (1, 2)
    assert args[1].shape == (4, 4)


def test_take_and_split() -> None:
    queries = make(7)
    first, rest = queries.split(5)
    assert (len(queries), len(first), len(rest), len(queries.take(2)), len(queries.take(99))) == (7, 5, 2, 2, 7)
    assert torch.equal(torch.cat([first.args[0], rest.args[0]]), queries.args[0])
    assert first.source == "test"
    for call in (lambda: queries.split(0), lambda: queries.split(7), lambda: queries.take(0)):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="at least one"):
        next(queries.batches(0))


def test_a_random_split_loses_nothing_and_keeps_the_order() -> None:
    queries = make(40)
    first, rest = queries.split(25, seed=0)
    rows = [part.args[0][:, 0] for part in (first, rest)]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(40.0))
    assert all(bool((part.diff() > 0).all()) for part in rows)
    assert not torch.equal(rows[0], torch.arange(25.0))
    assert torch.equal(first.args[1], torch.tensor([1.0, 2.0]))
    sample = queries.sample(25, torch.Generator().manual_seed(0))
    assert torch.equal(sample.args[0], first.args[0])
    assert queries.sample(40) is queries
    assert torch.equal(queries.sample(25).args[0], first.args[0])  # 0 is the default seed
    assert not torch.equal(queries.sample(25, seed=1).args[0], first.args[0])


def test_queries_without_rows_or_of_two_lengths_do_not_exist() -> None:
    for args in ((), (1.0,), (torch.zeros(0, 3),), (torch.zeros(2, 3), torch.zeros(3, 3))):
        with pytest.raises(InputError, match="one length"):
            Queries(args, {}, "test")


def test_a_file_holds_everything(tmp_path: Path) -> None:
    queries = make()
    queries.save(tmp_path / "deep" / "q.safetensors")
    again = Queries.load(tmp_path / "deep" / "q.safetensors")
    for a, b in zip(*(pytree.tree_leaves((q.args, q.kwargs)) for q in (again, queries)), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(b, torch.Tensor) else a == b
    assert list(again.kwargs) == ["mask", "scale", "more"]  # the order is part of the call
    assert (again.source, again.note, again.shared) == ("test", "made by hand", frozenset({1}))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["q.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.safetensors"
    make(3).save(path)

    def broken(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(_files.os, "fsync", broken)
    with pytest.raises(ArtifactError, match="disk full"):
        make(5).save(path)
    assert len(Queries.load(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["q.safetensors"]


def test_only_plain_things_are_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype among the inputs cannot be written"):
        Queries((torch.zeros(2, 2), torch.float32), {}, "test").save(tmp_path / "q.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        Queries.load(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="cannot be read as queries"):
        Queries.load(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(InputError, match="no queries"):
        Queries.load(tmp_path / "weights")
    save_file({"t0": torch.zeros(2)}, tmp_path / "newer", {"coreprune.queries": json.dumps({"version": 99})})
    with pytest.raises(InputError, match="format 99"):
        Queries.load(tmp_path / "newer")
    save_file({}, tmp_path / "damaged", {"coreprune.queries": json.dumps({"version": 1, "tree": {}, "about": {}})})
    with pytest.raises(InputError, match="cannot be read"):
        Queries.load(tmp_path / "damaged")


def test_queries_add_up() -> None:
    made, given = make(3), make(2)
    both = given + made
    assert len(both) == 5
    for x, y, z in zip(
        *(pytree.tree_leaves((q.args, q.kwargs)) for q in (both, given, made)),
        strict=True,
    ):
        if isinstance(x, torch.Tensor) and x.shape != y.shape:
            assert torch.equal(x, torch.cat([y, z]))
    assert both.source == "test + test"
    assert both.shared == given.shared


def test_only_inputs_of_one_form_add_up() -> None:
    with pytest.raises(InputError, match="same form"):
        Queries((torch.zeros(2, 3),), {}, "a") + Queries((torch.zeros(2, 4),), {}, "b")
    with pytest.raises(InputError, match="same form"):
        Queries((torch.zeros(2, 3),), {}, "a") + Queries((), {"x": torch.zeros(2, 3)}, "b")
    with pytest.raises(TypeError):
        Queries((torch.zeros(2, 3),), {}, "a") + 3  # type: ignore[operator]
