"""The work of an interrupted `coreprune prune`, in a folder beside OUT."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from coreprune._files import refuse_taken
from coreprune.cli.commands import errors
from coreprune.errors import ArtifactError, CoreprunError


@dataclass(frozen=True)
class Unfinished:
    """The folder beside OUT that holds the queries and the state of the distillation until OUT is written.

    Of a model whose weights stay in their files, it also holds what was decided and refitted.
    """

    folder: Path

    @classmethod
    def beside(cls, out: Path, resume: bool, overwrite: bool) -> Unfinished:
        """Raise ArtifactError if an interrupted run has left its work here, unless `resume` says to continue it."""
        folder = out.parent / f".{out.name}.unfinished"
        if os.path.exists(folder) and not resume:  # if we have no permission, `check_place` says so
            refuse_taken(out, overwrite)  # if OUT exists, that run did finish, and only failed to delete the folder
            raise ArtifactError(
                f"an earlier run that did not end left {folder}. Add --resume to go on with it, or delete that folder."
            )
        return cls(folder)

    @property
    def queries(self) -> Path:
        """The finished batches of queries."""
        return self.folder / "queries.safetensors"

    @property
    def distill(self) -> Path:
        """The state of the distillation."""
        return self.folder / "distill.safetensors"

    @contextmanager
    def explained(self, out: Path) -> Iterator[None]:
        """If the run is interrupted or fails, say where its work is kept. The next run can use the queries."""
        had = self.folder.exists()
        try:
            yield
        except KeyboardInterrupt:
            kept = f" {self._kept()}" if self.folder.exists() else ""
            errors.print(f"interrupted. {out} was not written.{kept}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except CoreprunError as error:
            if self.folder.exists() and not had:
                error.add_note(self._kept())
            raise

    def _kept(self) -> str:
        return f"What was made so far is in {self.folder}; --resume goes on."

    def done(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
