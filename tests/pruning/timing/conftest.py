"""Clocks of the tests in place of that of this machine."""

from __future__ import annotations

import pytest
from fake_clocks import Clocks

from coreprune.pruning.timing import pace


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """install(Clocks(...)): use these; the cache folder of the user is an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put(clocks: Clocks) -> Clocks:
        monkeypatch.setattr(pace, "_clock", clocks)
        return clocks

    return put
