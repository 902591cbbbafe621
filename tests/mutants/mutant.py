"""One planted fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "src/coreprune"


@dataclass(frozen=True)
class Mutant:
    """name: unique. file: below src/coreprune. old: text that occurs there exactly once. new: what replaces it.

    tests: what pytest is given, paths below tests/. fault: what is wrong then, in words. equivalent: why no test can
    tell the two apart, for a mutant that survives; empty for all others.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    fault: str
    equivalent: str = ""

    def applied(self, root: Path = ROOT) -> str:
        """The text of the file with the fault. Raises ValueError where the mutant no longer applies."""
        text = (root / PACKAGE / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its old text occurs {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)
