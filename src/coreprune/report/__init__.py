"""A report as one self-contained HTML page."""

from coreprune.report.html import render, render_runs, write

__all__ = ["render", "render_runs", "write"]
