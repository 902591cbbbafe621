"""Freed memory goes back to the system while a run goes on, and not so often that it costs time."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from coreprune import _heap
from coreprune._telling import telling

_SCRIPT = """
import torch
from coreprune import _heap
from coreprune._telling import telling

_heap._EVERY, _heap._GROWN = 0.0, 1
torch.empty(16 << 20, dtype=torch.uint8)  # once such a block was freed, blocks up to this size stay in the heap
start = _heap.anonymous()
held = [(torch.ones(1 << 20, dtype=torch.uint8), torch.ones(1 << 10, dtype=torch.uint8)) for _ in range(512)]
full = _heap.anonymous() - start
small = [little for _, little in held]  # between the large ones, so that the heap has holes and no free end
del held
kept = _heap.anonymous() - start
with telling(False) as tell:
    tell("repair", 1, 2)
print(full >> 20, kept >> 20, (_heap.anonymous() - start) >> 20)
"""


def _has_it() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not _has_it(), reason="the C library has no malloc_trim")
def test_a_step_of_progress_gives_freed_memory_back():
    run = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    full, kept, after = map(int, run.stdout.split())
    assert full > 480
    assert kept > 400, "it is freed, and the process holds it still"
    assert after < 64


def trims(monkeypatch, steps):
    """At which steps of progress memory is given back. steps: how large the process is, and when."""
    found, now = [], {}

    class Library:
        def malloc_trim(self, _):
            found.append(now["step"])

    monkeypatch.setattr(_heap, "_last", -_heap._EVERY)
    monkeypatch.setattr(_heap, "_before", 0)
    monkeypatch.setattr(_heap.ctypes, "CDLL", lambda _: Library())
    monkeypatch.setattr(_heap.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(_heap, "anonymous", lambda: now["size"])
    for step, (size, time) in enumerate(steps):
        now |= {"step": step, "size": size << 20, "time": time}
        _heap.tidy()
    return found


def test_only_where_the_process_has_grown(monkeypatch):
    assert trims(monkeypatch, [(100, 0), (255, 10), (256, 20), (400, 30), (513, 40)]) == [2, 4]


def test_not_again_and_again(monkeypatch):
    assert trims(monkeypatch, [(1000 * (i + 1), t) for i, t in enumerate([0, 1, 4.9, 5, 6, 10.5])]) == [0, 3, 5]


@pytest.mark.parametrize("missing", [OSError, AttributeError])
def test_other_systems_keep_what_they_have(monkeypatch, missing):
    def none(_):
        raise missing

    monkeypatch.setattr(_heap, "_last", -_heap._EVERY)
    monkeypatch.setattr(_heap, "_before", -_heap._GROWN)
    monkeypatch.setattr(_heap.ctypes, "CDLL", none)
    x = torch.ones(3)
    with telling(False) as tell:
        tell("repair", 1, 1)
    assert torch.equal(x, torch.ones(3))
