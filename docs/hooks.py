"""What is in the site but not in docs/: the first page from README.md, the commands' help, the notebooks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^(Example: )?(coreprune [^\n`]+)$", re.M)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    if page.file.src_uri == "index.md":
        return (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    if page.file.src_uri == "reference/cli.md":
        return markdown + command_line()
    return markdown.replace("](../examples/", "](examples/")


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs once. The notebooks lie beside docs/, and in the site below it."""
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files


def command_line() -> str:
    """What typer writes about the commands, from their own help."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    typer = Path(sys.executable).with_name("typer")
    text = subprocess.run(
        [typer, "coreprune.cli", "utils", "docs", "--name", "coreprune"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    _, text = text.split("\n", 1)  # its heading is the page's
    return COMMAND.sub(r"\1`\2`", text)
