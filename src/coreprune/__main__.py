"""The command `coreprune`, also as `python -m coreprune`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Entry point. Ctrl-C ends with a word and exit code 130 while the imports still run, too: they take seconds."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # jobs in the background may ignore it
    if heard:
        signal.signal(signal.SIGINT, _leave)
    try:
        from coreprune.cli import main as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.stderr.write(f"error: the command needs {package}, which cannot be found here. Run: {_INSTALL}\n")
        raise SystemExit(2) from None
    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


_INSTALL = "pip install 'coreprune[cli]'"


def _leave(*_: Any) -> None:
    """At once: torch swallows an exception while it imports numpy, and trips over the rest. Nothing has begun yet."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
