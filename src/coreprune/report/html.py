"""render(): from the values of a report to the text of one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from coreprune.errors import InputError
from coreprune.report import words
from coreprune.report.gallery import contact_sheet
from coreprune.report.runs import compared
from coreprune.report.view import summary, view

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_NEEDED = {"jinja2": "jinja2", "markupsafe": "markupsafe", "PIL": "pillow"}  # module -> package
INSTALL = "pip install 'coreprune[report]'"
_CHARTED = ("groups", "refits", "bounds", "path")


def render(data: Mapping[str, Any], *, images: Tensor | None = None, title: str = "Pruning report") -> str:
    """One self-contained HTML page. It loads nothing, and its content security policy forbids it to.

    data: `Report.as_dict()`, or the content of report.json. Further entries are optional: "latency" {"device",
        "threads", "note", "rows": [{"batch", "before": {"median", "low", "high"}, "after": {…}, "speedup"}]} in
        seconds; "accuracy" {"before", "after", "samples"} as shares; "perplexity" {"before",
        "after", "same", "tokens", "text"}; "artifact" {"loads_with", "why"}.
    images: queries to show, (N, C, H, W) with C in {1, 3} or (N, d) with d a square. Other tensors are not shown.

    Raises InputError if `data` is not such a dict, or if a package is missing: pip install 'coreprune[report]'.
    """
    _complete()
    page = view(data)
    template = _environment().get_template("page.html.j2")
    return template.render(
        page=page,
        title=title,
        summary=summary(page),
        charts={key: page[key] for key in _CHARTED},
        sheet=None if images is None else contact_sheet(images),
    )


def render_runs(runs: Sequence[tuple[str, Mapping[str, Any]]], *, title: str = "Pruning runs") -> str:
    """One self-contained HTML page about several results: size against quality, each a point, and a table.

    runs: a name and the data of a report, as for `render`, of each. Raises InputError as `render`, and for one alone.
    """
    _complete()
    page = compared(runs)
    return _environment().get_template("runs.html.j2").render(page=page, title=title)


def write(data: Mapping[str, Any], path: str | Path, images: Tensor | None = None) -> None:
    """Render to a file, in UTF-8. Arguments and errors are those of `render`."""
    Path(path).write_text(render(data, images=images), encoding="utf-8")


def missing() -> list[str]:
    """The packages of the extra `report` that are not installed. Without them no page can be made."""
    return [package for module, package in _NEEDED.items() if find_spec(module) is None]


def _complete() -> None:
    if absent := missing():
        raise InputError(f"a report's page needs {', '.join(absent)}, which cannot be found here. Run: {INSTALL}")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("coreprune.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    made.globals["asset"] = _asset
    for name in ("count", "short", "significant", "percent", "loss", "at_most", "at_least", "seconds", "duration"):
        made.filters[name] = getattr(words, name)
    return made


@cache
def _asset(name: str) -> Markup:
    """The text of a file beside the template, which is not escaped."""
    from markupsafe import Markup

    return Markup(resources.files("coreprune.report").joinpath("assets", name).read_text(encoding="utf-8"))
