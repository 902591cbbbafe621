"""What README.md and docs/ say of the project is there: links, functions, tests, theorems."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_is_short_and_in_its_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 700
    assert re.findall(r"^## (.+)$", text, re.M) == [
        "Install",
        "Use it",
        "What it does that others do not",
        "What to expect",
        "Limits",
        "How to cite",
    ]
    assert text.index("![") < text.index("## Install")


def test_the_readme_names_no_theorem_by_its_number():
    """A number alone says nothing to a visitor."""
    assert not re.search(r"\bT\d", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_link_to_a_file_of_the_project_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_theory_page_names_functions_and_tests_that_exist():
    import importlib

    text = (ROOT / "docs" / "theory.md").read_text()
    files = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert files
    for file in files:
        assert (ROOT / file).exists(), file
    names = set(re.findall(r"`(geometry|coreset)\.(\w+)", text))
    assert {"mvee", "linf_coreset", "peel", "sampling_bound", "merge_bound", "lewis_weights"} <= {n for _, n in names}
    for layer, name in names:
        module = importlib.import_module(f"coreprune.{layer}")
        assert hasattr(module, name) or find_spec(f"coreprune.{layer}.{name}"), f"{layer}.{name}"


def test_every_theorem_is_in_a_docstring_of_the_code():
    sources = "".join(p.read_text() for p in (ROOT / "src" / "coreprune").rglob("*.py"))
    for theorem in ("T1", "T2", "T3", "T4", "T4′", "T5", "T6", "T7", "T8"):
        assert re.search(rf"\b{theorem}(?![′\d])", sources), theorem
