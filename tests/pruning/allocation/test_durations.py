"""Times as text, and budgets that are a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from coreprune import Budget, BudgetError
from coreprune.pruning.allocation.durations import as_time, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8ms", 8e-3),
        ("1.5s", 1.5),
        ("800us", 8e-4),
        (" 8 ms ", 8e-3),
        ("800µs", 8e-4),
        ("800μs", 8e-4),
        ("1e3us", 1e-3),
    ],
)
def test_times(text, seconds):
    assert seconds_of(text) == pytest.approx(seconds)
    assert Budget(latency=text).limit == text


@pytest.mark.parametrize(("seconds", "text"), [(2.0, "2 s"), (8.25e-3, "8.25 ms"), (1e-3, "1 ms"), (4.2e-5, "42 us")])
def test_times_for_people(seconds, text):
    assert as_time(seconds) == text


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"latency": "8 parsecs"}, "'8 parsecs' is not a time. Write a number and one of the units s, ms and us"),
        ({"latency": "8"}, "is not a time"),
        ({"latency": ""}, "is not a time"),
        ({"latency": "ms"}, "is not a time"),
        ({"latency": "half"}, "is not a time"),
        ({"latency": "1-2ms"}, "is not a time"),
        ({"latency": "1e999s"}, "is not a time"),
        ({"latency": "nan ms"}, "is not a time"),
        ({"latency": "0ms"}, "no time to run in"),
        ({"latency": "-8ms"}, "no time to run in"),
        ({"latency": 0}, "latency=0 would remove every channel"),
        ({"latency": -0.5}, "would remove every channel"),
        ({"latency": 1}, "not below the dense model's own time"),
        ({"latency": 2.0}, "latency=2 is not below .*a time as text: latency='8ms'"),
        ({"latency": float("nan")}, "must be a number"),
        ({"latency": True}, "must be a number"),
        ({"latency": [8]}, "must be a number"),
        ({"latency": 0.5, "macs": 0.5}, "macs and latency are given"),
        ({"latency": 0.5, "absolute": True}, "an absolute time is text"),
        ({"latency": 0.5, "batch": 0}, "batch must be a whole number ≥ 1"),
        ({"latency": 0.5, "batch": 1.5}, "batch must be a whole number ≥ 1"),
        ({"latency": 0.5, "batch": None}, "batch must be a whole number ≥ 1"),
        ({"latency": 0.5, "runtime": "tensorrt"}, "runtime must be one of eager, compile, onnx, but it is 'tensorrt'"),
        ({"latency": 0.5, "runtime": None}, "runtime must be one of"),
        ({"latency": 0.5, "table": ""}, "table must be the path of a file"),
        ({"latency": 0.5, "table": 7}, "table must be the path of a file"),
        ({"macs": 0.5, "batch": 2}, "batch say how a latency is measured, but the budget limits macs"),
        (
            {"runtime": "onnx", "table": "t"},
            "runtime and table say how a latency is measured, but the budget limits keep",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_budgets_of_time(rules, match):
    with pytest.raises(BudgetError, match=match):
        Budget(**rules)


def test_a_table_is_kept_as_text():
    """Plans and reports are JSON, which knows no paths."""
    assert Budget(latency=0.5, table=Path("a") / "b").table == str(Path("a") / "b")
