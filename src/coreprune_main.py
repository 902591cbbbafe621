"""The command `coreprune`. It lies beside the package, because importing that imports torch, which takes seconds."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Ctrl-C ends with a word and exit code 130 while the imports still run, too."""
    try:
        from coreprune.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
