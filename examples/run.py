"""Run the notebooks of this folder and store what they print and draw: python examples/run.py [NAME ...].

All code cells of a notebook run in one namespace, in a temporary folder. There is no kernel, so that neither this nor
the tests need Jupyter; printed text and open figures of matplotlib are all that is stored. The last picture of a
notebook is also its picture in docs/gallery.md.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs"
COLOURS = 48  # of a picture: enough for charts and grey drawings, and a quarter of the bytes


def run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The notebook with the outputs of this run, and the names that its cells have made."""
    matplotlib.use("agg")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    with elsewhere():
        for number, cell in enumerate(code_cells(notebook), 1):
            code = compile("".join(cell["source"]), f"cell {number} of {path.name}", "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            cell["execution_count"] = number
            cell["outputs"] = [*stream(printed.getvalue()), *figures()]
    return notebook, names


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """In their order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook: dict[str, Any]) -> str:
    """All that the cells have printed."""
    outputs = (output for cell in code_cells(notebook) for output in cell["outputs"])
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def pictures(notebook: dict[str, Any]) -> list[bytes]:
    """All that the cells have drawn, as PNG files."""
    outputs = (output for cell in code_cells(notebook) for output in cell["outputs"])
    return [base64.b64decode(out["data"]["image/png"]) for out in outputs if out["output_type"] == "display_data"]


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """In a folder that is deleted afterwards."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def stream(text: str) -> list[dict[str, Any]]:
    """Printed text as a notebook stores it."""
    return [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}] if text else []


def figures() -> list[dict[str, Any]]:
    """The open figures as a notebook stores them. They are closed."""
    from matplotlib import pyplot

    found = []
    for number in pyplot.get_fignums():
        drawn, small = io.BytesIO(), io.BytesIO()
        pyplot.figure(number).savefig(drawn, dpi=80)
        Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": ["<Figure>"]}
        found.append({"data": data, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    return found


def main(names: list[str]) -> None:
    """Every notebook, or those with these names."""
    for path in sorted(HERE.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook, _ = run(path)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (PICTURES / f"{path.stem}.png").write_bytes(pictures(notebook)[-1])
        print(f"{path.name}\n{printed(notebook)}")


if __name__ == "__main__":
    main(sys.argv[1:])
