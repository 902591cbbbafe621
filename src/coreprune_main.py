"""The command `coreprune`. It lies beside the package, because importing that imports torch, which takes seconds."""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """Entry point. Ctrl-C ends with a word and exit code 130 while the imports still run, too."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # jobs in the background may ignore it
    if heard:
        signal.signal(signal.SIGINT, _leave)
    from coreprune.cli import main as run

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _leave(*_: Any) -> None:
    """At once: torch swallows an exception while it imports numpy, and trips over the rest. Nothing has begun yet."""
    os.write(2, b"interrupted\n")
    os._exit(130)
