"""Text that every machine has: what Python's library and the installed packages say about themselves.

It is read when queries are made. Nothing is imported, and nothing of it is part of coreprune.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DOCSTRINGS = "docstrings of Python's standard library"
DESCRIPTIONS = "descriptions of installed packages"
KINDS = (DOCSTRINGS, DESCRIPTIONS)

_FROM_ONE = 20_000  # characters of one file or package, so that no long one fills all queries
_SHORT = 40  # characters; shorter paragraphs are mostly headings
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_PARAGRAPHS = re.compile(r"\n\s*\n")
_WRAPPED = re.compile(r"[ \t]*\n[ \t]*")
_MARKUP = re.compile(r"<[^<>]{1,400}>|!?\[[^\]]{0,200}\]\([^)]{0,400}\)|https?://\S+")


def paragraphs(kind: str, characters: int, generator: torch.Generator) -> list[str]:
    """Paragraphs of about so many characters in all, from texts in random order. None if the machine has no such text.

    kind: one of KINDS. Lines that belong to one paragraph are joined in half of the texts, at random.
    """
    found: list[str] = []
    length = 0
    for text in _DOCUMENTS[kind](generator):
        joined = bool(torch.randint(2, (), generator=generator))
        parts = [part.strip() for part in _PARAGRAPHS.split(text[:_FROM_ONE])]
        parts = [_WRAPPED.sub(" ", part) if joined else part for part in parts if len(part) >= _SHORT]
        found += parts
        length += sum(map(len, parts))
        if length >= characters:
            break
    return found


def has_text() -> bool:
    """Whether this machine has any. Installations without sources, such as frozen programs, may have none."""
    return any(paragraphs(kind, 1, torch.Generator().manual_seed(0)) for kind in KINDS)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _installed() -> Iterable[metadata.Distribution]:
    return metadata.distributions()


def _docstrings(generator: torch.Generator) -> Iterator[str]:
    """The docstrings of one file after another, in random order."""
    library = _library()
    files = [path for path in sorted(library.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(library).parts)]
    for i in torch.randperm(len(files), generator=generator):
        try:
            tree = ast.parse(files[i].read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        owners = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        yield "\n\n".join(filter(None, map(ast.get_docstring, owners)))


def _descriptions(generator: torch.Generator) -> Iterator[str]:
    """The description of one installed package after another, in random order."""
    found: dict[str, metadata.Distribution] = {}
    for package in _installed():
        try:
            name = package.metadata["Name"]
        except (OSError, ValueError, TypeError):  # a damaged installation; its text is not needed
            continue
        if name:
            found.setdefault(str(name).lower(), package)
    packages = [package for _, package in sorted(found.items())]
    for i in torch.randperm(len(packages), generator=generator):
        about: Any = packages[i].metadata  # an email.message.Message
        text = about.get_payload() or about["Description"]  # a header in old packages
        if isinstance(text, str):
            yield _MARKUP.sub("", text.replace("\r", ""))


_DOCUMENTS = {DOCSTRINGS: _docstrings, DESCRIPTIONS: _descriptions}
