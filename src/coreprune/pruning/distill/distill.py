"""Distillation without data: train the pruned model for some steps so that it computes what the original computes.

Block-wise feature matching (Romero et al., FitNets, 2015) and output matching (Hinton et al. 2015) on queries: inputs
that were made without data, or unlabelled samples. No label is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._checkpoint import Checkpoint, digest
from coreprune._example import largest_batch, reals
from coreprune._seed import as_generator
from coreprune._telling import Wanted, telling
from coreprune._twin import quiet
from coreprune.errors import InputError
from coreprune.pruning.calibration.padding import ends_in
from coreprune.pruning.calibration.rows import Batch, Inputs, Rows
from coreprune.pruning.calibration.vocabulary import embeddings, over_words
from coreprune.pruning.distill.block_outputs import Watched, shared_features, spread
from coreprune.pruning.distill.channel_maps import fit_readouts
from coreprune.pruning.distill.lessons import Lessons, Watching
from coreprune.pruning.distill.loss import losses
from coreprune.pruning.distill.options import Distill, Settled

_HELD = 4  # tensors as large as the outputs that a step takes
_SMALLEST = 1e-2  # lower limit of the root mean square of a tensor that sets its learning rate


def distill_(
    student: nn.Module,
    teacher: nn.Module,
    queries: Inputs,
    options: Distill | None = None,
    *,
    words: frozenset[int] | None = None,
    seed: int | torch.Generator = 0,
    checkpoint: str | Path | None = None,
    progress: Wanted = None,
) -> None:
    """Train `student` in place, for a fixed number of steps, to match `teacher` on `queries`.

    The loss is the sum of three terms: the squared errors of the outputs relative to the variance of the teacher's; for
    outputs that may be logits (2 or 3 axes), the divergence of the softened outputs; and the mean over features of
    their squared errors relative to their variance, times `Distill.features`. Of outputs (…, tokens, words) over a
    vocabulary, the divergence alone counts. Features are the outputs of blocks
    (modules with children, otherwise any modules) that have the same name and output shape in both models. Blocks that
    have lost channels are compared through an affine map, which is fit beforehand and then fixed. What is computed at
    padding does not count: runs of one token at the end or the beginning of texts, on which no other output depends.
    Both models run in evaluation mode: batch norms keep their statistics, and dropout is off. Half-precision weights
    are trained on float32 copies.

    student: a pruned copy of the teacher, with tensors of its own. Parameters that do not require a gradient are not
        trained, unless no parameter requires one; nor are tables with a row for every word of a vocabulary. At the end,
        modes, hooks, gradients and flags are as before. If anything goes wrong or the user interrupts, so is every
        tensor.
    teacher: the original; it is not changed.
    queries: on the models' device.
    words: the sizes of the vocabularies. None: how long the teacher's nn.Embedding tables are.
    seed: decides the order of the inputs; a number, or a generator from which one number is drawn.
    checkpoint: a file. If it holds the state of the same run, the run goes on from there. On a CPU (the same machine
        with the same number of threads) it then ends with the same bits as a run without interruption. The file is
        replaced atomically every `save_every` steps and at the end, and it is not deleted.

    Raises InputError if the loss becomes infinite or NaN, if the inputs are not queries, if words are no sizes, or if
    the checkpoint is damaged or from another run. Raises ModelError if the outputs of the models cannot be compared.
    """
    if words is not None and not (isinstance(words, frozenset) and all(isinstance(n, int) for n in words)):
        raise InputError(f"words must be a frozenset of whole numbers, the sizes of vocabularies, not {words!r}.")
    asked, sizes = options or Distill(), embeddings(teacher) if words is None else words
    number = _seed(as_generator(seed))
    if not _over_words(teacher, queries, sizes):
        sizes = frozenset()
    settled = asked.settled(bool(sizes))
    rows = Rows(queries, settled.batch_size, settled.augment, number)
    saved = None
    if checkpoint is not None:
        saved = Checkpoint(Path(checkpoint), digest(_identity(student, teacher, rows, settled, sizes)))
    with telling(progress) as tell, _training(student, teacher, sizes) as (parameters, still):
        training = _Training(parameters, _tensors(student), settled)
        # A loss and its gradient take some tensors as large as the outputs; the teacher alone would take one.
        most = max(1, largest_batch(next(rows.parts(0, 2)), _HELD * rows.size, student, still) // _HELD)
        padded = ends_in(still, _once(rows, most), rows.axes)
        names = spread(shared_features(student, still, next(rows.parts(0, most)))) if settled.features else []
        # Fit before a checkpoint is loaded, so that an interrupted run goes on with the same maps.
        maps = fit_readouts(student, still, names, _once(rows, most), padded) if names else []
        first = training.load(saved)
        with Watched(student, names) as seen, Watched(still, names) as wanted:
            mine = Watching(student, seen)
            lessons = Lessons(Watching(still, wanted), rows, most, settled.copies, padded)
            for step in range(first, settled.steps):
                done = training.step(step, losses(mine, maps, lessons.of(step), settled, sizes))
                if saved is not None and ((step + 1) % asked.save_every == 0 or step + 1 == settled.steps):
                    saved.write(step + 1, training.state())
                tell("distill", step + 1, settled.steps, loss=done)


def _over_words(teacher: nn.Module, queries: Inputs, sizes: frozenset[int]) -> bool:
    """Whether the teacher returns logits over a vocabulary."""
    if not sizes:
        return False
    args, kwargs = next(Rows(queries, 2, False, 0).parts(0, 2))
    with quiet(teacher) as still, torch.no_grad():
        return any(over_words(x, sizes) for x in reals(still(*args, **kwargs)))


def _once(rows: Rows, most: int) -> Iterator[Batch]:
    """Every input once, at most so many together."""
    return (part for step in range(math.ceil(rows.count / rows.size)) for part in rows.parts(step, most))


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 40, (), generator=generator, device=generator.device))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _identity(
    student: nn.Module, teacher: nn.Module, rows: Rows, options: Settled, sizes: frozenset[int]
) -> Iterator[tuple[str, Any]]:
    """Everything that the result depends on."""
    yield from ((f"student.{name}", t) for name, t in _tensors(student).items())
    yield "trained", [name for name, p in student.named_parameters() if p.requires_grad]
    yield from ((f"teacher.{name}", t) for name, t in _tensors(teacher).items())
    yield from ((f"input {i}", leaf) for i, leaf in enumerate(rows.leaves))
    yield "options", asdict(options) | {"seed": rows.seed, "words": sorted(sizes)}


@contextmanager
def _training(
    student: nn.Module, teacher: nn.Module, sizes: frozenset[int]
) -> Iterator[tuple[list[nn.Parameter], nn.Module]]:
    """Set evaluation mode, and yield the parameters to train, and a twin of the teacher.

    At the end the student's flags, modes and buffers are restored; after an error its parameters are restored too.
    """
    held = _tensors(student)
    if shared := {t.data_ptr() for t in held.values()} & {t.data_ptr() for t in _tensors(teacher).values()} - {0}:
        name = next(name for name, t in held.items() if t.data_ptr() in shared)
        raise InputError(f"student and teacher share the tensor {name!r}. Pass a student with tensors of its own.")
    parameters = [p for p in student.parameters() if p.is_floating_point()]
    flags = [(p, p.requires_grad) for p in parameters]
    trained = [p for p in parameters if p.requires_grad] or parameters
    # A few texts have a gradient for few of the words, and Adam moves all rows alike.
    trained = [p for p in trained if p.dim() != 2 or p.shape[0] not in sizes] or trained
    if not trained:
        raise InputError(f"{type(student).__name__} has no floating-point parameters to train.")
    start = {name: t.detach().clone() for name, t in held.items()}
    modes = {m: m.training for m in student.modules()}
    restored = dict(student.named_buffers())
    try:
        with quiet(teacher) as still, torch.enable_grad():
            student.eval()
            for p in trained:
                p.requires_grad_(True)
            yield trained, still
    except BaseException:
        restored = held
        raise
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, tensor in restored.items():
                if not torch.equal(tensor, start[name]):  # not in vain: an expanded buffer cannot be written to
                    tensor.copy_(start[name])


class _Training:
    """Adam, on float32 copies of weights with fewer bits."""

    def __init__(self, parameters: list[nn.Parameter], tensors: dict[str, Tensor], options: Settled) -> None:
        self.parameters, self.tensors, self.options = parameters, tensors, options
        # A detached tensor shares the parameter's memory: a step on it is a step on the parameter.
        self.masters = [p.detach() if p.element_size() >= 4 else p.detach().float() for p in parameters]
        # Relative rates as in Adafactor (Shazeer and Stern 2018). The lower limit lets tensors of zeros move.
        self.rates = [options.lr * max(float(m.double().square().mean().sqrt()), _SMALLEST) for m in self.masters]
        self.part = 1.0  # of the rates, by the first loss
        fused = all(m.is_cuda for m in self.masters) or None  # a GPU waits for the many small steps otherwise
        groups = [{"params": [m]} for m in self.masters]
        self.adam = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0, fused=fused)

    def step(self, step: int, summands: Iterable[Tensor]) -> float:
        """Take one step of Adam. summands: they add up to the loss. Returns the loss before the step."""
        value = 0.0
        gradients: list[Tensor | None] = [None] * len(self.parameters)
        for loss in summands:
            value += float(loss.detach())
            if not math.isfinite(value):
                raise InputError(
                    f"the loss of the distillation is {value} in step {step}; the model is as it was before. "
                    f"Lower lr ({self.options.lr:g}), or look for infinite inputs and outputs."
                )
            for i, found in enumerate(torch.autograd.grad(loss, self.parameters, allow_unused=True)):
                if found is not None:  # not added in place: two parameters may have one gradient
                    more, before = found.to(self.masters[i].dtype), gradients[i]
                    gradients[i] = more if before is None else before + more
        if step == 0 and value < self.options.whole_from:
            self.part = math.sqrt(max(value, 0.0) / self.options.whole_from)  # rounding can make it negative
        steps = self.options.steps
        warm = min(1.0, (step + 1) / max(1.0, steps / 20))
        share = self.part * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.adam.step()
        self._publish()
        return value

    def _publish(self) -> None:
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                if master.dtype != p.dtype:
                    p.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        state = {f"model.{name}": t for name, t in self.tensors.items()}
        state["part"] = torch.tensor(self.part, dtype=torch.float64)
        for i, master in enumerate(self.masters):
            state[f"master.{i}"] = master
            state |= {f"adam.{i}.{key}": t for key, t in self.adam.state[master].items()}
        return state

    def load(self, saved: Checkpoint | None) -> int:
        """Load the state of a checkpoint, if there is one. Returns how many steps are done."""
        found = saved.read() if saved is not None else None
        if found is None:
            return 0
        step, state = found
        self.part = float(state["part"])
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[f"model.{name}"])
            for i, master in enumerate(self.masters):
                master.copy_(state[f"master.{i}"])
        adam = {
            i: {key.rsplit(".", 1)[1]: t for key, t in state.items() if key.startswith(f"adam.{i}.")}
            for i in range(len(self.masters))
        }
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": {i: s for i, s in adam.items() if s}, "param_groups": groups})
        return step
