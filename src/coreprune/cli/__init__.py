"""The command line. The only place that prints."""

from coreprune.cli.app import main

__all__ = ["main"]
