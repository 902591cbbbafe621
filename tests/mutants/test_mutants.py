"""Every mutant of `make mutants` still fits the source, and its last run is written down. No fault is planted here."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from mutants import MUTANTS
from mutants.mutant import ROOT

RESULTS = {e["name"]: e for e in json.loads(Path(__file__).with_name("results.json").read_text())["mutants"]}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_it_applies(mutant):
    """Where the source has moved on, so must the mutant; a fault that is no Python shows nothing."""
    assert mutant.applied() != mutant.applied().replace(mutant.new, mutant.old) or not mutant.new
    ast.parse(mutant.applied())
    assert mutant.fault
    for test in mutant.tests:
        assert (ROOT / "tests" / test.partition("::")[0]).exists()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_it_was_killed_or_is_explained(mutant):
    """`make mutants` writes this down; a new mutant is run before it is committed."""
    assert RESULTS[mutant.name]["outcome"] == ("equivalent" if mutant.equivalent else "killed")


def test_there_are_many_and_each_has_a_name_of_its_own():
    assert len(MUTANTS) >= 60
    assert max(Counter(m.name for m in MUTANTS).values()) == 1
    folders = Counter(m.file.partition("/")[0] for m in MUTANTS)
    assert min(folders[f] for f in ("geometry", "coreset", "graph", "queries", "pruning", "artifact")) >= 5
