"""What objects show of themselves: no entries of tensors, and tables in notebooks."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
import torch
from torch import nn

from coreprune import Budget, compare_latency, list_groups, make_queries, prune
from coreprune._shown import html_table
from coreprune.finetune import Batches
from report.test_report_page import Balanced

HOMES = ("queries", "selectors", "coreset", "geometry", "finetune", "perplexity", "risk", "latency", "pruning")


def holds_tensors(kind: type) -> bool:
    return any(f.repr and any(w in str(f.type) for w in ("Tensor", "Float[", "Int[")) for f in dataclasses.fields(kind))


def public() -> list[type]:
    found = set()
    for home in HOMES:
        module = importlib.import_module(f"coreprune.{home}")
        names = getattr(module, "__all__", dir(module))
        found |= {c for n in names if inspect.isclass(c := getattr(module, n)) and dataclasses.is_dataclass(c)}
    return sorted((c for c in found if holds_tensors(c)), key=lambda c: c.__name__)


@pytest.mark.parametrize("kind", public(), ids=lambda c: c.__name__)
def test_no_public_object_prints_its_tensors(kind):
    assert not hasattr(kind.__repr__, "__wrapped__")  # as those have that dataclass writes


@pytest.fixture(scope="module")
def result():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return prune(model, x[:1], Budget(macs=0.6), queries=x), model, x


def test_shapes_stand_for_tensors(result):
    found, _, x = result
    shown = [repr(found), repr(found.queries), repr(found.rankings), repr(found.report.groups), repr(found.plan)]
    shown += [repr(make_queries(nn.Linear(6, 2), x[:1], x)), repr(Batches(x, x[:, 0].long(), 8, torch.Generator()))]
    assert all("tensor(" not in text and "Parameter" not in text for text in shown)
    assert all("<64, 6: float32>" in text for text in shown[-2:])
    assert len(shown[0]) < 200


def test_notebooks_get_tables(result):
    found, model, x = result
    certificate = next(c for g in found.report.groups for c in g.certificates)
    timed = compare_latency(model, found.model, x[:1], batch_sizes=(1,), seconds=0.05)
    for shown, said in (
        (list_groups(model, x[:1]), "model output"), (timed, "speed-up"), (certificate, certificate.theorem),
        (found, "parameters"),
    ):  # fmt: skip
        html = shown._repr_html_()
        parser = Balanced()
        parser.feed(html)
        assert parser.open == []
        assert "table" in parser.seen
        assert said in html
    assert "2 groups" in repr(list_groups(model, x[:1]))


def test_names_are_text_in_notebooks():
    assert "<script>" not in html_table(("<script>", "b"), [("<script>", "1")], "<script>")
    assert html_table(("a", "b"), [("1", "")], "c").count("<th ") == 1
