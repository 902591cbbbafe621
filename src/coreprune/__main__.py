"""The command `coreprune`, also as `python -m coreprune`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Entry point. Ctrl-C ends with a message and exit code 130, even during the imports, which take seconds."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # background jobs may ignore Ctrl-C
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
    """Exit at once. Nothing has begun yet; torch would swallow an exception while importing numpy, and fail later."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
