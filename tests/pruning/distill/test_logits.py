"""Distillation of language models: of logits over the words of a vocabulary the divergence alone counts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from coreprune import InputError
from coreprune.pruning.distill import distill
from coreprune.pruning.distill.block_outputs import Watched
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.distill.lessons import Part, Watching
from coreprune.pruning.distill.loss import losses
from coreprune.pruning.distill.options import Distill, Settled
from distill_pairs import Rows
from small_networks import bits

WORDS = 40


class Writer(nn.Module):
    """Tokens (N, T) to logits (N, T, WORDS), all of which move together, far more than apart.

    table: of what kind the table is in which it looks the tokens up; None: it reads them as numbers.
    """

    def __init__(self, table="module"):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.read = nn.Embedding(WORDS, 8), nn.Linear(1, 8)
        self.up, self.down, self.head, self.shift = (nn.Linear(*n) for n in ((8, 24), (24, 8), (8, WORDS), (8, 1)))
        self.table = table
        if table != "module":
            self.words = nn.ParameterDict({"weight": self.words.weight} if table else {})

    def forward(self, ids):
        x = {
            "module": lambda: self.words(ids),
            "parameter": lambda: nn.functional.embedding(ids, self.words["weight"]),
            None: lambda: self.read(ids[..., None].float()),
        }[self.table]()
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x) + 100 * self.shift(x)


def pair(**options):
    teacher = Writer(**options).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.up.weight[::2] = 0
        student.up.bias[::2] = 0
    return student, teacher


def ids(n=64, seed=0):
    return torch.randint(WORDS, (n, 12), generator=torch.Generator().manual_seed(seed))


def divergence(teacher, student, x):
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=m(x).double()) for m in (teacher, student))
        return torch.distributions.kl_divergence(p, q).mean()


def test_logits_over_words_take_options_of_their_own_and_what_is_given_stays():
    assert Distill(steps=3).settled(True) == Settled(3, 1e-3, 16, 0.0, 1.0, True, 8, 0.3)
    assert Distill(steps=3).settled(False) == Settled(3, 2e-2, 64, 1000.0, 4.0, True, 8)
    asked = Distill(5, lr=0.1, batch_size=2, features=3.0, temperature=2.0, augment=False, copies=1)
    assert asked.settled(True) == asked.settled(False) == Settled(5, 0.1, 2, 3.0, 2.0, False, 1)


@pytest.mark.parametrize("lr", [None, 1e-3])
@pytest.mark.parametrize("far", [0.1, 1.0, 30.0])
def test_after_a_small_error_the_rates_are_small(far, lr):
    """The first step of Adam moves every entry by its rate, which is relative to the root mean square of the tensor."""
    student, teacher = pair()
    with torch.no_grad():
        for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
            p.lerp_(q, 1 - far)
    before, x = copy.deepcopy(student), ids(16)
    d = float(divergence(teacher, before, x))
    assert (d < 0.3) == (far < 30)
    distill_(student, teacher, Rows((x,)), Distill(steps=1, lr=lr), seed=0)
    was, now = before.down.weight.detach(), student.down.weight.detach()
    moved = float((now - was).abs().max() / (1e-3 * was.square().mean().sqrt()))
    assert moved == pytest.approx(1.0 if lr or far == 30 else math.sqrt(d / 0.3), rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_left_to_learn_nothing_moves(seed):
    """The divergence of a model from itself is rounding, of either sign."""
    _, teacher = pair()
    with torch.no_grad():
        teacher.head.weight.mul_(30)
    student = copy.deepcopy(teacher)
    distill_(student, teacher, Rows((ids(seed=seed),)), Distill(steps=3), seed=seed)
    for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_loss_that_rounding_makes_negative_stops_nothing(monkeypatch):
    student, teacher = pair()
    before = bits(student)
    real = distill.losses
    monkeypatch.setattr(distill, "losses", lambda *args: (0 * loss - 1e-9 for loss in real(*args)))
    distill_(student, teacher, Rows((ids(),)), Distill(steps=2), seed=0)
    assert bits(student) == before


def test_a_run_goes_on_with_the_rates_that_it_began_with(tmp_path):
    student, teacher = pair()
    with torch.no_grad():
        for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
            p.lerp_(q, 0.95)
    whole, data, asked = copy.deepcopy(student), Rows((ids(),)), Distill(steps=6, save_every=2)

    def stop(phase, done, total):
        if done == 4:
            raise KeyboardInterrupt

    distill_(whole, teacher, data, asked, seed=0)
    with pytest.raises(KeyboardInterrupt):
        distill_(copy.deepcopy(student), teacher, data, asked, seed=0, checkpoint=tmp_path / "state", progress=stop)
    distill_(student, teacher, data, asked, seed=0, checkpoint=tmp_path / "state")
    assert bits(student) == bits(whole)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("spoken", [True, False])
def test_the_loss_by_hand(spoken, temperature):
    student, teacher = (model.double() for model in pair())
    x = ids(5)
    with torch.no_grad():
        y, z = teacher(x), student(x)
        lesson = [Part(((x,), {}), [y], [])]
        settled = Distill(temperature=temperature).settled(spoken)
        (found,) = losses(
            Watching(student, Watched(student, [])), [], lesson, settled, frozenset({WORDS} if spoken else ())
        )
    p, q = (torch.distributions.Categorical(logits=t.double() / temperature) for t in (y, z))
    wanted = temperature**2 * torch.distributions.kl_divergence(p, q).mean()
    if not spoken:
        wanted += (y - z).double().square().mean() / y.double().var(correction=0)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_the_student_speaks_more_like_its_teacher_on_other_texts():
    student, teacher = pair()
    before = divergence(teacher, student, ids(200, 1))
    distill_(student, teacher, Rows((ids(),)), Distill(steps=60, lr=1e-2), seed=0)
    assert divergence(teacher, student, ids(200, 1)) < 0.5 * before


def end(words, table):
    """A weight after four steps. The loss goes by what is over a vocabulary, so the weight does."""
    student, teacher = pair(table=table)
    distill_(student, teacher, Rows((ids(),)), Distill(steps=4), words=words, seed=0)
    return student.up.weight.detach()


NAMED, NONE = frozenset({WORDS}), frozenset()


def test_vocabularies_are_those_of_the_embeddings_unless_they_are_named():
    assert torch.equal(end(None, "module"), end(NAMED, "module"))
    assert not torch.allclose(end(None, "module"), end(NONE, "module"))


def test_a_table_that_is_no_module_counts_if_its_size_is_named():
    assert torch.equal(end(None, "parameter"), end(NONE, "parameter"))
    assert torch.equal(end(NAMED, "parameter"), end(NAMED, "module"))


@pytest.mark.parametrize("words", [40, [40], "40", frozenset({"40"})])
def test_words_that_are_no_sizes_are_refused(words, unchecked):
    with pytest.raises(InputError, match="words must be a frozenset of whole numbers"):
        end(words, "module")


def test_without_a_table_no_output_is_over_words():
    assert torch.equal(end(None, None), end(NONE, None))


def test_tables_with_a_row_for_every_word_stay_as_they_are():
    student, teacher = pair()
    before = bits(student.words), bits(student.head)
    distill_(student, teacher, Rows((ids(),)), Distill(steps=4), seed=0)
    assert bits(student.words) == before[0]
    assert torch.equal(student.head.weight, teacher.head.weight)
    assert not torch.equal(student.up.weight, pair()[0].up.weight)
    distill_(student, teacher, Rows((ids(),)), Distill(steps=4), words=frozenset(), seed=0)
    assert bits(student.words) != before[0]
