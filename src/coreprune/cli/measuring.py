"""What `coreprune prune` measures before and after: accuracy on labelled samples, perplexity, seconds per batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from coreprune._telling import Told
from coreprune.cli import source
from coreprune.errors import CoreprunError, InputError

if TYPE_CHECKING:
    from coreprune.perplexity import Windows
    from coreprune.queries import Queries


def as_figures(extra: Mapping[str, Any]) -> dict[str, float]:
    """The measured entries of a report, as flat figures for the log."""
    found = {}
    for name in ("accuracy", "perplexity"):
        if name in extra:
            found |= {f"{name}_{when}": extra[name][when] for when in ("before", "after")}
    for row in extra.get("latency", {}).get("rows", ()):
        found |= {f"latency_{when}_batch_{row['batch']}": row[when]["median"] for when in ("before", "after")}
    return found


@dataclass(frozen=True)
class Exam:
    """Labelled samples, and the dense model's accuracy on them.

    It is measured first, so that a mistake in the samples is reported before hours of work.
    """

    samples: Queries
    labels: Tensor
    before: float

    @classmethod
    def of(cls, model: nn.Module, given: Any, path: Path, tell: Told, batch_axis: Any) -> Exam:
        """Read the file, and measure the accuracy of the dense model. Raises InputError."""
        samples, labels = source.labelled(path, model, given, batch_axis)
        tell("accuracy", 0, 2)
        try:
            before = accuracy(model, samples, labels)
        except InputError as error:
            raise InputError(f"--labelled {path}: {error}") from error
        tell("accuracy", 1, 2)
        return cls(samples, labels, before)


def reading(
    model: nn.Module, given: Any, text: Path | None, tokenizer: Any, seed: int, batch_axis: Any
) -> Windows | None:
    """The text that a language model is measured on; None for any other model. Raises InputError for a text for it."""
    from coreprune.perplexity import windows

    try:
        return windows(model, given, text, tokenizer=tokenizer, seed=seed, batch_axis=batch_axis)
    except CoreprunError as error:
        if text is None:
            return None
        raise InputError(f"--text {text}: {error}") from error


def measured(
    model: nn.Module,
    small: nn.Module,
    given: Any,
    exam: Exam | None,
    latency: bool,
    macs: tuple[int, int],
    tell: Told,
    batch_axis: Any = "auto",
    read: Windows | None = None,
) -> dict[str, Any]:
    """The measured entries of the report: accuracy on labelled samples, perplexity, and seconds per batch."""
    from coreprune.latency import compare_latency
    from coreprune.perplexity import compare_perplexity

    found: dict[str, Any] = {}
    if exam is not None:
        after = accuracy(small, exam.samples, exam.labels)
        tell("accuracy", 2, 2)
        found["accuracy"] = {"before": exam.before, "after": after, "samples": len(exam.labels)}
    if read is not None:
        tell("perplexity", 0, 1)
        found["perplexity"] = compare_perplexity(model, small, given, read).as_dict()
        tell("perplexity", 1, 1)
    if latency:
        tell("latency", 0, 1)
        found["latency"] = compare_latency(model, small, given, macs=macs, batch_axis=batch_axis).as_dict()
        tell("latency", 1, 1)
    return found


def accuracy(model: nn.Module, samples: Queries, labels: Tensor) -> float:
    """The share of samples whose label has the highest score. Raises InputError where the scores do not fit."""
    from coreprune._example import first_tensor, largest_batch
    from coreprune._single import answering

    right = at = 0
    with answering(model) as still:
        for args, kwargs in samples.batches(largest_batch(next(samples.batches(2)), 64, still)):
            scores = first_tensor(still(*args, **kwargs))
            if samples.whole and scores is not None:
                scores = scores[None]
            if scores is None or scores.dim() != 2:
                raise InputError("accuracy needs a model that returns scores of shape (samples, classes).")
            wanted = labels[at : at + len(scores)]
            if int(wanted.min()) < 0 or int(wanted.max()) >= scores.shape[1]:
                raise InputError(
                    f"the labels go from {int(labels.min())} to {int(labels.max())}, but the model has "
                    f"{scores.shape[1]} classes, which count from 0."
                )
            right += int((scores.argmax(dim=1).cpu() == wanted).sum())
            at += len(scores)
    return right / at
