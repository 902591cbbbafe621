"""Two kinds of text for benchmarks, each in two halves: one to sample from, one to measure on."""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

import torch

ENCYCLOPEDIA = "wikitext2_valid.txt"
DOCUMENTED = ("sympy", "numpy")  # packages whose docstrings no source of queries reads
HALVES = ("samples", "test")


def encyclopedia(folder: Path, half: str) -> str:
    """WikiText-2's valid split, from the middle on for the test."""
    text = (folder / ENCYCLOPEDIA).read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2)
    return text[:middle] if half == "samples" else text[middle:]


def documentation(half: str) -> str:
    """Docstrings of installed packages; every second file is for the test."""
    site = Path(sysconfig.get_paths()["purelib"])
    files = [file for name in DOCUMENTED for file in sorted((site / name).rglob("*.py")) if "test" not in str(file)]
    found = []
    for file in files[HALVES.index(half) :: 2]:
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, owners))
        found += [text for text in map(ast.get_docstring, nodes) if text]
    return "\n\n".join(found)


def sentences(text: str, n: int, seed: int) -> list[str]:
    """n random pieces: the sentences of long lines, or paragraphs with their lines joined."""
    parts = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n|(?<= \.) |\n(?= [^=\s])", text)]
    parts = [part for part in parts if 40 <= len(part) <= 600 and not part.startswith("=")]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
    return [parts[i] for i in order[:n]]
