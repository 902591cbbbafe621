"""What is said of a pruned model that does not run: the error, and the line of the model's own code that raised it."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch

from coreprune.errors import first_line

FAILS = "the pruned model does not run"

_OURS = str(Path(__file__).parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_LAYERS = _TORCH + "nn" + os.sep
_LONGEST = 100  # characters of a line


def failed(error: Exception) -> str:
    """A sentence with the error, and with the line to look at: the last one outside of torch, or that of a
    layer of torch.

    In most cases the line takes a size from elsewhere than from the weights, such as from the width of its input.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    own = [f for f in frames if not f.filename.startswith(_TORCH)]
    own = own or [f for f in frames if f.filename.startswith(_LAYERS) and not f.filename.endswith("module.py")]
    if not own:
        return f"{FAILS}: {first_line(error)}"
    line = " ".join((own[-1].line or own[-1].name).split())
    code = line if len(line) <= _LONGEST else line[:_LONGEST] + " …"
    return f"{FAILS}: {first_line(error)} ({Path(own[-1].filename).name}:{own[-1].lineno}: {code})"
