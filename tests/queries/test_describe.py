"""The description of a source: equal for what behaves the same, in every process, and different otherwise."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coreprune.queries import Strokes
from coreprune.queries.describe import description, shown

SCALE = 2.0


def scaled(n: int, generator: Any) -> Any:
    return SCALE * helper(n)


def helper(n: int) -> int:
    return n


def closing(value: Any) -> Any:
    return lambda n, generator: value


@dataclass(frozen=True)
class Mine:
    size: int = 3

    def __call__(self, n: int, generator: Any) -> Any:
        return self.size


class Plain:
    def __call__(self, n: int, generator: Any) -> None:
        return None


class Printed(Plain):
    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"Printed({self.size})"


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (Strokes(), Strokes(), Strokes(turn=0.5)),
        (Mine(), Mine(3), Mine(4)),
        (closing(1), closing(1), closing(2)),
        (closing([1, "a", None]), closing([1, "a", None]), closing([1, "b", None])),
        (closing({"a": {1, 2}}), closing({"a": {2, 1}}), closing({"a": {1, 3}})),
        (closing(torch.ones(3)), closing(torch.ones(3)), closing(torch.ones(3, 1))),
        (closing(np.ones(3)), closing(np.ones(3)), closing(np.zeros(3))),
        (closing(closing(1)), closing(closing(1)), closing(closing(2))),
        (partial(scaled, generator=1), partial(scaled, generator=1), partial(scaled, generator=2)),
        (Mine(3).__call__, Mine(3).__call__, Mine(4).__call__),
        (Printed(1), Printed(1), Printed(2)),
        (lambda n, generator: n + 1, lambda n, generator: n + 1, lambda n, generator: n + 2),
        (lambda n, g=1: n, lambda n, g=1: n, lambda n, g=2: n),
        (Path("a"), Path("a"), Path("b")),
        (np.float64(1.0), np.float64(1.0), np.float32(1.0)),
    ],
)
def test_same_behaviour_same_text(one: Any, same: Any, other: Any) -> None:
    assert description(one) is not None
    assert description(one) == description(same)
    assert description(one) != description(other)
    assert " at 0x" not in str(description(one))


def test_constants_and_helpers_of_the_module_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = description(scaled)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    changed = description(scaled)
    monkeypatch.undo()
    assert description(scaled) == before != changed
    monkeypatch.setattr(helper, "__code__", (lambda n: n + 1).__code__)
    assert description(scaled) != before


def test_weights_of_a_module_count() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert description(closing(a)) == description(closing(b))
    with torch.no_grad():
        b.bias[0] += 1
    assert description(closing(a)) != description(closing(b))


@pytest.mark.parametrize("odd", [Plain(), closing(object()), torch.Generator(), closing(Plain()), object()])
def test_what_has_no_stable_text_has_none(odd: Any) -> None:
    assert description(odd) is None


def test_a_function_that_calls_itself_is_described() -> None:
    def count(n: int, generator: Any) -> int:
        return count(n - 1, generator) if n else 0

    assert description(count) is not None


def test_another_process_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "import torch\nSIZES = {'a', 'b', 'c', 'd'}\ndef draw(n, generator, pick=frozenset('abcdef')):\n"
        "    return [x for x in pick if x in {'u', 'v', 'w', 'x'}], torch.float32\n"
    )
    code = "from other import draw; from coreprune.queries.describe import description; print(description(draw))"
    texts = set()
    for seed in ("0", "1", "2"):  # sets of strings iterate in another order for each
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2] / 'src'}"}
        texts.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(texts) == 1
    assert texts.pop().strip() != b"None"


def test_reports_show_names_and_options() -> None:
    assert shown(scaled) == f"{__name__}:scaled"
    assert shown(Strokes(turn=0.5)).startswith("Strokes(count=(1, 3)")
    assert shown(Plain()) == "Plain"
    assert shown(Printed(3)) == "Printed(3)"
