"""What a benchmark ran on, for its JSON."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(*packages: str) -> dict[str, Any]:
    """Processor, cores, and the versions of Python and of the given packages."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {}
    for package in ("coreprune", "torch", "numpy", "scipy", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def made_by(device: str) -> dict[str, str]:
    """What a row says of the version and the processor that made it; on a GPU, of that and of torch, too."""
    here = environment()
    row = {"version": here["versions"]["coreprune"], "cpu": here["cpu"]}
    if device != "cpu":
        row |= {"device": torch.cuda.get_device_name(device), "torch": here["versions"]["torch"]}
    return row
