"""How much memory a run may take: what is said, what is put into files, and that results do not depend on it."""

from __future__ import annotations

import errno
import gc
import os

import pytest
import torch
from torch import nn

from coreprune import Budget, InputError, prune
from coreprune.graph import capture
from coreprune.graph.segments import segments
from coreprune.pruning.memory import Shelf, bytes_of, free_bytes
from graph.zoo import ZOO, gen
from sweeps import thinned
from zoo_examples import example


@pytest.mark.parametrize(
    ("said", "meant"),
    [("8GiB", 8 << 30), ("1.5 kb", 1500), (" 64 MiB ", 64 << 20), (12345, 12345), ("300", 300), (2.5e9, 2_500_000_000)],
)
def test_sizes_are_read(said, meant):
    assert bytes_of(said) == meant


@pytest.mark.parametrize("wrong", ["much", "", "-1GB", "8 giga", 0, -5, True, float("nan"), float("inf"), [1], "0"])
def test_other_sizes_are_refused(wrong):
    with pytest.raises(InputError, match="memory"):
        bytes_of(wrong)


def test_a_wrong_size_is_refused_before_anything_runs():
    class Never(nn.Linear):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(InputError, match="memory"):
        prune(Never(2, 2), torch.zeros(1, 2), Budget(keep=0.5), memory="all of it")


def test_half_of_what_is_free_by_default():
    assert 0.3 * free_bytes() < bytes_of(None) < 0.7 * free_bytes()


def test_what_fits_stays_and_the_rest_is_mapped_and_equal():
    shelf = Shelf(limit=4000)
    small = torch.arange(900, dtype=torch.float32)
    assert shelf.put(small) is small
    assert shelf.held == shelf.most == 3600
    large = torch.randn(30, 40, 5, generator=gen(0)).permute(2, 0, 1)
    mapped = shelf.put({"x": large, "y": [3]})["x"]
    assert mapped is not large
    assert torch.equal(mapped, large)
    assert mapped.stride() == large.stride()
    assert shelf.spilled == 4 * large.numel()
    for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        value = torch.ones(4000, dtype=dtype)
        back = shelf.put(value)
        assert back.dtype == dtype
        assert torch.equal(back, value)
    again = shelf.put(mapped)
    assert again is mapped  # it lies in a file already


def test_memory_is_free_again_when_nothing_uses_the_tensors():
    shelf = Shelf(limit=10_000)
    one = shelf.put(torch.zeros(2000))
    assert shelf.held == 8000
    view = shelf.put(one[10:])
    assert shelf.held == 8000  # the same memory
    del one, view
    gc.collect()
    assert shelf.held == 0
    assert shelf.most == 8000


def test_files_go_with_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    shelf = Shelf(limit=1)
    kept = [shelf.put(torch.zeros(1000)) for _ in range(3)]
    assert float(sum(x.sum() for x in kept)) == 0
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # open files without names
    del kept, shelf
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_what_to_do(monkeypatch):
    opened = os.fdopen

    def full(handle, mode):
        file = opened(handle, mode)
        file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shelf = Shelf(limit=1)
    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(InputError, match=r"No space left.*TMPDIR"):
        shelf.put(torch.zeros(1000))


def test_a_folder_for_temporary_files_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"absent.*TMPDIR"):
        Shelf(limit=1).put(torch.zeros(1000))


@pytest.mark.parametrize("name", thinned(ZOO, 3))
def test_a_segment_reads_what_earlier_ones_made(name):
    """The segments are all nodes in order, and what each reads is inside, free, or an exit of an earlier one."""
    entry = ZOO[name]
    captured = capture(entry.build().double().eval(), example(entry.inputs(1)))
    parts = segments(captured)
    assert [n for part in parts for n in part.nodes] == list(captured.graph.graph.nodes)
    made: set = set()
    for part in parts:
        inside = set(part.nodes)
        for node in part.nodes:
            assert all(n in inside or n in part.outer or n in part.entries for n in node.all_input_nodes)
        assert set(part.entries) <= made
        made |= set(part.exits)


@pytest.mark.parametrize("name", ["llama-gqa", "bert", "hf-resnet"])
def test_networks_are_cut_between_their_blocks(name):
    entry = ZOO[name]
    assert len(segments(capture(entry.build().double().eval(), example(entry.inputs(1))))) > 2


SPILLED = ("llama-gqa", "bert", "unet")


@pytest.mark.slow
@pytest.mark.parametrize("name", SPILLED)
def test_in_files_as_in_memory(name):
    entry = ZOO[name]
    model, inputs = entry.build().double().eval(), entry.inputs(24)
    asked = {"queries": example(inputs), "seed": 0, "compare": False}
    one, budget = example(entry.inputs(1)), Budget(macs=0.7)
    results = [prune(model, one, budget, memory=memory, **asked) for memory in ("4GiB", "1KiB")]
    roomy, tight = (r.report.memory for r in results)
    assert roomy.spilled == 0 < tight.spilled
    assert tight.held <= 1024 < roomy.held
    assert roomy.limit == 4 << 30
    assert results[0].plan.to_json().replace('"4GiB"', "") == results[1].plan.to_json().replace('"1KiB"', "")
    for (key, a), b in zip(results[0].model.state_dict().items(), results[1].model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * float(a.abs().max() if a.numel() else 0)), key


def test_the_collection_holds_no_more_for_more_queries():
    """Beyond what is alive between segments, which lies in files here, nothing grows with the queries."""
    held = []
    for n in (64, 256):
        torch.manual_seed(0)
        model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(24, 24), nn.ReLU())), nn.Linear(24, 5)).eval()
        x = torch.randn(n, 24, generator=torch.Generator().manual_seed(1))
        held.append(prune(model, x[:1], Budget(macs=0.6), queries=x, memory="20KiB").report.memory)
    assert held[1].held <= 20 << 10
    assert held[1].held <= 1.1 * held[0].held
    assert held[1].spilled > held[0].spilled


def test_the_report_says_what_was_used():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    report = prune(model, x[:1], Budget(macs=0.6), queries=x, memory="1MiB").report
    data = report.as_dict()["memory"]
    assert data["limit"] == 1 << 20
    assert data["peaks"].keys() <= {*report.seconds}
    assert 'memory="1MiB"' in report.as_dict()["call"]
