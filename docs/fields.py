"""An extension of griffe: the descriptions of arguments and fields in coreprune's docstrings become lists.

The docstrings say "name: what it is." in running text. On the page each name starts a line of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# The start of a line or of a sentence, and one or more names before a colon.
START = re.compile(r"(?:^|(?<=[.;)] ))((?:\w+, )*\w+): ", re.M)


def listed(text: str, names: set[str]) -> str:
    """The docstring with a list item for every description of one or more of the names.

    An item ends where its paragraph does.
    """
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", text.replace("‖*", r"‖\*")):  # a dual norm is no emphasis
        starts = [m for m in START.finditer(paragraph) if set(m[1].split(", ")) <= names]
        if not starts or paragraph.startswith(" "):  # code
            paragraphs.append(paragraph)
            continue
        ends = [m.start() for m in starts[1:]] + [len(paragraph)]
        if before := paragraph[: starts[0].start()].strip():
            paragraphs.append(before)
        items = []
        for match, end in zip(starts, ends, strict=True):
            said = " ".join(paragraph[match.end() : end].split())
            items.append(f"- {', '.join(f'`{name}`' for name in match[1].split(', '))}: {said}")
        paragraphs.append("\n".join(items))
    return "\n\n".join(paragraphs)


class Fields(griffe.Extension):
    """Applies `listed` to every function and class."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called by griffe."""
        if func.docstring:
            func.docstring.value = listed(func.docstring.value, {p.name for p in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called by griffe."""
        if cls.docstring:
            cls.docstring.value = listed(cls.docstring.value, set(cls.members))
