"""Progress: bars in a terminal and in a notebook, lines where there is neither, and what is refused."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import io
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import coreprune
from coreprune import InputError, Tuning
from coreprune._bars import bars
from coreprune._chatter import without_chatter
from coreprune._telling import Lines, telling
from coreprune.finetune import Batches
from coreprune.pruning.distill.distill import distill_
from coreprune.queries.sources.batch_norm_inversion import invert

SOURCE = Path(coreprune.__file__).parents[1]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
X = torch.zeros(1, 4)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.getvalue())


@pytest.fixture
def plain(monkeypatch) -> None:
    """Nothing in the environment that tells rich what to draw."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def stderr(plain, monkeypatch) -> Callable[[Any], Any]:
    """stderr(stream) puts a stream in the place of standard error. pytest puts its own there before a test begins."""

    def put(stream: Any) -> Any:
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the log of the progress says."""
    said: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert record.levelno == logging.INFO
            said.append(record.getMessage())

    log, handler = logging.getLogger("coreprune.progress"), Heard()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield said
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


# --- where it is shown -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("progress", [None, True])
def test_a_bar_in_a_terminal_shows_how_far_and_how_long(stderr, lines, progress):
    terminal = stderr(Terminal())
    with telling(progress) as tell:
        tell("queries", 1, 4)
        tell("queries", 3, 4)
    assert re.search(r"queries\s.*3/4 \d:\d\d:\d\d left (\d|-):(\d\d|--):(\d\d|--)", terminal.text)
    assert not lines
    assert sys.stderr is terminal


def test_a_phase_that_begins_again_counts_from_the_start(stderr):
    terminal = stderr(Terminal())
    with telling() as tell:
        tell("repair", 4, 4)
        tell("repair", 1, 2)
    assert terminal.text.rpartition("repair")[2].split("left")[0].split()[1] == "1/2"


def test_the_bars_end_with_the_block_that_fails(stderr):
    terminal = stderr(Terminal())
    with contextlib.suppress(KeyError), telling() as tell:
        tell("queries", 1, 4)
        raise KeyError("theirs")
    assert sys.stderr is terminal
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_what_is_printed_stays_on_its_own_stream(stderr, monkeypatch):
    """Before, rich took standard output to the terminal, although it was a file."""
    terminal = stderr(Terminal())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with telling() as tell:
        tell("queries", 1, 4)
        print("from a source of the user's")
    assert sys.stdout.getvalue() == "from a source of the user's\n"
    assert "user's" not in terminal.text


def test_a_line_for_every_phase_where_there_is_no_terminal(stderr, lines):
    pipe = stderr(io.StringIO())
    with telling() as tell:
        tell("capture", 0, 1)
        tell("capture", 1, 1)
        for done in range(1, 5001):
            tell("queries", done, 5000)
    assert lines == ["capture", "queries: 1 of 5,000"]
    assert pipe.getvalue() == ""


def test_who_asks_for_progress_sees_it_without_a_terminal_too(stderr, lines):
    pipe = stderr(io.StringIO())
    with telling(True) as tell:
        tell("queries", 1, 4)
        tell("queries", 4, 4)
    assert pipe.getvalue() == "queries: 1 of 4\n"
    assert not lines


@pytest.mark.parametrize("stream", ["absent", "closed", "dumb"])
def test_a_standard_error_that_shows_nothing(plain, monkeypatch, lines, stream):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"absent": None, "closed": closed, "dumb": Terminal()}[stream])
    if stream == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    with telling() as tell:
        tell("queries", 1, 4)
    assert lines == ["queries: 1 of 4"]
    if stream == "absent":
        with telling(True) as tell:
            tell("queries", 1, 4)


def test_without_rich_there_are_lines(stderr, monkeypatch, lines):
    terminal = stderr(Terminal())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with telling() as tell:
        tell("queries", 1, 4)
    assert lines == ["queries: 1 of 4"]
    with telling(True) as tell:
        tell("queries", 1, 4)
    assert terminal.getvalue() == "queries: 1 of 4\n"


def test_bars_that_somebody_else_draws_are_left_alone(stderr, lines):
    terminal = stderr(Terminal())
    with Progress(console=Console(stderr=True)):
        assert bars() is None
        with telling() as tell:
            tell("queries", 1, 4)
    assert lines == ["queries: 1 of 4"]
    assert "queries" not in terminal.text


class ZMQInteractiveShell:
    """What rich looks for: the class that runs the cells of a notebook."""


@pytest.fixture
def notebook(plain, monkeypatch) -> list[str]:
    """Every picture that the cell has shown, as HTML. Jupyter itself is none of our packages."""
    pictures: list[str] = []

    class Place:
        def update(self, shown):
            pictures.append(shown._repr_mimebundle_((), ())["text/html"])

    def display(shown, display_id):
        assert display_id is True
        Place().update(shown)
        return Place()

    module = types.ModuleType("IPython.display")
    vars(module)["display"] = display
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return pictures


@pytest.mark.parametrize("progress", [None, True])
def test_a_bar_in_a_notebook(notebook, stderr, lines, progress):
    pipe = stderr(io.StringIO())
    with telling(progress) as tell:
        assert not notebook  # an empty picture is none
        for done in range(1, 1001):
            tell("queries", done, 1000)
    assert re.search(r"queries.*1000/1000", notebook[-1])
    assert 2 <= len(notebook) < 100  # drawn a few times a second, and at the end
    assert pipe.getvalue() == ""
    assert not lines


def test_nothing_in_a_notebook_if_nothing_is_wanted(notebook):
    with telling(False) as tell:
        tell("queries", 1, 4)
    with telling():
        pass
    assert not notebook


# --- what is shown ---------------------------------------------------------------------------------------------------
def test_false_shows_nothing_and_a_function_gets_everything(stderr, lines):
    terminal = stderr(Terminal())
    calls = []
    with telling(False) as tell:
        tell("queries", 1, 4)
    with telling(lambda *call: calls.append(call)) as tell:
        tell("queries", 1, 4, loss=0.5)
    assert calls == [("queries", 1, 4)]
    assert terminal.getvalue() == ""
    assert not lines


@pytest.mark.parametrize("outer", [None, True, False, lambda *_: None])
def test_a_call_inside_of_another_one_shows_nothing_by_itself(stderr, lines, outer):
    pipe = stderr(io.StringIO())
    calls = []
    with telling(outer):
        with telling() as tell:
            tell("inner", 1, 4)
        with telling(lambda *call: calls.append(call)) as tell:
            tell("asked", 1, 4)
    assert not lines
    assert pipe.getvalue() == ""
    assert calls == [("asked", 1, 4)]
    with telling() as tell:
        tell("after", 1, 4)
    assert lines == ["after: 1 of 4"]


def test_at_most_one_line_a_minute_with_the_time_left():
    said, now = [], [0.0]
    tell = Lines(said.append, lambda: now[0])
    for second in range(0, 1000, 10):  # 1 % in ten seconds
        now[0] = float(second)
        tell("distill", second // 10 + 1, 100)
    assert said[0] == "distill: 1 of 100"
    assert said[1] == "distill: 7 of 100, 0:01:00 so far, about 0:15:30 left"
    assert len(said) == 1 + 990 // 60
    tell("certify", 0, 1)
    assert said[-1] == "certify"
    now[0] += 59
    tell("distill", 1, 50)  # begins again
    assert said[-1] == "certify"
    now[0] += 60
    tell("distill", 31, 50)
    assert said[-1] == "distill: 31 of 50, 0:01:00 so far, about 0:00:38 left"


# --- every function that takes it ------------------------------------------------------------------------------------
def calls(**more) -> dict:
    model, x = mlp(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    plan = coreprune.make_plan(model, X, queries=None, progress=False)
    small = coreprune.apply_plan(model, plan, X, progress=False)
    y = torch.zeros(8, dtype=torch.long)
    rows = coreprune.make_queries(model, X, x, progress=False)
    stream = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2))
    norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {
        "prune": lambda: coreprune.prune(model, X, queries=x, distill=2, **more),
        "make_plan": lambda: coreprune.make_plan(model, X, queries=x, **more),
        "apply_plan": lambda: coreprune.apply_plan(model, plan, X, queries=x, **more),
        "list_groups": lambda: coreprune.list_groups(model, X, **more),
        "make_queries": lambda: coreprune.make_queries(model, X, "white-noise", n=8, **more),
        "rotate_residual": lambda: coreprune.rotate_residual(stream, X, queries="white-noise", n_queries=8, **more),
        "certify": lambda: coreprune.certify(model, small, X, "white-noise", n=8, **more),
        "fine_tune_": lambda: coreprune.fine_tune_(mlp(), Batches(x, y, 4), Tuning(1), **more),
        "distill_": lambda: distill_(small, model, rows, **more),
        "invert": lambda: invert(norm, (3, 6, 6), 2, steps=2, **more),
    }


NAMES = [
    "prune",
    "make_plan",
    "apply_plan",
    "list_groups",
    "make_queries",
    "rotate_residual",
    "certify",
    "fine_tune_",
    "distill_",
    "invert",
]


def test_these_are_all_public_functions_that_take_it():
    public = {name: getattr(coreprune, name) for name in coreprune.__all__}
    found = {n for n, f in public.items() if inspect.isfunction(f) and "progress" in inspect.signature(f).parameters}
    assert found == set(NAMES) - {"distill_", "invert"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("progress", [3, "yes", 0.5, []])
def test_anything_else_is_refused(name, progress, unchecked):
    with pytest.raises(InputError, match=r"progress must be True, False, None or a function of \(phase, done, total\)"):
        calls(progress=progress)[name]()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_wherever_it_is_asked_for(name, stderr, lines):
    pipe = stderr(io.StringIO())
    calls(progress=False)[name]()
    assert not lines
    calls()[name]()
    phases = [text.partition(":")[0] for text in lines]
    assert phases
    assert len(set(phases)) == len(phases)
    calls(progress=True)[name]()
    assert [text.partition(":")[0] for text in pipe.getvalue().splitlines()] == phases


# --- as a user has it ------------------------------------------------------------------------------------------------
IN_A_TERMINAL = """
import torch
from torch import nn
from coreprune import Budget, prune
net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
print(prune(net, torch.zeros(1, 8), Budget(keep=0.5), queries=torch.randn(32, 8), distill=5))
"""


@pytest.mark.slow
def test_in_a_real_terminal_the_bars_are_on_standard_error_alone_and_vanish():
    ours, theirs = os.openpty()
    env = {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
        "COLUMNS": "100",
        "PATH": os.environ["PATH"],
    }
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL], env=env, stdout=subprocess.PIPE, stderr=theirs, text=True
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        shown += part
        if not part:
            break
    out, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    assert out.startswith("Result(Sequential: ")
    assert out.count("\n") == 1
    text = shown.decode()
    last = ESCAPES.sub("", text)
    for phase in ("capture", "statistics", "select", "repair", "distill"):
        assert re.search(rf"{phase} +\S+ +\d+/\d+ \d:\d\d:\d\d left", last), phase
    assert "\x1b[2K" in text.rpartition("distill")[2]  # the lines are wiped


FAILS = """
import torch
from torch import nn
from coreprune import CoreprunError, prune

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 8)

    def forward(self, x):
        y = self.a(x)
        return y * 2 if y.sum().item() > 0 else y

try:
    prune(Branches(), torch.zeros(2, 4))
except CoreprunError as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_what_torch_says_to_its_developers_is_kept_out():
    """Before: the whole graph of the model, twice, on standard error, above an error that says what is wrong."""
    done = subprocess.run(
        [sys.executable, "-c", FAILS], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("ModelError\n", "")


def test_a_handler_that_torch_shares_still_gets_what_others_say(caplog):
    """pytest, and users too, may hang one handler on several loggers."""
    torch_log, own = logging.getLogger("torch.export.of_a_test"), logging.getLogger("coreprune.of_a_test")
    torch_log.addHandler(caplog.handler)
    try:
        with without_chatter():
            torch_log.warning("chatter")
            own.warning("ours")
        torch_log.warning("afterwards")
    finally:
        torch_log.removeHandler(caplog.handler)
    said = [record.message for record in caplog.records]
    assert "chatter" not in said
    assert "ours" in said
    assert "afterwards" in said
