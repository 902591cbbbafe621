"""Keep out what torch says to its own developers while it works for us."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def without_chatter() -> Iterator[None]:
    """Silence torch's logs, unless TORCH_LOGS is set, and one of its warnings.

    torch logs tracebacks and graphs of errors that it also raises, lists optional packages that it could not find, and
    warns that functions which it uses itself are deprecated.
    """
    names = [name for name in list(logging.root.manager.loggerDict) if _of_torch(name)]
    handlers = dict.fromkeys(handler for name in names for handler in logging.getLogger(name).handlers)

    def ours(record: logging.LogRecord) -> bool:
        """Whether a record is not torch's: others may use the same handlers."""
        return record.levelno >= logging.CRITICAL or not _of_torch(record.name)

    try:
        for handler in handlers if "TORCH_LOGS" not in os.environ else ():
            handler.addFilter(ours)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(ours)


def _of_torch(name: str) -> bool:
    return name.partition(".")[0] == "torch"


@contextmanager
def without_graphs() -> Iterator[None]:
    """Drop the graph that torch.export prints on standard error before it raises.

    What others print there in the meantime comes when the block ends.
    """
    said, graph = io.StringIO(), None
    try:
        with redirect_stderr(said):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", None)
        raise
    finally:
        text = said.getvalue() if graph is None else said.getvalue().replace(f"{graph}\n", "")
        if text and sys.stderr is not None:
            sys.stderr.write(text)
