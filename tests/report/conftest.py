"""A real report to look at, and a browser to look with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coreprune import Budget, Result, prune
from coreprune.queries import Strokes

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
EXAMPLE = torch.zeros(1, 64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 10))


@pytest.fixture(scope="session")
def result() -> Result:
    return prune(network(), EXAMPLE, Budget(macs=0.5), queries=Strokes(shape=(8, 8), low=0.0, high=1.0))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"none of {', '.join(BROWSERS)} is on the PATH: install Debian's chromium, or run make test as root"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        made = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@dataclass
class Seen:
    """A page, what it complained about, and what it asked for beyond itself."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Seen]]:
    """look(html, **options of the context) -> Seen. Nothing but the file itself can be loaded."""
    contexts = []

    def look(html: str, **options: Any) -> Seen:
        file = tmp_path / f"report{len(contexts)}.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.set_default_timeout(10_000)
        context.route("**/*", lambda route: route.continue_() if route.request.url == file.as_uri() else route.abort())
        seen.page.on("console", lambda m: seen.complaints.append(m.text) if m.type in ("error", "warning") else None)
        seen.page.on("pageerror", lambda e: seen.complaints.append(str(e)))
        seen.page.on("dialog", lambda d: (seen.complaints.append(d.message), d.dismiss()))
        seen.page.on("request", lambda r: seen.requests.append(r.url))
        seen.page.goto(file.as_uri())
        assert seen.requests.pop(0) == file.as_uri()
        return seen

    yield look
    for context in contexts:
        context.close()
