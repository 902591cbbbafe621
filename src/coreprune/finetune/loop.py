"""A plain training loop over batches, with a teacher, averaged weights and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coreprune._checkpoint import Checkpoint, digest
from coreprune._journal import append, opened
from coreprune._progress import Progress
from coreprune._telling import Wanted, telling
from coreprune.errors import CoreprunError, InputError, first_line
from coreprune.finetune.tuning import Tuning

Loss = Callable[[Any, Tensor], Tensor]  # (output of the model, labels) -> one number


def fine_tune_(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    options: Tuning | None = None,
    *,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: Wanted = None,
) -> list[dict[str, float]]:
    """Train `model` in place. Its modes are restored at the end. Returns one row for every epoch that ran.

    batches: pairs (inputs, labels) with a length, that can be passed over many times: a DataLoader, or `Batches`.
        Before every pass, `set_epoch` of it or of its sampler is called, where there is one.
    teacher: the dense model; its softened outputs then count beside the labels, as `Tuning.soft` says. It stays as it
        is.
    loss: instead of the cross-entropy of (N, classes) with integer labels. A teacher needs scores of classes.
    validate: called on the model in evaluation mode after every epoch, with the averaged weights if there are any; its
        number goes into the row.
    checkpoint: a file, written after every epoch. A later call with the same start, options and checkpoint goes on from
        there. If the batches have a `generator`, its state is kept too.
    log: a file to which every row is appended as a line of JSON: epoch, loss, lr, seconds, and validation if any. The
        line also has the time, the phase, and how many steps are done of how many, like the log of `prune`.
    progress: as for `prune`. A function is called as progress("fine-tune", done, total) after every step.

    In a process group of torch.distributed, wrap the model in DistributedDataParallel; rank 0 writes the files.

    Raises InputError for settings that make no sense, for batches that do not fit the model, and if the loss becomes
    infinite or NaN. The model then has the weights of the last step. Raises ArtifactError where the log cannot be
    written.
    """
    options = options or Tuning()
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(options, Tuning):
        raise InputError(f"options must be a Tuning, not {type(options).__name__}.")
    if loss is not None and teacher is not None:
        raise InputError("a teacher's answers are classes, which a loss of your own does not read. Pass one of both.")
    try:
        steps = options.epochs * len(batches)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"batches have no length ({first_line(error)}). Pass a DataLoader or Batches.") from error
    if steps == 0:
        raise InputError("there are no batches to train on.")
    run = _Run(model, batches, options, teacher, loss, steps)
    stored = Checkpoint(Path(checkpoint), run.key()) if checkpoint is not None else None
    if log is not None:
        opened(log).close()  # not after hours of work
    rows, start = [], 0
    if stored is not None and (found := stored.read()) is not None:
        start = run.restore(*found)
    modes = [(module, module.training) for module in model.modules()]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    writes = not distributed or torch.distributed.get_rank() == 0
    progress = False if progress is None and not writes else progress  # bars of one process are enough
    try:
        with telling(progress) as tell:
            for epoch in range(start, options.epochs):
                began = time.perf_counter()
                row = {"epoch": epoch + 1.0, **run.epoch(epoch, tell)}
                if validate is not None:
                    with run.averaged():
                        model.eval()
                        row["validation"] = _number(validate(model), "validate")
                rows.append({**row, "seconds": round(time.perf_counter() - began, 3)})
                if log is not None and writes:
                    done = (epoch + 1) * (steps // options.epochs)
                    append(log, phase="fine-tune", done=done, total=steps, **rows[-1])
                if stored is not None and writes:
                    stored.write(epoch + 1, run.state())
        run.swap()
    finally:
        for module, training in modes:
            module.training = training
        for parameter in model.parameters():
            parameter.grad = None
    return rows


def _number(found: Any, what: str) -> float:
    """What a function of the caller's returned. Raises InputError unless it is one real number."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} must return one number, not {_said(found)}.") from error


@dataclass(eq=False)
class _Run:
    """A model in training. steps: in all."""

    model: nn.Module
    batches: Iterable[tuple[Tensor, Tensor]]
    options: Tuning
    teacher: nn.Module | None
    loss: Loss | None
    steps: int
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise InputError("no parameter of the model requires a gradient, so nothing can be trained.")
        parts = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        parts = [part for part in parts if part["params"]]
        if options.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(parts, lr=options.lr)
        else:
            self.optimizer = torch.optim.SGD(
                parts, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0
            )
        self.device = trained[0].device
        self.names = {id(p): name for name, p in self.model.named_parameters()}
        if options.average:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def epoch(self, epoch: int, tell: Progress) -> dict[str, float]:
        """One pass over the batches. Returns the mean loss and the last learning rate."""
        for place in (self.batches, getattr(self.batches, "sampler", None)):
            if callable(renew := getattr(place, "set_epoch", None)):
                renew(epoch)
        self.model.train()
        each, total, rate = self.steps // self.options.epochs, 0.0, 0.0
        for i, batch in enumerate(self.batches):
            step = epoch * each + i
            rate = self._rate(step)
            total += self._step(*self._pair(batch, step), rate, step)
            tell("fine-tune", step + 1, self.steps)
        return {"loss": round(total / each, 6), "lr": rate}

    def _pair(self, batch: Any, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, on the model's device."""
        pair = tuple(batch) if isinstance(batch, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
            raise InputError(f"batches must be pairs of tensors (inputs, labels); step {step} got {_said(batch)}.")
        return pair[0].to(self.device), pair[1].to(self.device)

    def _rate(self, step: int) -> float:
        options = self.options
        share = min((step + 1) / max(options.warm_up * self.steps, 1.0), 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if options.schedule == "cosine" else 1.0
        return options.lr * share * decay

    def _step(self, inputs: Tensor, labels: Tensor, rate: float, step: int) -> float:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        bfloat = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        half = options.precision == "bfloat16" or (options.precision == "auto" and bfloat)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                loss = self._loss(self.model(inputs), labels, inputs)
        except (CoreprunError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # models and losses raise anything
            given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (inputs, labels))
            raise InputError(
                f"the model, its loss or its teacher fails on the inputs and labels {given} of step {step} "
                f"({first_line(error)})."
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(f"loss must return a tensor with one number, not {_said(loss)}.")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(f"the loss is {value} in step {step}. Lower lr ({options.lr:g}) or check the data.")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if options.clip is not None:
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], options.clip)
        self.optimizer.step()
        decay = min(options.average, (step + 1) / (step + 10))  # the first weights are soon forgotten
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter, 1 - decay)
        return value

    def _loss(self, output: Any, labels: Tensor, inputs: Tensor) -> Tensor:
        if self.loss is not None:
            return self.loss(output, labels)
        options = self.options
        hard = F.cross_entropy(output, labels, label_smoothing=options.smoothing)
        if self.teacher is None:
            return hard
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(inputs) / options.temperature, dim=1)
        found = F.log_softmax(output / options.temperature, dim=1)
        soft = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
        return (1 - options.soft) * hard + options.soft * options.temperature**2 * soft

    # --- averaged weights and checkpoints -----------------------------------------------------------------------------
    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, for as long as the block lasts."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the averaged weights with those of the model."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    own = parameter.detach().clone()
                    parameter.copy_(self.average[name])
                    self.average[name] = own

    def key(self) -> str:
        """What a checkpoint has to belong to: the weights at the start, the options, the number of steps."""
        return digest([*self.model.state_dict().items(), *asdict(self.options).items(), ("steps", self.steps)])

    def state(self) -> dict[str, Tensor]:
        """Everything that the next epoch depends on."""
        found = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        found |= {f"average/{name}": t for name, t in self.average.items()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                found[f"optimizer/{key}/{self.names[id(parameter)]}"] = torch.as_tensor(value)
        generator = getattr(self.batches, "generator", None)
        if isinstance(generator, torch.Generator):
            found["generator"] = generator.get_state()
        found["random"] = torch.get_rng_state()
        return found

    def restore(self, done: int, tensors: dict[str, Tensor]) -> int:
        """Take up a state. Returns how many epochs are done."""
        self.model.load_state_dict(
            {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        )
        self.average = {n: tensors[f"average/{n}"].to(t) for n, t in self.average.items()}
        places = {name: p for p in self.model.parameters() if (name := self.names.get(id(p)))}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, key, parameter = name.split("/", 2)
                scalar = value.dim() == 0
                self.optimizer.state[places[parameter]][key] = value if scalar else value.to(self.device)
        generator = getattr(self.batches, "generator", None)
        if isinstance(generator, torch.Generator) and "generator" in tensors:
            generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["random"])
        return done


def _said(x: Any) -> str:
    """What something is, in words."""
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {', '.join(type(one).__name__ for one in x) or 'nothing'}"
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
