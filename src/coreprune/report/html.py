"""render(): the values of a report in, one HTML text out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from coreprune.report import words
from coreprune.report.gallery import contact_sheet
from coreprune.report.view import summary, view

_CHARTED = ("sizes", "latency", "groups", "refits", "bounds")


def render(data: Mapping[str, Any], *, images: Tensor | None = None, title: str = "Pruning report") -> str:
    """One self-contained HTML page: it loads nothing, and its policy forbids it to.

    data: `Report.as_dict()`, or what report.json holds. Known beyond that, and all optional: "latency" {"device",
        "threads", "note", "rows": [{"batch", "before": {"median", "low", "high"}, "after": {…}, "speedup"}]} in
        seconds; "accuracy" {"before", "after", "samples"} as shares; "artifact" {"loads_with", "why"}.
    images: queries to show, (N, C, H, W) with C in {1, 3} or (N, d) with d a square; others are left out.

    Raises InputError where `data` is not such a dict.
    """
    page = view(data)
    template = _environment().get_template("page.html.j2")
    return template.render(
        page=page,
        title=title,
        summary=summary(page),
        charts={key: page[key] for key in _CHARTED},
        sheet=None if images is None else contact_sheet(images),
    )


def write(data: Mapping[str, Any], path: str | Path, images: Tensor | None = None) -> None:
    """Render to a file, in UTF-8. Arguments and errors as in `render`."""
    Path(path).write_text(render(data, images=images), encoding="utf-8")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("coreprune.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    made.globals["asset"] = _asset
    for name in ("count", "short", "significant", "percent", "seconds"):
        made.filters[name] = getattr(words, name)
    return made


@cache
def _asset(name: str) -> Markup:
    """One of the files beside the template, trusted as it is."""
    return Markup(resources.files("coreprune.report").joinpath("assets", name).read_text(encoding="utf-8"))
