"""How well language models predict a text: perplexity before and after pruning, and the share of equal next tokens."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import BatchAxes
from coreprune._batch_trials import batch_axes
from coreprune._example import check_runs, normalise_example
from coreprune._seed import check_seed
from coreprune._shapes import Int
from coreprune._shown import brief
from coreprune._single import answering
from coreprune._twin import guarded
from coreprune.errors import InputError, first_line
from coreprune.queries import MachineText, Queries, SelfGenerated, Target, make_queries
from coreprune.queries.leaves import drawable
from coreprune.queries.sources.tokens import is_causal, known
from coreprune.queries.tokenizer import LONGEST

_MADE = 32  # windows of made text
_ENTRIES = 1 << 25  # of the logits of some windows: 128 MiB in float32


@dataclass(frozen=True)
class Windows:
    """A text in pieces that a causal language model reads one by one.

    ids: (n, T) int64. leaf: position of the tokens among the leaves of the example. axes: where the example has its
    samples. text: where the text is from.
    """

    ids: Int[Tensor, "n t"]
    leaf: int
    axes: BatchAxes
    text: str
    __repr__ = brief


@dataclass(frozen=True)
class Perplexity:
    """Two language models on one text.

    before, after: exp of the mean cross-entropy per token, in nats. same: the share of the tokens for which both models
    find the same next token the most likely. tokens: how many were predicted. context: tokens of a window; the first
    of each is not predicted. text: where the text is from.
    """

    before: float
    after: float
    same: float
    tokens: int
    context: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where a number is not finite."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        """One line."""
        return (
            f"perplexity {self.before:.4g} → {self.after:.4g} on {self.tokens:,} tokens of {self.text}, in windows of "
            f"{self.context}; the same next token for {self.same:.1%}"
        )


def windows(
    model: nn.Module,
    example_inputs: Any,
    text: str | Path | None = None,
    *,
    tokenizer: Any = None,
    context: int = 512,
    most: int = 40,
    seed: int = 0,
    batch_axis: Any = "auto",
) -> Windows:
    """Cut a text into windows for `compare_perplexity`.

    example_inputs, tokenizer, batch_axis: as for `prune`.
    text: a text, or the path of a file in UTF-8. None: a text is made, from this machine if a tokenizer is known, and
        by the model itself otherwise; the windows are as long as the example.
    context: tokens of a window. Fewer if the model takes no more, or if the text is shorter; as many as in the example
        if the model takes further inputs beside the tokens.
    most: of more windows, so many are taken, evenly from the whole text.
    seed: for a text that is made. Queries of the same seed are others.

    Raises InputError if the model is no causal language model, or if there is no tokenizer or no text; ModelError if it
    does not run on the example.
    """
    args, kwargs = normalise_example(example_inputs)
    check_runs(model, args, kwargs)
    with guarded(model), answering(model) as still:
        axes = batch_axes(still, (args, kwargs), batch_axis)
        targets = [Target(still, args, kwargs, i, axes, tokenizer) for i in drawable(args, kwargs, axes)]
        target = next((t for t in targets if t.kind == "tokens" and is_causal(t)), None)
        if target is None:
            raise InputError("perplexity is about causal language models, from tokens (N, T) to logits (N, T, V).")
        if text is None:
            return _made(model, example_inputs, target, seed)
        name, words = _read(text)
        tokens = known(target)
        if tokens is None:
            raise InputError(
                "a text needs the model's tokenizer, and there is none in the folder that the model was loaded from. "
                "Pass it: tokenizer=, or --tokenizer FOLDER."
            )
        ids = tokens.encode(words)
        length = _length(target, context, len(ids) + len(tokens.before))
        room = length - len(tokens.before)
        count = len(ids) // room if room > 0 else 0
        if count < 1 or length < 2:
            raise InputError(f"{name} has {len(ids)} tokens; at least {max(room, 2)} are needed for one window.")
        rows = torch.tensor(ids[: count * room]).reshape(count, room)
        before = torch.tensor(tokens.before, dtype=torch.int64).expand(count, -1)
        whole = torch.cat([before, rows], dim=1)
        taken = torch.linspace(0, count - 1, min(count, most)).round().long()
        return Windows(whole[taken], target.leaf, axes, name)


def compare_perplexity(model: nn.Module, small: nn.Module, example_inputs: Any, found: Windows) -> Perplexity:
    """Both models on the windows, some at a time, without a cache. Neither model changes.

    Half precision on the CPU: linear layers compute in float32 and round what they return.
    """
    args, kwargs = normalise_example(example_inputs)
    losses, same = torch.zeros(2, dtype=torch.float64), 0
    with guarded(model), answering(model) as full, answering(small) as left, torch.no_grad():
        targets = [Target(m, args, kwargs, found.leaf, found.axes) for m in (full, left)]
        ids = found.ids.to(targets[0].given)
        entries = targets[0].logits(ids[:1]).numel()
        for rows in ids.split(max(1, _ENTRIES // entries)):
            both = [target.logits(rows)[:, :-1].flatten(0, 1).float() for target in targets]
            wanted = rows[:, 1:].flatten().long()
            losses += torch.stack(
                [nn.functional.cross_entropy(x, wanted, reduction="sum").double().cpu() for x in both]
            )
            same += int((both[0].argmax(dim=1) == both[1].argmax(dim=1)).sum())
    count = found.ids.shape[0] * (found.ids.shape[1] - 1)
    before, after = (float((loss / count).exp()) for loss in losses)
    return Perplexity(before, after, same / count, count, found.ids.shape[1], found.text)


def _made(model: nn.Module, example_inputs: Any, target: Target, seed: int) -> Windows:
    source = SelfGenerated() if known(target) is None else MachineText()
    (other,) = np.random.SeedSequence(check_seed(seed), spawn_key=(17,)).generate_state(1).tolist()
    made = make_queries(
        model,
        example_inputs,
        source,
        n=_MADE,
        seed=other,
        progress=False,
        batch_axis=target.axes,
        tokenizer=target.tokenizer,
    )
    return Windows(_leaf(made, target.leaf).cpu(), target.leaf, target.axes, source.name)


def _leaf(queries: Queries, leaf: int) -> Tensor:
    return pytree.tree_leaves((queries.args, queries.kwargs))[leaf].long()


def _read(text: str | Path) -> tuple[str, str]:
    """What to call a text, and the text."""
    if isinstance(text, str):
        return "the text", text
    try:
        return text.name, text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{text} cannot be read as a text in UTF-8 ({first_line(error)}).") from error


def _length(target: Target, context: int, most: int) -> int:
    """The tokens of a window."""
    inputs = [x for x in pytree.tree_leaves((target.args, target.kwargs)) if isinstance(x, Tensor)]
    if len(inputs) > 1:  # a mask or positions have the example's length
        return target.shape[0]
    config = getattr(target.model, "config", None)
    limits = [n for n in (getattr(config, name, None) for name in LONGEST) if type(n) is int and n > 0]
    return min([context, most, *limits])
