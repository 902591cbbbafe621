"""What the sections of docs/benchmarks.md are made of."""

from __future__ import annotations

from collections import Counter
from typing import Any

MISSING = "–"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def ran_on(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['cpu']}, {environment['cores']} cores, Python {environment['python']}, {versions}."


def spread(row: dict[str, Any]) -> str:
    return f"{row['mean']:.2f}" + (f" ± {row['deviation']:.2f}" if row["deviation"] is not None else "")


def phases(seconds: dict[str, float]) -> str:
    """How long each phase took. Two have another name since they were measured."""
    renamed = {"polish": "distillation", "moments": "statistics"}
    return ", ".join(f"{renamed.get(name, name)} {spent:.1f}" for name, spent in seconds.items())


def threads(n: int) -> str:
    return "one thread" if n == 1 else f"{n} threads"


def missing(count: int, what: str) -> str:
    return f" {count} {what} failed and are not shown; the JSON says why." if count else ""


def several(rows: list[dict[str, Any]]) -> str:
    """A sentence on rows that were not made by one version on one processor; empty if they were."""
    made = Counter((row["version"], row["cpu"]) for row in rows if "cpu" in row)
    if len(made) < 2:
        return ""
    told = ", ".join(f"{n} by {version} on {cpu}" for (version, cpu), n in made.most_common())
    return f" Not all rows were made at once: {told}."
