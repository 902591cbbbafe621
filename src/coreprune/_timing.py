"""The clock: calls run in turn, so that a disturbance of the machine affects all of them equally."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

_STABLE = 1.1  # a call is warm when three runs in a row are within this factor of each other


def interleaved(
    calls: Sequence[Callable[[], Any]], seconds: float, min_repeats: int, wait: Callable[[], None]
) -> list[list[float]]:
    """The seconds of every call. After a warm-up, the calls run in turn, for `seconds` times their number.

    min_repeats: how often each call runs at least. wait: returns when the device has finished its work.
    """

    def once(call: Callable[[], Any]) -> float:
        wait()
        start = perf_counter()
        call()
        wait()
        return perf_counter() - start

    for call in calls:
        begin, last = perf_counter(), [once(call)]
        while perf_counter() - begin < seconds and not (len(last) >= 3 and max(last[-3:]) <= _STABLE * min(last[-3:])):
            last.append(once(call))
    times: list[list[float]] = [[] for _ in calls]
    begin = perf_counter()
    while len(times[0]) < min_repeats or perf_counter() - begin < seconds * len(calls):
        for call, mine in zip(calls, times, strict=True):
            mine.append(once(call))
    return times


def medians(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float, min_repeats: int) -> list[float]:
    """The median seconds of every call, measured as in `interleaved`."""
    return [float(np.median(t)) for t in interleaved(calls, seconds, min_repeats, lambda: wait(device))]


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe(device: torch.device) -> str:
    """The device with what determines its speed: the instruction set of a CPU, or the model of a GPU."""
    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def processor(device: torch.device) -> str:
    """The model of the CPU or GPU, as far as the system says it."""
    if device.type != "cpu":
        return describe(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
