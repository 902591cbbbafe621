"""Several processes that work on one run, by torch.distributed. In a single process everything here does nothing.

Processes meet to add up, to share and to compare. Every meeting begins with a word of each about whether it has failed,
so an error in one of them ends all of them, at their next meeting. If one dies, its connections close, which ends the
others; if one is silent, the timeout of the process group does. They use a group of their own, which is closed at the
end or at the first error, so nothing of it is left in the caller's group.
"""

from __future__ import annotations

import io
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from coreprune.errors import CoreprunError, RankError, first_line

T = TypeVar("T")
_RUNS = count()
_ROLL_CALL = 5.0  # seconds in which the processes that are left say so, after a connection was lost


@dataclass(eq=False)
class _Together:
    """The processes of a run. group: None once it is closed. device: where tensors of GPUs are put here."""

    group: Any
    rank: int
    world: int
    run: int
    device: torch.device
    neighbours: int = 1


_NOW: ContextVar[_Together | None] = ContextVar("the processes of this run", default=None)


@dataclass(frozen=True)
class Share:
    """What this process does of n things. numbers: which ones, a stretch; never empty.

    counts: whether they count. If there are fewer things than processes, some do the first one again, so that they
    know its shapes, and what they find does not count.
    """

    numbers: range
    counts: bool = True


def world() -> int:
    """How many processes work on this run."""
    now = _NOW.get()
    return 1 if now is None else now.world


def rank() -> int:
    """The number of this process, from 0 on."""
    now = _NOW.get()
    return 0 if now is None else now.rank


def neighbours() -> int:
    """How many processes of this run are on this machine."""
    now = _NOW.get()
    return 1 if now is None else now.neighbours


def share(n: int) -> Share:
    """Which of n things this process does."""
    mine = range(rank() * n // world(), (rank() + 1) * n // world())
    return Share(mine) if mine or not n else Share(range(1), counts=False)


@contextmanager
def together(device: torch.device | None = None) -> Iterator[None]:
    """Work with all processes of the initialised process group, if there are several.

    Every one of them has to come here. An error in one of them is raised there as it is, and as a RankError in the
    others. Inside of another `together` nothing changes.

    device: of the model.
    """
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2
    if alone or _NOW.get() is not None:
        yield
        return
    now = _joined(device or torch.device("cpu"))
    token = _NOW.set(now)
    try:
        yield
        _meet(now, "the end of the run")
    except RankError:  # every process has heard of it
        raise
    except Exception as error:
        with suppress(RankError):
            _meet(now, "an error", first_line(error))
        raise
    finally:
        _NOW.reset(token)
        _close(now)


def gathered(what: str, value: T) -> list[T]:
    """The values of all processes, in their order. what: for messages."""
    now = _NOW.get()
    if now is None:
        return [value]
    data = _packed(value)
    _meet(now, what)
    found: list[Any] = [None] * now.world
    with _wire(now, what):
        dist.all_gather_object(found, data, group=now.group)
    return [value if r == now.rank else _unpacked(x, now.device) for r, x in enumerate(found)]


def from_first(what: str, make: Callable[[], T]) -> T:
    """What the first process makes, in all of them. A CoreprunError that `make` raises there is raised in all.

    The first process does this alone: nothing inside of `make` meets the others.
    """
    now = _NOW.get()
    if now is None:
        return make()
    value: Any = None
    failed: CoreprunError | None = None
    if now.rank == 0:
        token = _NOW.set(None)
        try:
            value = make()
        except CoreprunError as error:
            failed = error
        finally:
            _NOW.reset(token)
    box: list[Any] = [_packed((value, failed)) if now.rank == 0 else None]
    _meet(now, what)
    with _wire(now, what):
        dist.broadcast_object_list(box, src=0, group=now.group)
    if now.rank != 0:
        value, failed = _unpacked(box[0], now.device)
    if failed is not None:
        raise failed
    return value


def total_(what: str, tensors: Sequence[Tensor], to: int | None = None) -> None:
    """Replace tensors by their sums over all processes. to: the process that needs them; None for all of them.

    In the others the tensors are of no use after that.
    """
    now = _NOW.get()
    if now is None:
        return
    _meet(now, what)
    with _wire(now, what):
        for x in tensors:
            flat = x if x.is_contiguous() else x.contiguous()
            if to is None:
                dist.all_reduce(flat, group=now.group)
            else:
                dist.reduce(flat, dst=to, group=now.group)
            if flat is not x:
                x.copy_(flat)


def others(what: str, value: Any) -> list[int]:
    """The processes whose value is not that of the first one; the same list in all of them."""
    found = gathered(what, value)
    return [r for r, x in enumerate(found) if x != found[0]]


def agree(what: str, value: Any) -> None:
    """Raise RankError if a value that every process has computed is not the same in all of them."""
    if odd := others(what, value):
        raise RankError(
            f"{what} of {_named(odd)} differ from those of process 0, although both did the same work. Run all "
            "processes with the same versions and on machines of one kind."
        )


def _joined(device: torch.device) -> _Together:
    nccl = device.type == "cuda" and dist.is_nccl_available()
    try:
        group = dist.new_group(backend="cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=_timeout())
        now = _Together(group, dist.get_rank(), dist.get_world_size(), next(_RUNS), device)
        hosts: list[Any] = [None] * now.world
        dist.all_gather_object(hosts, platform.node(), group=group)
    except Exception as error:
        raise RankError(
            f"not all of the {dist.get_world_size()} processes came to this run ({first_line(error)}). In an "
            "initialised process group every process must make the call; to make it in one alone, destroy the group "
            "before."
        ) from error
    now.neighbours = hosts.count(platform.node())
    return now


def _timeout() -> Any:
    """The timeout of the caller's process group; None, which stands for torch's own, where it does not say."""
    for device in ("cpu", "cuda"):
        with suppress(RuntimeError, AttributeError):
            return dist.group.WORLD._get_backend(torch.device(device)).options._timeout  # type: ignore[union-attr]
    return None


def _meet(now: _Together, what: str, failed: str = "") -> None:
    """Wait for the others. Raises RankError if one of them has failed, or is somewhere else.

    failed: what has happened here, or "".
    """
    if now.group is None:
        raise RankError(f"the processes of this run are not connected any more ({what}).")
    mine = torch.tensor([bool(failed), zlib.crc32(what.encode())])
    found = [torch.empty_like(mine) for _ in range(now.world)]
    with _wire(now, what):
        dist.all_gather(found, mine, group=now.group)
        told: list[Any] = [None] * now.world
        if any(int(x[0]) for x in found):
            dist.all_gather_object(told, failed, group=now.group)
    if failed:
        return
    if errors := [(r, text) for r, text in enumerate(told) if text]:
        r, text = errors[0]
        raise RankError(f"process {r} of {now.world} failed, so the run ends here, too: {text}.")
    if odd := [r for r, x in enumerate(found) if int(x[1]) != int(found[0][1])]:
        raise RankError(
            f"{_named(odd)} went another way than process 0 (here: {what}). Give all processes the same model and the "
            "same arguments, and run the same versions in all of them."
        )


@contextmanager
def _wire(now: _Together, what: str) -> Iterator[None]:
    """Speak with the others. If that fails, close the group, which ends their waiting, and say who is gone."""
    try:
        yield
    except Exception as error:
        _close(now)
        gone = _missing(now)
        who = f"{_named(gone)} of {now.world} ended or did not answer in time" if gone else "the connection was lost"
        raise RankError(
            f"{who}, while the processes met for {what} ({first_line(error)}). Look at what the process itself said, "
            "at the memory of its machine, and at the network. If it needs longer, allow more time: timeout= of "
            "init_process_group, or --timeout."
        ) from error


def _close(now: _Together) -> None:
    group, now.group = now.group, None
    if group is not None:
        with suppress(Exception):  # it may be broken
            dist.destroy_process_group(group)


def _missing(now: _Together) -> list[int]:
    """The processes that do not say that they are there, where the store still answers."""
    try:
        store = dist.distributed_c10d._get_default_store()
        keys = [f"coreprune/{now.run}/{r}" for r in range(now.world)]
        store.set(keys[now.rank], "here")
        until = time.monotonic() + _ROLL_CALL
        while time.monotonic() < until and not store.check(keys):
            time.sleep(0.05)
        return [r for r, key in enumerate(keys) if not store.check([key])]
    except Exception:  # it was in the process that is gone
        return []


def _named(numbers: Sequence[int]) -> str:
    return ("process " if len(numbers) == 1 else "processes ") + ", ".join(map(str, numbers))


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes, device: torch.device) -> Any:
    """What a process of this run has packed, with its tensors of GPUs on the GPU of this one."""

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.to(device=device)

    return torch.load(io.BytesIO(data), map_location=place, weights_only=False)
