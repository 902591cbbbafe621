"""Give memory that was freed back to the system.

The C library of most Linux systems keeps freed blocks of up to 32 MiB for itself. A run makes and drops many matrices,
and then the process can hold more than twice of what is in use. On other systems nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path

_GROWN = 256 << 20  # bytes; less is not worth the search
_EVERY = 5.0  # seconds at least from one search to the next, since pages that are used again have to be fetched again

_last = -_EVERY
_before = 0


def tidy() -> None:
    """Give freed memory back, if the process has grown since the last time and that is a while ago."""
    global _last, _before
    if time.monotonic() - _last < _EVERY or anonymous() - _before < _GROWN:
        return
    with suppress(OSError, AttributeError):  # no such library, or no such function in it
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    _last, _before = time.monotonic(), anonymous()


def anonymous() -> int:
    """The bytes of this process that no file backs; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    return 0
