"""Progress bars."""

from __future__ import annotations

import io
import re

from rich.console import Console

from coreprune.cli import show


def test_a_bar_shows_how_far_and_how_long() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with show.progress(console) as tell:
        tell("queries", 1, 4)
        tell("queries", 3, 4)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert re.search(r"queries\s.*3/4 \d:\d\d:\d\d left (\d|-):(\d\d|--):(\d\d|--)", text)
