"""Distillation: the student comes closer on inputs it has not seen, resumes after an interruption, leaves no mark."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from coreprune import InputError
from coreprune._checkpoint import Checkpoint, digest
from coreprune._example import reals
from coreprune.errors import ModelError
from coreprune.pruning.calibration.augment import is_image, varied
from coreprune.pruning.distill.block_outputs import Watched, shared_features
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.distill.options import Distill
from distill_pairs import Rows, conv_pair, mlp_pair, random, stream_pair
from small_networks import bits, mlp


def error(student, teacher, x):
    with torch.no_grad():
        return float((student(x) - teacher(x)).square().mean() / teacher(x).var())


@pytest.mark.parametrize(("pair", "shape"), [(mlp_pair, (8,)), (conv_pair, (3, 8, 8))])
def test_the_student_comes_closer_on_fresh_inputs_and_the_teacher_stays(pair, shape, gen):
    student, teacher = pair()
    x, fresh = torch.randn(256, *shape, generator=gen), torch.randn(300, *shape, generator=gen)
    before, frozen = error(student, teacher, fresh), bits(teacher)
    steps = []
    distill_(student, teacher, Rows((x,)), Distill(steps=60, lr=5e-2), seed=gen, progress=lambda *a: steps.append(a))
    assert error(student, teacher, fresh) < 0.5 * before
    assert bits(teacher) == frozen
    assert steps == [("distill", i, 60) for i in range(1, 61)]


def test_features_alone_are_matched(gen):
    """Between blocks that compute the same, the features say what the outputs cannot."""
    student, teacher = conv_pair()
    x = torch.randn(128, 3, 8, 8, generator=gen)
    names = ["blocks.0", "blocks.1"]

    def apart(model):
        with torch.no_grad(), Watched(model, names) as mine, Watched(teacher, names) as theirs:
            model(x), teacher(x)
            return sum(
                float((a - b).square().mean() / b.var()) for a, b in zip(mine.take(), theirs.take(), strict=True)
            )

    reached = {}
    for weight in (0.0, 100.0):
        own = copy.deepcopy(student)
        distill_(own, teacher, Rows((x,)), Distill(steps=40, lr=5e-2, features=weight, augment=False), seed=0)
        reached[weight] = apart(own)
    assert reached[100.0] < 0.8 * reached[0.0]


def test_modes_flags_gradients_hooks_and_batch_norms_are_as_before(gen):
    student, teacher = conv_pair()
    student.train()
    student.blocks[0].eval()
    teacher.train()
    frozen = student.stem.weight.requires_grad_(False)
    held, grad = frozen.detach().clone(), torch.ones(5, 8)
    student.head.weight.grad = grad
    calls = []
    student.blocks[1].register_forward_hook(lambda *a: calls.extend(m.training for m in student.modules()))
    modes = [m.training for m in student.modules()]
    statistics = [block.bn1.running_mean.clone() for block in student.blocks]  # one in training mode, one not
    distill_(student, teacher, Rows((torch.randn(9, 3, 8, 8),)), Distill(steps=3), seed=gen)
    assert [m.training for m in student.modules()] == modes
    assert all(m.training for m in teacher.modules())
    assert calls
    assert not any(calls), "in evaluation mode in every step"
    assert torch.equal(frozen, held)
    assert not frozen.requires_grad
    assert student.head.weight.requires_grad
    assert student.head.weight.grad is grad
    assert torch.equal(grad, torch.ones(5, 8))
    assert all(torch.equal(block.bn1.running_mean, s) for block, s in zip(student.blocks, statistics, strict=True))
    assert [len(m._forward_hooks) for m in student.modules()] == [
        int(m is student.blocks[1]) for m in student.modules()
    ]
    assert not any(m._forward_hooks for m in teacher.modules())


def test_a_student_whose_weights_are_all_frozen_is_trained_and_frozen_again(gen):
    student, teacher = mlp_pair()
    student.requires_grad_(False)
    before = bits(student)
    distill_(student, teacher, Rows((torch.randn(9, 8),)), Distill(steps=2), seed=gen)
    assert bits(student) != before
    assert not any(p.requires_grad for p in student.parameters())


class Stop(BaseException):
    """What Ctrl-C looks like."""


def stop_at(step):
    def progress(phase, done, total):
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize(
    ("pair", "shape", "dtype", "stop"),
    [
        (conv_pair, (3, 8, 8), torch.float32, 5),
        (stream_pair, (3, 8, 8), torch.float32, 5),
        (mlp_pair, (8,), torch.float32, 1),
        (mlp_pair, (8,), torch.float64, 4),
        (mlp_pair, (8,), torch.bfloat16, 7),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(pair, shape, dtype, stop, tmp_path):
    """Also where the checkpoint is older than the interruption, and with the float32 copies of short weights."""
    student, teacher = (m.to(dtype) for m in pair())
    data = Rows((torch.randn(30, *shape, generator=random(1)).to(dtype),))
    options = Distill(steps=9, batch_size=8, save_every=2)
    whole = copy.deepcopy(student)
    distill_(whole, teacher, data, options, seed=0)
    start, path = bits(student), tmp_path / "new" / "distill.safetensors"
    with pytest.raises(Stop):
        distill_(student, teacher, data, options, seed=0, checkpoint=path, progress=stop_at(stop))
    assert bits(student) == start
    assert path.exists() == (stop > 1)
    seen = []
    distill_(
        student,
        teacher,
        data,
        options,
        seed=0,
        checkpoint=path,
        progress=lambda p, done, t: seen.append(done),
    )
    assert seen[0] == stop // 2 * 2 + 1
    assert bits(student) == bits(whole) != start
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = pair()[0].to(dtype)
    distill_(again, teacher, data, options, seed=0, checkpoint=path, progress=stop_at(0))
    assert bits(again) == bits(whole)


def test_interrupted_while_the_checkpoint_is_written(tmp_path, monkeypatch):
    """The earlier checkpoint stays valid, and nothing else is left in the folder."""
    student, teacher = mlp_pair()
    data, options, path = Rows((torch.randn(9, 8, generator=random()),)), Distill(steps=4, save_every=1), tmp_path / "c"
    import coreprune._checkpoint as module

    real, count = module.save_file, []

    def half(tensors, file, metadata):
        count.append(1)
        if len(count) == 3:
            file.write_bytes(b"half")
            raise Stop
        real(tensors, file, metadata)

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(Stop):
        distill_(student, teacher, data, options, seed=0, checkpoint=path)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["coreprune.checkpoint"])["step"] == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change", ["options", "seed", "student", "teacher", "inputs"])
def test_a_checkpoint_of_another_run_is_refused(change, tmp_path):
    student, teacher = mlp_pair()
    x, path, options = torch.randn(9, 8, generator=random()), tmp_path / "c.safetensors", Distill(steps=2)
    distill_(copy.deepcopy(student), teacher, Rows((x,)), options, seed=0, checkpoint=path)
    content = path.read_bytes()
    with torch.no_grad():
        if change == "student":
            student[0].weight[0, 0] += 1e-3
        if change == "teacher":
            teacher[0].weight[0, 0] += 1e-3
        if change == "inputs":
            x[0, 0] += 1e-3
    options = Distill(steps=3) if change == "options" else options
    generator = random(1 if change == "seed" else 0)
    with pytest.raises(InputError, match="another run"):
        distill_(student, teacher, Rows((x,)), options, seed=generator, checkpoint=path)
    assert path.read_bytes() == content


def test_how_often_it_is_saved_is_no_other_run(tmp_path):
    student, teacher = mlp_pair()
    data, path = Rows((torch.randn(9, 8, generator=random()),)), tmp_path / "c.safetensors"
    for every in (1, 2):
        own = copy.deepcopy(student)
        distill_(own, teacher, data, Distill(steps=2, save_every=every), seed=0, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100])
def test_a_damaged_checkpoint_is_named(content, tmp_path, gen):
    student, teacher = mlp_pair()
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"c\.safetensors is no checkpoint"):
        distill_(student, teacher, Rows((torch.randn(9, 8),)), Distill(steps=2), seed=gen, checkpoint=path)


def test_checkpoints_hold_tensors_that_share_memory_and_have_no_axes(tmp_path, gen):
    saved, x = Checkpoint(tmp_path / "c", digest([("a", 1)])), torch.randn(4, 4, generator=gen)
    assert saved.read() is None
    saved.write(7, {"x": x, "part": x[1:, :2], "turned": x.T, "one": torch.tensor(3)})
    step, found = saved.read()
    assert step == 7
    assert torch.equal(found["turned"], x.T)
    assert torch.equal(found["part"], x[1:, :2])
    assert int(found["one"]) == 3


def test_an_exploding_loss_is_named_and_the_student_put_back(gen):
    student, teacher = mlp_pair()
    before, modes = bits(student), [m.training for m in student.modules()]
    x = torch.randn(64, 8, generator=gen)
    with pytest.raises(InputError, match="Lower lr"):
        distill_(student, teacher, Rows((x,)), Distill(steps=40, lr=1e30), seed=gen)
    assert bits(student) == before
    assert [m.training for m in student.modules()] == modes


class Odd(nn.Module):
    """Nested outputs, whole numbers among them, a block that is called twice, an input without a batch axis."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 6)

    def forward(self, x, *, scale, table):
        y = self.block(self.block(x) * scale[:, None] + table)
        return {"count": torch.tensor([len(x)]), "parts": (self.head(y), [y.sum(1)])}


def test_keyword_inputs_nested_outputs_and_shared_leaves(gen):
    with torch.random.fork_rng(devices=[]):  # with some first weights 60 steps are not enough
        torch.manual_seed(0)
        teacher = Odd().eval()
        student = copy.deepcopy(teacher)
        student.block[0], student.block[2] = nn.Linear(6, 8), nn.Linear(8, 6)
    data = Rows(
        (torch.randn(12, 6, generator=gen),),
        {"scale": torch.rand(12, generator=gen), "table": torch.randn(12, 6, generator=gen)[0]},
        frozenset({2}),
        n=12,
    )
    assert shared_features(student, teacher, (data.args, data.kwargs)) == ["block"]
    before = error_of(student, teacher, data)
    distill_(student, teacher, data, Distill(steps=60, lr=5e-2, batch_size=5), seed=gen)
    assert error_of(student, teacher, data) < 0.5 * before


def error_of(student, teacher, data):
    with torch.no_grad():
        pairs = zip(*(reals(m(*data.args, **data.kwargs)) for m in (student, teacher)), strict=True)
        return sum(float((a - b).square().mean() / b.var()) for a, b in pairs)


def test_a_hugging_face_model(gen):
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=16, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = hf.GPT2LMHeadModel(config)
    student = copy.deepcopy(teacher).eval()
    with torch.no_grad():
        for block in student.transformer.h:
            block.mlp.c_fc.weight[:, ::2] = 0
    ids = torch.randint(30, (32, 10), generator=gen)
    data = Rows((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    names = shared_features(student, teacher, ((), data.kwargs))
    assert {"transformer.h.0", "transformer.h.1", "transformer.h.0.mlp", "transformer.h.0.attn"} <= set(names)

    def apart():
        with torch.no_grad():
            return error_of(student, teacher.eval(), Rows((), {"input_ids": ids, "use_cache": False}))

    before = apart()
    distill_(student, teacher, data, Distill(steps=20, lr=2e-2), seed=gen)
    assert apart() < 0.7 * before
    assert student.config.use_cache


def test_nothing_inside_agrees(gen):
    """All hidden widths changed: no feature, the outputs do the work."""
    student, teacher = mlp_pair()
    assert shared_features(student, teacher, ((torch.zeros(2, 8),), {})) == []


def test_outputs_that_cannot_be_compared(gen):
    with pytest.raises(ModelError, match="cannot be compared"):
        distill_(nn.Linear(8, 4), nn.Linear(8, 3), Rows((torch.randn(9, 8),)), seed=gen)


def test_a_student_that_is_the_teacher_is_refused(gen):
    teacher = mlp()
    for student in (teacher, nn.Sequential(teacher)):
        with pytest.raises(InputError, match="share the tensor"):
            distill_(student, teacher, Rows((torch.randn(9, 8),)), seed=gen)


def test_what_are_no_queries(gen, unchecked):
    student, teacher = mlp_pair()
    with pytest.raises(InputError, match="queries must be Queries, not Tensor"):
        distill_(student, teacher, torch.randn(9, 8), seed=gen)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"batch_size": True},
        {"save_every": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"temperature": -1.0},
        {"features": math.inf},
        {"features": "1"},
    ],
)
def test_options_that_make_no_sense(wrong, unchecked):
    with pytest.raises(InputError, match=f"Distill.{next(iter(wrong))} must be"):
        Distill(**wrong)


def test_same_seed_same_weights_and_one_draw_from_the_generator():
    found = []
    for seed in (0, 0, 1):
        student, teacher = mlp_pair()
        generator = random(seed)
        distill_(student, teacher, Rows((torch.randn(40, 8, generator=random()),)), Distill(steps=4), seed=generator)
        found.append((bits(student), int(torch.randint(1 << 40, (), generator=generator))))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


def test_every_input_comes_once_a_pass():
    from coreprune.pruning.calibration.rows import Rows as Batches

    batches = Batches(Rows((torch.arange(10.0)[:, None],)), 4, True, 5)
    seen = [batches.batch(step)[0][0][:, 0].tolist() for step in range(5)]
    assert all(len(b) == 4 for b in seen)
    flat = [value for batch in seen for value in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]


def test_what_looks_like_images():
    assert is_image(torch.zeros(2, 3, 32, 32))
    assert is_image(torch.zeros(2, 1, 28, 28))
    for x in (
        torch.zeros(2, 32, 32, 3),
        torch.zeros(2, 3, 4, 32),
        torch.zeros(2, 784),
        torch.zeros(2, 3, 9, 9, dtype=torch.int64),
    ):
        assert not is_image(x)


def test_varied_images_are_made_of_the_given_ones(gen):
    """Constant images: only zeros come in, one half stays whole, the other gets rectangles of λ of the area."""
    values = torch.tensor([1.0, 2.0, 5.0, 7.0])
    x = values[:, None, None, None].expand(4, 2, 16, 16).clone()
    foreign = []
    for _ in range(200):
        y = varied(x, gen)
        assert y.shape == x.shape
        assert torch.equal(y[:, 0], y[:, 1])
        for image, value in zip(y[:, 0], values, strict=True):
            others = (image != value) & (image != 0)
            assert len(set(image[others].tolist())) <= 1
            if value > 2:
                foreign.append(float(others.float().mean()))
            else:
                assert not others.any()
    # λ, less what is rounded away, less the zeros, in the 3 of 4 cases in which the other is another
    assert 0.25 < sum(foreign) / len(foreign) < 0.375
    assert max(foreign) > 0.7


def test_images_are_mirrored_and_shifted_as_wholes(gen):
    """A single bright pixel stays one pixel, within an eighth of the sides of where it or its mirror image was."""
    from coreprune.pruning.calibration.augment import _shifted

    x = torch.zeros(400, 3, 16, 24)
    x[:, :, 8, 5] = torch.tensor([1.0, 2.0, 3.0])
    y = _shifted(x, gen)
    n, row, column = y[:, 0].nonzero(as_tuple=True)
    assert len(n) == 400
    assert set(row.tolist()) == set(range(6, 11))
    assert set(column.tolist()) == set(range(2, 9))
    assert torch.equal(y[n, :, row, column], torch.tensor([1.0, 2.0, 3.0]).expand(400, 3))
