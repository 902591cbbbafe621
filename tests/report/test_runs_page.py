"""Several reports on one page: what is compared, where the points lie, and that the page is readable."""

from __future__ import annotations

import pytest

from coreprune.errors import InputError
from coreprune.report import render_runs
from coreprune.report.runs import compared
from report.made_up import MARK, report


def run(share: float, text: str = "", **more) -> dict:
    return {**report(3, text), "macs": {"before": 1000, "after": 1000 * share}, **more}


def accuracy(after: float) -> dict:
    return {"accuracy": {"before": 0.9, "after": after, "samples": 100}}


HALF, THIRD, QUARTER = run(0.5, **accuracy(0.88)), run(0.35, **accuracy(0.85)), run(0.25, **accuracy(0.81))
RUNS = [("half", HALF), ("quarter", QUARTER), ("third", THIRD)]


def test_points_lie_where_the_numbers_say() -> None:
    page = compared(RUNS)
    assert page["quality"] == "accuracy"
    points = page["plot"]["points"]
    assert [p["name"] for p in points] == ["quarter", "third", "half"]
    assert [p["x"] for p in points] == [25, 35, 50]
    ys = [p["y"] for p in points]
    assert ys == sorted(ys, reverse=True)  # the higher the accuracy, the nearer to the top
    assert (ys[0] - ys[1]) / (ys[1] - ys[2]) == pytest.approx((0.85 - 0.81) / (0.88 - 0.85), rel=1e-2)
    marks = {m["said"].replace("\u00a0", ""): m["at"] for m in page["plot"]["y"]}
    assert marks.keys() == {"82.0%", "84.0%", "86.0%", "88.0%"}
    assert marks["88.0%"] == ys[2]


def test_quality_is_what_all_runs_have() -> None:
    chosen = {"name": "a", "error": 0.1, "chosen": True}
    held = [run(s, accuracy=None, compared=[{**chosen, "agreement": a}]) for s, a in ((0.5, 0.9), (0.3, 0.8))]
    assert compared([("a", held[0]), ("b", held[1])])["quality"] == "same answers, held-back inputs"
    mixed = compared([("a", held[0]), ("b", held[1]), ("c", HALF)])
    assert mixed["quality"].startswith("same answers at least")  # the bound of all three, not one's accuracy
    assert "accuracy" in mixed["qualities"]
    read = {"before": 20.0, "same": 0.8, "tokens": 10, "text": "t"}
    worse = [("a", run(0.5, perplexity={**read, "after": 30.0}, accuracy=None)),
             ("b", run(0.9, perplexity={**read, "after": 21.0}, accuracy=None))]  # fmt: skip
    page = compared(worse)
    assert (page["quality"], page["better"]) == ("perplexity", "below")


def test_equal_qualities_and_no_quality_at_all() -> None:
    assert compared([("a", HALF), ("b", HALF)])["plot"]["points"][0]["y"] == pytest.approx(30, abs=0.1)
    nothing = [(n, run(0.5, accuracy=None, agreement=None)) for n in "ab"]
    page = compared(nothing)
    assert page["plot"] is None
    assert page["qualities"] == []
    assert "<svg" not in render_runs(nothing)


def test_one_run_is_no_comparison() -> None:
    with pytest.raises(InputError, match="two reports"):
        render_runs([("half", HALF)])
    with pytest.raises(InputError, match="macs"):
        render_runs([("half", HALF), ("odd", {"macs": 7})])


@pytest.mark.parametrize("options", [{}, {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}])
def test_the_page_loads_alone_and_does_not_scroll_sideways(look, options) -> None:
    seen = look(render_runs([*RUNS, (MARK, run(0.9, MARK, **accuracy(0.89)))]), **options)
    assert not seen.complaints
    assert not seen.requests
    assert seen.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert len(seen.page.query_selector_all("svg.runs circle")) == 4
    assert seen.page.evaluate("typeof hacked") == "undefined"
    for text in ("half", "88.0", "functional", MARK[:20]):
        assert text in seen.page.inner_text("table").replace("\u00a0", " ")
