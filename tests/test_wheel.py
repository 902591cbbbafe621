"""The wheel and the source distribution: what is in them, and what a package index shows of them."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASSETS = "coreprune/report/assets"
pytestmark = pytest.mark.slow


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(one(built, "*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_string(wheel.read(name).decode())


def tracked(*folders: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {name.removeprefix("src/") for name in tracked("src")} | {
        str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")
    }


def test_every_licence_of_what_is_bundled_is_where_tools_look_for_it(wheel, metadata):
    bundled = [p.name for p in (ROOT / "src" / ASSETS).iterdir() if p.name.startswith(("LICENSE", "NOTICE"))]
    assert len(bundled) == 3
    named = {"LICENSE", *(f"src/{ASSETS}/{name}" for name in bundled)}
    assert set(metadata.get_all("License-File")) == named
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert {f"{info}/licenses/{name}" for name in named} <= set(wheel.namelist())
    assert metadata["License-Expression"] == "Apache-2.0 AND BSD-3-Clause"


def test_the_metadata_say_what_is_needed(metadata):
    assert metadata["Name"] == "coreprune"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert {re.match(r"[\w-]+", text)[0] for text in needed} == {"torch", "numpy", "scipy", "safetensors"}
    assert {"cli", "report", "onnx", "demo"} <= set(metadata.get_all("Provides-Extra"))


def test_the_description_has_no_link_into_a_folder_that_is_not_there(metadata):
    """All of the README is there, but links and pictures that lead to files of the checkout."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    text, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\]\((?!https?://)", readme)
    assert not re.search(r"\]\((?!https?://)", text)
    for line in readme.splitlines():
        if "](" not in line:
            assert line in text.splitlines()
    assert "guides without data, with unlabelled data,\nfor Hugging Face models." in text


def test_the_source_distribution_is_whole_and_makes_the_same_wheel(built, wheel, tmp_path):
    with tarfile.open(one(built, "*.tar.gz")) as archive:
        archive.extractall(tmp_path)  # what we have packed ourselves; Python 3.11.2 knows no filters
    (source,) = tmp_path.iterdir()
    inside = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert tracked() - inside == set()
    assert {"docs/guides/no-data.md", "docs/report.png", "examples/own_cnn.ipynb", "PKG-INFO"} <= inside
    made = tmp_path / "made"
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", made]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    assert set(zipfile.ZipFile(one(made, "*.whl")).namelist()) == set(wheel.namelist())
