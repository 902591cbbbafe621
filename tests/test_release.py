"""What a release needs and nothing else looks at: the citation, the workflows, the version, the templates of issues."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(path: str) -> dict:
    # "on" is a truth value in YAML 1.1, which PyYAML reads
    return {"on" if key is True else key: value for key, value in yaml.safe_load((ROOT / path).read_text()).items()}


def test_the_citation_names_the_software_and_the_paper():
    """The keys that version 1.2.0 of the format wants, and no version, which would be that of some earlier release."""
    cff = read("CITATION.cff")
    assert cff["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cff)
    assert not {"version", "date-released"} & set(cff)
    assert cff["title"] == PROJECT["project"]["name"]
    assert PROJECT["project"]["license"].split(" AND ")[0] == cff["license"]  # the wheel holds more than ours
    (paper,) = cff["references"]
    assert paper["type"] == "conference-paper"
    assert [author["family-names"] for author in paper["authors"]] == ["Tukan", "Mualem", "Maalouf"]
    assert paper["title"] in (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")


def test_the_version_comes_from_the_tag():
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"]["source"] == "vcs"
    assert any(need.startswith("hatch-vcs") for need in PROJECT["build-system"]["requires"])


def test_only_a_tag_is_released_and_only_after_the_check():
    flow = read(".github/workflows/release.yml")
    assert flow["on"]["push"] == {"tags": ["v*"]}
    build, publish = flow["jobs"]["build"], flow["jobs"]["publish"]
    assert "make release-check" in [step.get("run") for step in build["steps"]]
    assert publish["needs"] == "build"
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["permissions"] == {"id-token": "write"}
    assert flow["permissions"] == {"contents": "read"}
    (upload,) = (step["with"] for step in build["steps"] if "upload-artifact" in step.get("uses", ""))
    assert f"--outdir {upload['path']}\n" in MAKE


@pytest.mark.parametrize("name", ["tests", "release"])
def test_the_workflows_run_commands_of_the_makefile_with_all_tags(name):
    (job, *_) = read(f".github/workflows/{name}.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        assert re.search(rf"^{re.escape(command.removeprefix('make '))}:", MAKE, re.M), command
    assert job["steps"][0]["with"] == {"fetch-depth": 0}


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_the_templates_of_issues_are_forms(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])
