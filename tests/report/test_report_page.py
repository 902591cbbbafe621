"""What the page is made of: numbers and words, curves, the recipe, the gallery, the files beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coreprune import L2, Budget, prune
from coreprune.errors import InputError
from coreprune.pruning import GroupReport, Report
from coreprune.pruning.settings import Settings
from coreprune.report import render, words, write
from coreprune.report.gallery import contact_sheet
from coreprune.report.view import view
from report.made_up import MARK, report

ASSETS = [Path(__file__).parents[2] / "src/coreprune/report/assets", Path(__file__).parent / "assets"]


def test_the_file_is_what_render_returns(result, tmp_path):
    data, images = result.report.as_dict(), result.queries.args[0]
    write(data, tmp_path / "report.html", images)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(data, images=images)


def test_the_page_can_be_made_from_the_json_alone(result):
    import json

    assert render(json.loads(result.report.to_json())) == render(result.report.as_dict())


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (["a list"], "the report"),
        ({"groups": "two"}, "groups"),
        ({"groups": [{"name": "a"}, 3]}, r"groups\[1\]"),
        ({"macs": 7}, "macs"),
        ({"settings": ["seed"]}, "settings"),
        ({"latency": {"rows": {"batch": 1}}}, "rows"),
        ({"agreement": "T11"}, "certificate"),
        ({"memory": {"peaks": 3}}, "peaks"),
    ],
)
def test_other_data_is_refused_by_name(data, named):
    with pytest.raises(InputError, match=named):
        render(data)


def test_macs_of_the_groups_add_up_in_the_order_of_the_forward(result):
    groups = result.report.groups
    assert [g.name for g in groups] == ["0", "2", "4"]
    for when in (0, 1):
        assert sum(g.macs[when] for g in groups) == result.report.macs[when]


def test_groups_are_in_the_order_of_use_not_of_registration():
    class Backwards(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.second, self.first = torch.nn.Linear(6, 3), torch.nn.Linear(5, 6), torch.nn.Linear(4, 5)

        def forward(self, x):
            return self.last(self.second(self.first(x).relu()).relu())

    rows = prune(Backwards(), torch.zeros(1, 4), method="l2", queries=None).report.groups
    assert [g.name for g in rows] == ["first", "second", "last"]


def test_the_chosen_point_lies_on_the_curve_and_is_the_error_on_unseen_queries(result):
    report = result.report.as_dict()
    page = view(report)
    unseen = {g["name"]: g["held_out"][g["kept"] // g["unit"]] for g in report["groups"] if g["held_out"]}
    free = [g for g in page["groups"] if g["curve"]]
    assert len(free) == 2
    for g in free:
        assert g["error"] == pytest.approx(unseen[g["name"]])
        assert [round(100 * g["share"], 3), float(f"{g['error']:.4g}")] in g["curve"]


def test_long_curves_are_thinned_and_keep_their_ends():
    group = {"name": "a", "channels": 2048, "kept": 777, "errors": [0.5 * (1 - k / 2048) for k in range(2049)]}
    curve = view({"groups": [group]})["groups"][0]["curve"]
    assert len(curve) < 70
    assert curve[0] == [0.0, 0.5]
    assert any(abs(x - 100 * 777 / 2048) < 1e-3 for x, _ in curve)
    assert curve == sorted(curve, key=lambda point: -point[1])


def test_what_all_certificates_assume_is_said_once_and_kinds_stay_apart():
    page = view(report(5))
    assert [k["kind"] for k in page["certificates"]] == ["proved", "sampled", "measured"]
    assert [[t["theorem"] for t in k["theorems"]] for k in page["certificates"]] == [["T8"], ["T6", "T11"], ["T10"]]
    (proved,) = page["certificates"][0]["theorems"]
    assert proved["assumptions"] == ["an assumption of T8 "]
    assert not proved["own"]
    data = report(5)
    for i, row in enumerate(data["groups"]):
        row["certificates"][1]["assumptions"].append(f"{i} draws")
    (proved,) = view(data)["certificates"][0]["theorems"]
    assert proved["assumptions"] == ["an assumption of T8 "]
    assert [row["own"] for row in proved["rows"]] == [f"{i} draws" for i in range(5)]


# The gallery


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 224)])
def test_a_contact_sheet_shows_every_image_stretched(channels, side, gen):
    images = 5 + 0.01 * torch.rand(70, channels, side, side, generator=gen)
    sheet = contact_sheet(images)
    assert (sheet.shown, sheet.total) == (64, 70)
    shown = pixels(sheet.uri)
    cell = min(side, 56)
    assert shown.shape == (8 * (cell + 1) - 1, 8 * (cell + 1) - 1, 3)
    assert shown[:cell, :cell].min() < 40
    assert shown[:cell, :cell].max() > 215
    assert len(sheet.uri) < 450_000


def test_pixels_keep_their_places_and_colours():
    image = torch.zeros(1, 3, 8, 10)
    image[0, 0, :, :5], image[0, 2, 4:] = 1.0, 7.0
    shown = pixels(contact_sheet(image).uri)
    assert shown.shape == (8, 10, 3)
    assert (shown[..., 0] == np.where(np.arange(10) < 5, 255, 0)).all()
    assert (shown[..., 1] == 128).all()
    assert (shown[4:, :, 2] == 255).all()
    assert (shown[:4, :, 2] == 0).all()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 16, dtype=torch.int64),
        torch.zeros(4, 50),
        torch.zeros(4, 16),
        torch.zeros(4, 2, 16, 16),
        torch.zeros(0, 3, 16, 16),
        torch.zeros(3),
        torch.tensor(1.0),
    ],
    ids=["tokens", "no square", "too small", "two channels", "none", "one vector", "a number"],
)
def test_what_is_no_image_is_no_gallery(images):
    assert contact_sheet(images) is None
    assert "Contact sheet" not in render({}, images=images)


def test_flat_vectors_are_images_and_numbers_that_are_none_are_black(gen):
    images = torch.rand(3, 64, generator=gen)
    images[1, :8], images[2] = float("nan"), float("inf")
    assert pixels(contact_sheet(images).uri).shape == (17, 17, 3)


# Words


def test_numbers_read_well():
    gap = "\u00a0"
    assert [words.short(x) for x in (0, 999, 1234, 999_600, 1_234_567, None)] == [
        "0", "999", f"1.23{gap}k", f"1{gap}M", f"1.23{gap}M", "–"
    ]  # fmt: skip
    assert [words.percent(x) for x in (0, 1, 0.1234, 0.000123, 6.612e-7, 1e-9, None)] == [
        f"0.0{gap}%", f"100.0{gap}%", f"12.3{gap}%", f"0.0123{gap}%", f"0.0000661{gap}%", f"< 0.000001{gap}%", "–"
    ]  # fmt: skip
    assert [words.seconds(x) for x in (2.5, 0.0123, 4e-6, None)] == [f"2.5{gap}s", f"12.3{gap}ms", f"4{gap}µs", "–"]
    assert words.significant(None) == "∞"
    assert [words.loss(x) for x in (0, 0.02134, None)] == [f"0.00{gap}%", f"2.13{gap}%", "–"]
    assert [words.at_most(x) for x in (0, 0.0295, 0.02951, None)] == [f"0.00{gap}%", f"2.95{gap}%", f"2.96{gap}%", "–"]


# The files beside the page


@pytest.mark.parametrize("folder", ASSETS, ids=["page", "tests"])
def test_third_party_files_are_those_that_their_readme_names(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+\.js) .* \| ([0-9a-f]{64}) \|$", text, re.M)
    assert rows
    for name, digest in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    for licence in re.findall(r"`([A-Z]+-[\w-]+\.txt)`", text):
        assert (folder / licence).stat().st_size > 100


def test_no_script_can_end_its_element_early():
    for name in ("echarts.common.min.js", "page.js"):
        text = (ASSETS[0] / name).read_text(encoding="utf-8").lower()
        assert "</script" not in text
        assert "<!--" not in text


def test_colours_have_contrast_in_both_schemes():
    """WCAG 2: 4.5 for text, 3 for what is drawn."""
    css = (ASSETS[0] / "page.css").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.split(r"@media screen", css)[:2]]
    assert len(schemes) == 2

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def ratio(a: str, b: str) -> float:
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for scheme in schemes:
        for ground in ("page", "panel"):
            assert all(ratio(scheme[name], scheme[ground]) >= 4.5 for name in ("text", "muted", "link", "warn"))
        for name in ("before", "after", "whole", *(f"c{i}" for i in range(6))):
            assert ratio(scheme[name], scheme["page"]) >= 3, name
        for ground in ("warn-panel", "good-panel"):
            assert all(ratio(scheme[name], scheme[ground]) >= 4.5 for name in ("text", "link"))


# In a terminal and in a notebook


def large(groups: int, text: str = "") -> Report:
    def row(i: int) -> GroupReport:
        whole = i % 10 == 9
        reason = f"shared{text}" if whole else None
        return GroupReport(f"layer.{i}{text}", 64, 64 if whole else 20, locked_because=reason)

    sizes = (1000, 500), (9_000_000, 4_000_000), (4000, 2000)
    asked = Settings(Budget(), L2(), None, None, (), None, None, seed=0, delta=0.01)
    return Report(tuple(map(row, range(groups))), *sizes, asked, queries=f"some{text}", model=f"Net{text}")


def test_a_terminal_is_not_flooded():
    text = str(large(200))
    assert len(text.splitlines()) < 40
    assert max(map(len, text.splitlines())) < 120
    assert "… and 156 more" in text
    assert "whole: layer.9, layer.19, layer.29 and 17 more: shared" in text
    assert "9,000,000 → 4,000,000  (44.4%)" in text


def test_a_report_in_the_terminal_names_groups_and_evidence(result):
    text = str(result.report)
    for word in (
        "parameters",
        "queries",
        "agreement",
        "repair",
        "T8 proved",
        "refit error",
        "not other inputs",
        "model output",
    ):
        assert word in text


class Balanced(HTMLParser):
    """Fails for elements that are not closed; collects their names."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_notebook_gets_static_html_and_hostile_names_are_text():
    html = large(30, MARK)._repr_html_()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert parser.seen == {
        "div",
        "b",
        "p",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        *("details", "summary", "ul", "li"),
    }
    assert "9,000,000" in html
    assert "27 groups that may shrink" in html


# The overview


def overview(data) -> str:
    html = render(data)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html[html.index('id="overview"') : html.index("</section>")]))


def test_the_overview_answers_the_readers_questions_before_it_certifies():
    text = overview(report(3))
    places = [text.index(part) for part in ("Size", "Speed", "Quality", "What it took", "What is certain")]
    assert places == sorted(places)
    assert "87.3 % accuracy" in text
    assert "1.73× as fast at batch 1" in text
    assert "1.73× at batch 8" in text
    assert "≥ 96.6 % of the answers unchanged" in text
    assert "3 GB of memory at most" in text
    assert "no other inputs, and it does not say whether the answers are right" in text


def test_the_overview_begins_with_what_the_caller_has_to_know():
    text = overview({**report(3), "notes": ["almost nothing was removed <b>"]})
    assert text.index("almost nothing was removed &lt;b&gt;") < text.index("Size")


def test_the_overview_says_what_is_not_known():
    data = {k: v for k, v in report(3).items() if k not in ("agreement", "path", "latency", "accuracy")}
    text = overview(data)
    assert "Not measured." in text
    assert "Not known." in text
    assert "none covers the whole network" in text


def test_a_speed_up_within_the_noise_is_no_headline():
    data = report(3)
    assert "noise" not in overview(data)
    data["latency"]["rows"][0]["after"] = {"median": 0.0071, "low": 0.007, "high": 0.0125}
    assert "Speed 1.73× as fast at batch 8" in overview(data)
    assert "batch 1: no difference beyond the noise" in overview(data)
    data["latency"]["rows"][1]["after"] = data["latency"]["rows"][0]["after"]
    assert "Speed = no difference beyond the noise" in overview(data)
    assert "×" not in overview(data).split("Quality")[0]


def test_every_batch_size_has_a_scale_of_its_own():
    data = report(3)
    data["latency"]["rows"][1] |= {"before": {"median": 8.0, "low": 8.0, "high": 10.0}, "after": {"median": 4.0}}
    widths = re.findall(r'<i class="(before|after)" style="width: ([\d.]+)%"', render(data))
    assert [(name, float(width)) for name, width in widths] == [
        ("before", round(100 * 0.0123 / 0.0131, 1)), ("after", round(100 * 0.0071 / 0.0131, 1)),
        ("before", 80.0), ("after", 40.0),
    ]  # fmt: skip


def test_a_bound_that_says_nothing_is_not_given_as_goodness():
    data = report(3)
    data["agreement"] |= {"bound": 0.95, "vacuous": True}
    assert "of the answers unchanged" not in overview(data)
    assert "No evidence of agreement" in overview(data)


def test_a_certified_share_is_rounded_down():
    """The page said ≥ 89.5 % where 89.4789 % was certified, and the command line 89.4 %."""
    data = report(3)
    data["agreement"] |= {"bound": 1 - 0.894789, "trivial": 0.9, "vacuous": False}
    page = render(data)
    assert "89.4\u00a0%" in page
    assert "89.5\u00a0%" not in page
