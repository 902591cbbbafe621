"""A lesson in parts has the loss, and the gradient, of the same lesson in one piece."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from coreprune import Distill, ModelError
from coreprune.pruning.distill.block_outputs import Watched
from coreprune.pruning.distill.channel_maps import Readout
from coreprune.pruning.distill.lessons import Part, Watching
from coreprune.pruning.distill.loss import losses
from small_networks import bits

WORDS = 7


class Net(nn.Module):
    """(N, 4, 6) to what the test asks for. Nothing in it depends on the other inputs of a batch."""

    def __init__(self, outputs):
        super().__init__()
        self.body, self.head, self.outputs = nn.Sequential(nn.Linear(6, 9), nn.Tanh()), nn.Linear(9, WORDS), outputs

    def forward(self, x):
        y = self.head(self.body(x))
        masked = y.masked_fill(x[..., :1] > 0.8, float("-inf"))  # in some positions, and so unevenly over the parts
        return [{"words": y, "classes": y.mean(1), "masked": masked, "one": y[:, 0, 0]}[name] for name in self.outputs]


def pair(outputs, seed=0):
    torch.manual_seed(seed)
    teacher = Net(outputs).double()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.1 * torch.randn_like(p)
    return student, teacher


def taught(student, teacher, x, sizes, options, words):
    """The loss of the lesson in parts of these sizes, and its gradient."""
    torch.manual_seed(5)
    maps = [Readout(2, torch.randn(9, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64))]
    names = ["body"] if options.features else []
    with Watched(student, names) as seen, Watched(teacher, names) as wanted:
        with torch.no_grad():
            lesson = [Part(((part,), {}), *Watching(teacher, wanted)(((part,), {}))) for part in x.split(sizes)]
        parts = list(losses(Watching(student, seen), maps[: len(names)], lesson, options, words))
    assert len(parts) == len(sizes)
    total = torch.stack(parts).sum()
    return total.detach(), torch.autograd.grad(total, list(student.parameters()))


@pytest.mark.parametrize("words", [frozenset(), frozenset({WORDS})])
@pytest.mark.parametrize("features", [0.0, 1000.0])
@pytest.mark.parametrize(
    "outputs", [("words",), ("classes",), ("masked", "classes"), ("one", "words"), ("words", "masked", "one")]
)
def test_parts_add_up_to_the_whole(outputs, features, words):
    student, teacher = pair(outputs)
    x = torch.randn(11, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = Distill(features=features, temperature=2.0).settled(False)
    whole = taught(student, teacher, x, [11], options, words)
    for sizes in ([5, 5, 1], [1] * 11, [2, 9]):
        found = taught(student, teacher, x, sizes, options, words)
        assert float(found[0]) == pytest.approx(float(whole[0]), rel=1e-9)
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(found[1], whole[1], strict=True))
    assert float(whole[0]) > 0


def test_a_perfect_student_has_no_loss():
    _, teacher = pair(("words", "masked"))
    options = Distill(features=0.0).settled(False)
    x = torch.randn(6, 4, 6, dtype=torch.float64)
    assert float(taught(copy.deepcopy(teacher), teacher, x, [4, 2], options, frozenset())[0]) == 0


def test_no_part_holds_the_graph_of_another():
    """The second part is computed after the first was differentiated, so one graph exists at a time."""
    student, teacher = pair(("words",))
    before = bits(student)
    ran = []
    student.register_forward_pre_hook(lambda *_: ran.append(len(ran)))
    options = Distill(features=0.0).settled(True)
    parts = [Part(((x,), {}), [teacher(x)[0].detach()], []) for x in torch.randn(2, 3, 4, 6, dtype=torch.float64)]
    each = losses(Watching(student, Watched(student, [])), [], parts, options, frozenset({WORDS}))
    for done in (1, 2):
        torch.autograd.grad(next(each), list(student.parameters()))
        assert len(ran) == done
    assert bits(student) == before


def test_parts_without_a_comparable_output():
    student, _ = pair(("words",))
    lesson = [Part(((torch.randn(2, 4, 6, dtype=torch.float64),), {}), [torch.randn(2, 4, WORDS + 1)], [])]
    with pytest.raises(ModelError, match="cannot be compared"):
        list(losses(Watching(student, Watched(student, [])), [], lesson, Distill().settled(True), frozenset()))
