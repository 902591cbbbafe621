"""The site builds without a warning, is complete, and fetches nothing from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["", ".artifact", ".coreset", ".geometry", ".graph", ".pruning", ".queries", ".report", ".selectors"]
DESCRIBED_BY_OTHERS = {"SELECTORS", "QUERIES"}  # tables of what has an entry of its own

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> dict[str, str]:
    return {str(p.relative_to(site).parent): p.read_text(encoding="utf-8") for p in site.rglob("index.html")}


def text(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


def test_every_public_name_has_an_entry(site):
    """`save`, `plan` and others are also names of modules, whose entries must not stand in their place."""
    heading = (
        r'<h\d id="(coreprune\.[^"]+)" class="doc doc-heading">\s*<span class="doc doc-object-name doc-(\w+)-name">'
    )
    found = {m for page in pages(site).values() for m in re.findall(heading, page)}
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(f"coreprune{package}")
        for name in set(getattr(module, "__all__", [])) - DESCRIBED_BY_OTHERS:
            kind = "class" if isinstance(getattr(module, name), type) else "function"
            if not any(path.rpartition(".")[2] == name and what == kind for path, what in found):
                missing.append(f"coreprune{package}.{name}")
    assert not missing


def test_the_descriptions_of_arguments_are_lists(site):
    page = re.sub(r"</?p>\n*", "", pages(site)["reference/prune"])
    assert "<li><code>budget</code>: what may stay; half of every group when absent.</li>" in re.sub(
        r"</?p>\n*", "", page
    )
    assert "<li><code>macs</code>, <code>params</code>, <code>bytes</code>: what the whole" in re.sub(
        r"</?p>\n*", "", page
    )


def test_the_page_of_the_command_line_has_every_command(site):
    from coreprune.cli import app

    page = text(pages(site)["reference/cli"])
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert len(names) >= 7
    for name in names:
        assert f"$ coreprune {name} [OPTIONS]" in page
    assert "--exclude '*attention*'" in page  # whose stars markdown would take for emphasis


def test_the_first_page_is_the_readme(site):
    assert "Limits" in text(pages(site)["."])
    assert (site / "report.png").exists()


def test_nothing_is_fetched_from_elsewhere(site):
    fetches = r'(?:src|srcset)="(?:https?:)?//[^"]+"|<link[^>]+href="(?:https?:)?//[^"]+"|url\((?:https?:)?//[^)]+\)'
    for name, page in pages(site).items():
        assert not re.findall(fetches, page), name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_no_formula_is_taken_for_emphasis(site):
    for name, page in pages(site).items():
        assert not re.findall(r"<em>[^<]*[‖Σ=|≤][^<]*</em>", page), name
