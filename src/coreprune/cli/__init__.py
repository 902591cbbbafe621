"""The command line. Only this package prints."""

from __future__ import annotations

from coreprune.cli import artifacts, prune  # noqa: F401 - importing them adds their commands to the app
from coreprune.cli.commands import app


def main() -> None:
    """Entry point."""
    app()


__all__ = ["app", "main"]
