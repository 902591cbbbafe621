"""The processes that torchrun has started: all of them work, and the first one reads, writes and prints."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from coreprune.errors import InputError, first_line


def number() -> int | None:
    """The number of this process, from 0 on; None if it is the only one."""
    try:
        return int(os.environ["RANK"]) if int(os.environ["WORLD_SIZE"]) > 1 else None
    except (KeyError, ValueError):
        return None


@contextmanager
def joined(timeout: float) -> Iterator[bool]:
    """Join the other processes, if there are any, until the block ends. Yields whether this is the first one.

    timeout: seconds that they wait for each other. Warnings are those of the first process.

    Raises InputError if they do not find each other.
    """
    if number() is None:
        yield True
        return
    import torch
    import torch.distributed as dist

    from coreprune import _ranks

    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    except Exception as error:
        raise InputError(
            f"the processes do not find each other ({first_line(error)}). Start them with torchrun, and with several "
            "machines give all of them the same --rdzv-endpoint."
        ) from error
    ours = logging.getLogger("coreprune")
    level = ours.level
    try:
        with _ranks.together(device):
            if _ranks.rank():
                ours.setLevel(logging.ERROR)
            yield _ranks.rank() == 0
    finally:
        ours.setLevel(level)
        dist.destroy_process_group()
