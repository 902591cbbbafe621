"""The folder of a run that may be killed: what it has finished so far, one small file for each piece of work.

Of several processes, the first one reads and writes the files, and the others are told what they hold.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from coreprune import _ranks
from coreprune._checkpoint import Checkpoint, digest
from coreprune.errors import InputError
from coreprune.queries.describe import description, shown

T = TypeVar("T")
Packed = tuple[Mapping[str, Any], Mapping[str, Tensor]]  # plain values for JSON, and tensors
_RUN, _ABOUT, _STATE = "run.safetensors", "about", "the state of the run"


@dataclass(eq=False)
class Unfinished:
    """What a run has finished. A file is there completely or not at all, and fits only its own run.

    folder: None keeps nothing. key: the fingerprint of everything that the run depends on.
    """

    folder: Path | None = None
    key: str = ""
    _asked: Counter[str] = field(default_factory=Counter, repr=False)

    def once(
        self,
        what: str,
        make: Callable[[], T],
        pack: Callable[[T], Packed | None],
        unpack: Callable[[Mapping[str, Any], Mapping[str, Tensor]], T],
    ) -> T:
        """What `make` returns, or what it returned in the run that was interrupted.

        what: names this piece of work. Pieces of one name are told apart by their order, which has to be the same in
        every run. pack: turns the result into what can be written; None where it cannot be, and is made anew.

        All processes of a run do this together.

        Raises InputError for a file that is damaged, and ArtifactError where the disk refuses.
        """
        if self.folder is None:
            return make()
        number = self._asked[what]
        self._asked[what] += 1
        file = Checkpoint(self.folder / f"{what}-{number}.safetensors", self.key)
        if (found := _ranks.from_first(_STATE, file.read)) is not None:
            _, tensors = found
            about = json.loads(bytes(tensors.pop(_ABOUT).tolist()))
            return unpack(about, tensors)
        made = make()
        packed = pack(made)
        if all(_ranks.gathered(_STATE, packed is not None)):
            about, tensors = packed or ({}, {})
            text = torch.tensor(list(json.dumps(dict(about)).encode()), dtype=torch.uint8)
            _ranks.from_first(_STATE, lambda: file.write(1, {**tensors, _ABOUT: text}))
        return made

    def after(self, given: Sequence[Any]) -> Unfinished:
        """The same for work that depends on further tensors or values."""
        return (
            self
            if self.folder is None
            else Unfinished(self.folder, digest([("", self.key), *(("", x) for x in given)]))
        )


def unfinished(folder: str | Path | None, parts: Callable[[], Iterable[tuple[str, Any]]]) -> Unfinished:
    """The state of a run in a folder, which is made if it is absent.

    parts: everything that the run depends on, by name: tensors, and values that have a `description`.

    Raises InputError if the folder holds the state of another run, or if nothing tells whether a part is the same in
    another run, and ArtifactError where the disk refuses.
    """
    if folder is None:
        return Unfinished()
    path = Path(folder)

    def opened() -> str:
        if path.exists() and not path.is_dir():
            raise InputError(f"resume={str(path)!r} is a file. It must be a folder, or absent.")
        key = digest((name, value if isinstance(value, Tensor) else _described(name, value)) for name, value in parts())
        run = Checkpoint(path / _RUN, key)
        if run.read() is None:
            run.write(0, {_ABOUT: torch.zeros(1)})
        return key

    return Unfinished(path, _ranks.from_first(_STATE, opened))


def _described(name: str, value: Any) -> str:
    text = description(value)
    if text is None:
        raise InputError(
            f"resume cannot be used with {name}={shown(value)}: nothing tells whether it is the same in another run. "
            "Write it as a plain function or a frozen dataclass, or leave resume out."
        )
    return text
