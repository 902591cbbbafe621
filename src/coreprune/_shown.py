"""How objects show themselves: without the entries of their tensors, and in notebooks as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any

from torch import Tensor, nn

_LONGEST = 80  # characters of a value
_FEW = 4  # entries of a mapping or a sequence


def brief(self: Any) -> str:
    """The `__repr__` of a dataclass, with shapes and dtypes in the place of tensors."""
    shown = ", ".join(f"{f.name}={_value(getattr(self, f.name))}" for f in fields(self) if f.repr)
    return f"{type(self).__name__}({shown})"


def _value(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"<{', '.join(map(str, x.shape)) or 'number'}: {str(x.dtype).removeprefix('torch.')}>"
    if isinstance(x, nn.Module):
        return f"<{type(x).__name__}>"
    if isinstance(x, Mapping):
        inside = [f"{key!r}: {_value(x[key])}" for key in list(x)[:_FEW]]
        return "{" + ", ".join(inside + [f"… {len(x)} in all"] * (len(x) > _FEW)) + "}"
    if isinstance(x, (list, tuple)):
        inside = [_value(one) for one in x[:_FEW]] + [f"… {len(x)} in all"] * (len(x) > _FEW)
        return ("[{}]" if isinstance(x, list) else "({})").format(", ".join(inside))
    text = repr(x)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, left: Sequence[int] = (0,)) -> str:
    """Static HTML in the colours of the page around it. Columns without any text are left out.

    head: a title per column; those with the title "" always stay. left: the columns of words; the others are aligned to
        the right.
    """
    columns = [i for i in range(len(head)) if head[i] == "" or any(row[i] for row in rows)]
    align = {i: "left" if i in left else "right" for i in columns}
    top = "".join(f'<th scope="col" style="text-align:{align[i]}">{escape(head[i])}</th>' for i in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:{align[i]}">{escape(row[i])}</td>' for i in columns) + "</tr>"
        for row in rows
    )
    return f'<table aria-label="{escape(caption)}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
