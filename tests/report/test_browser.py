"""The page in a real browser: it loads alone, says what the report says, and is readable by everyone everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from coreprune.report import render
from coreprune.report.ribbon import HALF
from report.made_up import MARK, report

AXE = (Path(__file__).parent / "assets" / "axe.min.js").read_text(encoding="utf-8")
PHONE = {"viewport": {"width": 390, "height": 844}}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# Shapes with an area in the SVG of a chart; a chart without data has axes at most.
DRAWN = "[...document.querySelectorAll('.chart')].map(c => [c.dataset.chart, c.querySelectorAll('svg path').length])"
CHARTS = {"widths", "macs", "errors", "refits", "bounds"}


def with_media(page, **media) -> None:
    """The browser tells the page of the change before the frame after next."""
    page.emulate_media(**media)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture(scope="module")
def real(result) -> str:
    return render(result.report.as_dict(), images=result.queries.args[0])


def test_a_real_report_loads_alone_and_says_its_numbers(look, real, result):
    seen = look(real)
    seen.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    text = seen.page.inner_text("body")
    assert not seen.complaints
    assert not seen.requests
    data = result.report
    for number in (*data.parameters, *data.macs, *data.bytes):
        assert f"{number:,}" in text
    for group in data.groups:
        assert group.name in text
        for c in group.certificates:
            assert c.assumptions[0] in text
            assert f"{c.bound:.3g}" in text
    for name, reason in data.locked.items():
        assert name in text
        assert reason in text
    assert data.agreement.statement in text
    assert data.queries in text
    assert seen.page.evaluate("document.images.length") == 1
    assert seen.page.evaluate("document.images[0].naturalWidth") > 60


def test_every_chart_is_drawn_and_the_curves_can_be_picked(look, real):
    page = look(real).page
    drawn = dict(page.evaluate(DRAWN))
    assert drawn.keys() == CHARTS
    assert min(drawn.values()) > 4
    whole = page.inner_html("[data-chart=errors]")
    page.select_option("#curve", index=1)
    assert page.inner_html("[data-chart=errors]") != whole
    page.select_option("#curve", index=0)
    assert page.inner_html("[data-chart=errors] svg") in whole


@pytest.mark.parametrize("groups", [4, 12])
def test_the_error_curves_are_at_most_six_and_differ_without_colour(look, groups):
    page = look(render(report(groups))).page
    lines = page.evaluate(
        """[...document.querySelectorAll('[data-chart=errors] svg path[fill=none][stroke-width="2"]')]
          .filter(path => path.getBoundingClientRect().width > 300)
          .map(path => path.getAttribute('stroke-dasharray') + path.getAttribute('stroke'))"""
    )
    dashes = [line.split("#")[0] for line in lines]
    assert len(set(dashes)) == len(set(lines)) == min(groups, 6)


def test_the_bars_are_as_long_as_the_numbers_say(look, real, result):
    page = look(real).page
    heights = """colour => { const fill = getComputedStyle(document.documentElement).getPropertyValue(colour).trim();
        return [...document.querySelectorAll(`[data-chart=widths] svg path[fill="${fill}"]:not([transform])`)]
          .map(path => path.getBoundingClientRect().height); }"""
    before, after = page.evaluate(heights, "--before"), page.evaluate(heights, "--after")
    groups = result.report.groups
    free = [i for i, g in enumerate(groups) if not g.locked_because]
    assert len(before) == len(groups)
    assert len(after) == len(free)
    for i, height in zip(free, after, strict=True):
        assert math.isclose(height / before[i], groups[i].kept / groups[i].channels, rel_tol=1e-3)


def test_the_ribbon_is_as_thick_as_the_channels_say(look, real, result):
    """The thickness of the outlines in the middle of every group goes with the square root of its channels."""
    page = look(real).page
    inside = """([path, x, y]) => { const p = document.querySelector(`.ribbon path.${path}`);
        return p.isPointInFill(new DOMPoint(x, y)); }"""
    groups = result.report.groups
    (drawn,) = page.query_selector_all(".ribbon svg")
    hits = drawn.query_selector_all("rect.hit")
    assert len(hits) == len(groups)
    most = max(g.channels for g in groups)
    for hit, g in zip(hits, groups, strict=True):
        x, width = (float(hit.get_attribute(a)) for a in ("x", "width"))
        for path, n in (("before", g.channels), ("after", g.kept)):
            edge = HALF * math.sqrt(n / most)
            assert page.evaluate(inside, [path, x + width / 2, edge - 0.5])
            assert not page.evaluate(inside, [path, x + width / 2, edge + 0.5])
        assert f"{g.name}: " in drawn.inner_html()
    marked = drawn.query_selector_all("rect.whole")
    assert len(marked) == len(result.report.locked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_has_no_violations(look, scheme):
    page = look(render(report(12)), color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert len(found["passes"]) > 20
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"]] == []


def test_charts_follow_the_colour_scheme(look, real):
    page = look(real, color_scheme="light").page
    light = page.inner_html("[data-chart=widths] svg")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    with_media(page, color_scheme="dark")
    dark = page.inner_html("[data-chart=widths] svg")
    assert page.evaluate(background) != "rgb(255, 255, 255)"
    assert "#0b5cad" in light
    assert "#0b5cad" not in dark
    assert "#62aef5" in dark


def test_paper_is_light_and_unfolded_and_the_screen_comes_back(look):
    page = look(render(report(30)), color_scheme="dark").page
    folded = "document.querySelectorAll('details:not([open])').length"
    width = "Math.max(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width))"
    before, wide = page.evaluate(folded), page.evaluate(width)
    assert before > 0
    with_media(page, media="print", color_scheme="dark")
    assert page.evaluate(folded) == 0
    assert page.evaluate(width) <= 690 < wide
    assert "#0b5cad" in page.inner_html("[data-chart=widths] svg")
    with_media(page, media="screen", color_scheme="dark")
    assert page.evaluate(folded) == before
    assert page.evaluate(width) == wide
    assert "#62aef5" in page.inner_html("[data-chart=widths] svg")
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    assert paper.count(b"/Type /Page\n") > 3


@pytest.mark.parametrize("groups", [3, 200])
def test_a_phone_does_not_scroll_sideways(look, groups):
    html = render(report(groups, "with-a-name-that-nobody-would-want-to-read-on-a-phone." * 2))
    assert len(html.encode()) < 1_600_000
    seen = look(html, **PHONE)
    seen.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert seen.page.evaluate(OVERFLOW) <= 0
    assert min(dict(seen.page.evaluate(DRAWN)).values()) > 4
    assert not seen.complaints


def test_hostile_names_are_only_text(look):
    seen = look(render(report(10, MARK), title=MARK))
    page = seen.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = 0
    for chart in page.query_selector_all(".chart"):
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        for across in (0.2, 0.35, 0.5, 0.65, 0.8):
            for down in (0.3, 0.55, 0.7):
                page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
        shown += MARK[:20] in chart.inner_text()
    assert shown >= 3  # the tooltips did show the names
    for i in range(1, 4):
        page.select_option("#curve", index=i)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert MARK[:60] in page.inner_text("#layers")
    assert "{{7*7}}" in page.inner_text("h1")
    assert not seen.complaints
    assert not seen.requests


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"groups": [{"name": "a", "channels": 4, "kept": 2}]},
        {"groups": [{"name": "a", "channels": 2, "kept": 2, "errors": [math.nan, math.inf, 0.0], "macs": [0, 0]}]},
        {"parameters": {"before": 0, "after": 0}, "settings": {"method": "loewner"}, "agreement": None},
        {"latency": {"rows": [{"batch": 1}]}, "refits": [{"weight": "w", "before": 0.0, "after": 0.0}]},
        {k: v for k, v in report(3).items() if k not in ("agreement", "latency", "settings")},
    ],
    ids=["nothing", "one group", "no finite errors", "zeros", "empty rows", "without optional keys"],
)
def test_what_is_absent_is_left_out(look, data):
    seen = look(render(data))
    assert not seen.complaints
    assert seen.page.inner_text("h1") == "Pruning report"
    assert json.loads(seen.page.inner_text("#report-data") or seen.page.text_content("#report-data")) is not None
    absent = [s for s in ("repair", "errors", "certificates") if s not in seen.page.inner_html("main")]
    assert all(seen.page.query_selector(f"nav a[href='#{s}']") is None for s in absent)


def test_every_link_of_the_contents_leads_somewhere(look, real):
    page = look(real).page
    for link in page.query_selector_all("nav a"):
        assert page.query_selector(link.get_attribute("href")) is not None
