"""The command line. The only place that prints."""

from __future__ import annotations

from coreprune.cli import artifacts, prune  # noqa: F401 - they add their commands to the app
from coreprune.cli.commands import app


def main() -> None:
    """Entry point."""
    app()


__all__ = ["app", "main"]
