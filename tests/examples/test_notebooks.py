"""The notebooks of examples/ run, say what their text promises, and hold the output of the code that is in them."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from sweeps import thinned

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
RUNNER = runpy.run_path(str(ROOT / "examples" / "run.py"))


def shape_of(text: str) -> str:
    """Text without what differs between machines: numbers, and the blanks that align them."""
    return re.sub(r"[\d.,]+", "#", re.sub(r" +", " ", text))


@pytest.mark.slow
@pytest.mark.parametrize("path", thinned(NOTEBOOKS, len(NOTEBOOKS)), ids=lambda path: path.stem)
def test_a_notebook_prints_and_draws_what_is_stored_and_comes_out_as_its_text_says(path):
    """In one test, because each run takes most of a minute, and two tests may fall to two processes."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        fresh, names = RUNNER["run"](path)
    check_outputs(stored, fresh)
    check_results(path.stem, names)


def check_outputs(stored, fresh):
    """They are the same but for numbers, which depend on the machine."""
    assert shape_of(RUNNER["printed"](stored)) == shape_of(RUNNER["printed"](fresh)), "run `make examples`"
    for was, now in zip(RUNNER["code_cells"](stored), RUNNER["code_cells"](fresh), strict=True):
        assert [out["output_type"] for out in was["outputs"]] == [out["output_type"] for out in now["outputs"]]
        assert was["execution_count"] == now["execution_count"]


def check_results(name, names):
    """The network works before, and without data coreprune keeps more than cutting by size does."""
    if name == "detector":
        (before, _), (by_size, _), (ours, _) = (names["score"](network) for network in names["networks"].values())
        assert before > 0.75
        assert ours > before - 0.05
        assert by_size < before - 0.15
    elif name == "own_cnn":
        by_size, ours, with_images = names["curves"].values()
        assert names["accuracy"](names["model"]) > 0.95
        assert min(*ours, *with_images) > 0.85
        assert max(by_size) < 0.85
    else:
        assert name == "hugging_face"
        by_size, ours, distilled = (curve[-1] for curve in names["curves"].values())
        assert names["right"](names["model"]) > 0.97
        assert names["right"](names["small"]) > 0.9
        assert type(names["small"]).__module__.startswith("transformers.")
        assert by_size < ours < distilled


def test_the_gallery_shows_every_notebook_with_its_last_picture():
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert f"](../examples/{path.name})" in page
        assert f"]({path.stem}.png)" in page
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert RUNNER["pictures"](stored)[-1] == (ROOT / "docs" / f"{path.stem}.png").read_bytes()


def test_a_notebook_is_small_and_names_no_machine():
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert len(text) < 150_000, path.name
        assert not re.search(r"/(?:root|home|work|tmp)/", text), path.name
