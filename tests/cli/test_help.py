"""What a newcomer reads first: the help of every command, with an example that would run."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

import coreprune
from coreprune.cli import options
from coreprune.cli.commands import app

COMMANDS = ("prune", "inspect", "report", "certify", "bench", "export", "demo")  # in the order of use


def helped(*arguments: str) -> str:
    """The help in a terminal that is wide enough to break no line."""
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert result.exit_code == 0
    return result.stdout


def test_the_list_of_commands_is_the_one_tested_here():
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)
    shown = helped()
    for name in COMMANDS:
        assert re.search(rf"│ {name} +\w", shown), "every command says what it does"
    assert re.findall(rf"│ ({'|'.join(COMMANDS)}) +\w", shown) == list(COMMANDS)


def test_the_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.split() == ["coreprune", coreprune.__version__]
    assert coreprune.__version__ == version("coreprune")


def test_the_exit_codes_are_said():
    shown = " ".join(helped().split())
    codes = re.search(r"Exit codes: (.*)", shown)[1]
    assert [part.split()[0] for part in codes.split("; ")] == ["0", "1", "2", "130"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_calls_that_are_understood(name):
    """Every option that they use exists, and every one that is needed is there."""
    examples = re.findall(rf"coreprune {name} .*", helped(name))
    calls = [shlex.split(text)[2:] for text in examples if "[OPTIONS]" not in text]
    assert calls
    command = typer.main.get_command(app).get_command(None, name)
    for call in calls:
        command.make_context(name, list(call))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    command = typer.main.get_command(app).get_command(None, name)
    for parameter in command.params:
        assert parameter.name == "help" or len(getattr(parameter, "help", None) or "") > 10, parameter.name
    shown = helped(name)
    assert "source_" not in shown
    for parameter in command.params:
        for flag in parameter.opts if parameter.param_type_name == "option" else ():
            assert flag in shown


def test_names_to_complete_are_names_that_are_taken():
    assert options.known_method(options.methods()[0])
    assert options.known_queries(options.query_sources()) == options.query_sources()


def test_no_arguments_are_a_call_for_help():
    shown = CliRunner().invoke(app, [])
    assert "Exit codes" in shown.output


def test_the_many_options_of_prune_are_in_groups():
    """One list of forty options is no help. What a run cannot do without is in the first group."""
    command = typer.main.get_command(app).get_command(None, "prune")
    groups: dict[str, list[str]] = {}
    for parameter in command.params:
        groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter.name)
    assert max(map(len, groups.values())) < 14
    assert {"out", "resume", "json"} <= set(groups["Options"])
    shown = helped("prune")
    places = [shown.index(f"─ {name} ─") for name in groups if name != "Options"]
    assert len(places) > 3
    assert places == sorted(places)


def test_the_limit_that_is_taken_by_itself_is_named():
    assert f"{options.one_budget({})['macs']} if no other limit is given" in helped("prune")
