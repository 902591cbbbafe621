"""The demo and the command line, as their user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from coreprune.cli.commands import app
from coreprune.demo import demo

REPO = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("from coreprune.cli import main; main()", *arguments)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, as a user has it: without the tests' shape checks."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COREPRUNE")}
    call = [sys.executable, "-c", code, *arguments]
    return subprocess.run(call, capture_output=True, text=True, cwd=REPO / "src", env=environment, check=False)


@pytest.fixture(scope="module")
def found() -> demo.Demo:
    return demo.run(seed=0)


@pytest.mark.slow
def test_the_demo_covers_its_selectors_at_three_widths(found):
    assert {(r.method, r.keep) for r in found.rows} == {(m, k) for m in demo.METHODS for k in (0.5, 0.25, 0.1)}
    assert found.accuracy > 0.95
    for row in found.rows:
        assert row.parameters < found.parameters
        assert row.widths == (*(round(row.keep * n) for n in (300, 100)), 10)
        # T10 wherever the queries were seen, T6 wherever the channels were sampled.
        selector, repair = demo.METHODS[row.method]
        more = {"T10"} if repair else set() if selector == "magnitude" else {"T6"}
        assert {c["theorem"] for c in row.certificates} == {"T8"} | more
    half = [r.accuracy_fine_tuned for r in found.rows if r.keep == 0.5]
    assert min(half) > 0.9, "three epochs recover half a network"


@pytest.mark.slow
def test_the_demo_shows_what_repair_without_data_saves(found):
    """Before any fine-tuning, and although no row but these two has been repaired."""
    at = {(r.method, r.keep): r.accuracy for r in found.rows}
    unrepaired = [m for m, (_, repair) in demo.METHODS.items() if not repair]
    for keep in demo.WIDTHS:
        assert at["functional", keep] > max(at[m, keep] for m in unrepaired)
    assert at["functional", 0.5] > found.accuracy - 0.03


@pytest.mark.slow
def test_the_report_is_json_and_the_plot_is_an_image(found, tmp_path):
    report, plot = demo.write(found, tmp_path / "new" / "folder")
    assert json.loads(report.read_text())["rows"][0]["method"] == found.rows[0].method
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_prints_a_table_and_where_the_report_lies(found, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda seed, progress: found)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0
    for word in (*demo.METHODS, "T8", "vacuous", str(tmp_path / "report.json")):
        assert word in result.stdout.replace("\n", "") or word in result.stdout
    machine = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--json"])
    assert json.loads(machine.stdout)["parameters"] == found.parameters


def test_help_names_the_commands_and_the_exit_codes():
    shown = command("--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout
    assert "Exit codes" in shown.stdout
    assert command("demo", "-h").returncode == 0


def test_a_folder_that_cannot_be_written_is_a_message_not_a_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    result = command("demo", "--out", str(tmp_path / "file" / "sub"))
    assert result.returncode == 2
    assert "Choose another folder with --out" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_option_is_refused():
    assert command("demo", "--sed", "1").returncode == 2


def test_without_scikit_learn_the_demo_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(demo.InputError, match=r"coreprune\[demo\]"):
        demo.digits()


def test_import_needs_nothing_but_the_runtime_dependencies():
    """jaxtyping, scikit-learn, matplotlib and the like are not imported, and neither are heavy parts of our own."""
    code = (
        "import sys, coreprune; "
        "print([m for m in ('jaxtyping', 'beartype', 'sklearn', 'matplotlib', 'cvxpy', 'transformers', 'rich', "
        "'typer', 'scipy') if m in sys.modules])"
    )
    shown = python(code)
    assert shown.stdout.strip() == "[]", shown.stderr


def test_the_network_comes_from_the_generator_alone():
    torch.manual_seed(1)
    one = demo.network(torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    two = demo.network(torch.Generator().manual_seed(0))
    assert torch.equal(one[0].weight, two[0].weight)
