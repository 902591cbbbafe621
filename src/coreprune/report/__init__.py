"""A report as one self-contained HTML page."""

from coreprune.report.html import render, write

__all__ = ["render", "write"]
