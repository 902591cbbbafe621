"""Pruned models elsewhere: torch.export, torch.compile and ONNX give the same outputs, or nothing is written."""

from __future__ import annotations

import functools
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, _onnx, prune
from coreprune._batch import usual
from coreprune._example import normalise_example
from coreprune._twin import quiet
from coreprune.artifact import exports
from coreprune.artifact.exports import export_onnx, export_program
from coreprune.errors import ArtifactError, InputError, ModelError
from graph.zoo import ZOO, randomise
from sweeps import thinned

# The architectures that people export most: an MLP, a ResNet, depthwise convolutions, text and images with attention.
NAMES = ("mlp", "hf-resnet", "mobilenet-v2", "bert", "vit")
COMPILED = ("mlp", "hf-resnet", "bert")
COMPILER = (shutil.which("g++") or shutil.which("clang++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
quick = pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])


@functools.cache
def pruned(name: str) -> tuple[nn.Module, object]:
    """Half of every free group of an architecture of the zoo, in float32, and an example of one sample."""
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs(1)
    if name == "mobilenet-v2":  # half of its depth: of the blocks that only add to their input, the first two
        blocks = model.mobilenet_v2.layer
        adding = [block for block in blocks if block.use_residual][2:]
        model.mobilenet_v2.layer = nn.ModuleList(block for block in blocks if block not in adding)
    model = randomise(model).float()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    example = inputs["x"] if set(inputs) == {"x"} else inputs
    small = prune(model, example, Budget(keep=0.5), "magnitude", queries=None).model
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small, example


def outputs(model, example, samples: int) -> list[Tensor]:
    inputs = normalise_example(example)
    args, kwargs = usual(inputs).repeated(inputs, samples)
    found = model(*args, **kwargs)
    return [found] if isinstance(found, Tensor) else [x for x in found.values() if isinstance(x, Tensor)]


def agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert float(b.abs().max()) > 1e-3  # no network that has died, whose outputs would agree with anything
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(NAMES, 3))
def test_onnx_gives_the_same_outputs_at_every_batch_size(name, tmp_path):
    import onnxruntime

    model, example = pruned(name)
    done = export_onnx(model, example, tmp_path / "model.onnx")
    assert (done.batch, done.note) == ("dynamic", "")
    assert done.difference <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    given = session.get_inputs()
    assert [i.shape[0] for i in given] == ["batch"] * len(given)
    for samples in (1, 5):
        inputs = normalise_example(example)
        args, kwargs = usual(inputs).repeated(inputs, samples)
        values = kwargs or {given[0].name: args[0]}
        found = session.run(None, {name: x.numpy() for name, x in values.items()})
        with quiet(model) as still:
            agree([torch.from_numpy(x) for x in found], outputs(still, example, samples))


@quick
def test_a_program_gives_the_same_outputs_at_every_batch_size(name, tmp_path):
    model, example = pruned(name)
    done = export_program(model, example, tmp_path / "model.pt2")
    assert (done.batch, done.note) == ("dynamic", "")
    module = torch.export.load(done.path).module()
    for samples in (1, 5):
        with quiet(model) as still:
            agree(outputs(module, example, samples), outputs(still, example, samples))


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAMES[0], *thinned(NAMES[1:], 3)])
def test_compiled_models_give_the_same_outputs(name):
    """Down to machine code where there is a compiler and it does not take long, else to the graph."""
    model, example = pruned(name)
    torch._dynamo.reset()
    backend = "inductor" if name in COMPILED and COMPILER else "aot_eager"
    with quiet(model, own_inputs=False) as still:
        compiled = torch.compile(still, backend=backend, fullgraph=True)
        agree(outputs(compiled, example, 2), outputs(still, example, 2))


class Two(nn.Module):
    """A batch size that is written into the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(2, 4) + 1


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_a_batch_that_cannot_be_free_is_fixed_and_the_summary_says_why(export, tmp_path):
    done = export(Two(), torch.randn(2, 3), tmp_path / "two.pt2", batch_axis=0)
    assert done.batch == 2
    assert done.note.startswith("The batch axis is fixed")
    assert "batch size 2 alone" in str(done)
    assert done.note in str(done)


def test_a_free_batch_axis_is_tried_at_other_sizes_than_it_was_traced_with(tmp_path, monkeypatch):
    """Traced with two samples, and right with up to two: it is not called dynamic."""
    model, example = pruned("mlp")
    real = exports._write_program

    def write(*given):
        run = real(*given)
        return lambda inputs: [x if len(x) <= 2 else x + 1 for x in run(inputs)]

    monkeypatch.setattr(exports, "_write_program", write)
    done = export_program(model, example, tmp_path / "model.pt2")
    assert done.batch == 1
    assert "with 3 samples" in done.note


def test_a_static_batch_on_request(tmp_path):
    import onnxruntime

    done = export_onnx(nn.Linear(3, 2), torch.randn(4, 3), tmp_path / "m.onnx", batch="static")
    assert (done.batch, done.note) == (4, "")
    assert onnxruntime.InferenceSession(done.path).get_inputs()[0].shape == [4, 3]


class Keywords(nn.Module):
    """Keyword inputs in any order, some of them no tensors, one without samples, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, mask=None, scale=None, twice=False, other=None):
        y = self.layer(x) * (mask[:, None] if mask is not None else 1) * scale
        return {"logits": y * 2 if twice else y, "sum": y.sum(1)}


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_keyword_inputs_in_any_order(export, tmp_path):
    example = {
        "scale": torch.tensor([2.0, 3.0]),
        "twice": True,
        "other": None,
        "x": torch.randn(3, 3),
    }
    # The first tensor says how many samples there are.
    example = {"mask": torch.tensor([1.0, 0.5, 0.25]), **example}
    done = export(Keywords(), example, tmp_path / "m.pt2")
    assert (done.batch, done.note) == ("dynamic", "")
    if export is export_onnx:
        import onnxruntime

        session = onnxruntime.InferenceSession(done.path)
        assert {o.name for o in session.get_outputs()} == {"logits", "sum"}
        assert {i.name: i.shape for i in session.get_inputs()} == {"x": ["batch", 3], "mask": ["batch"], "scale": [2]}


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_modes_and_gradients_are_left_as_they_were(export, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    export(model, torch.randn(2, 3), tmp_path / "m.pt2")
    assert [m.training for m in model] == [True, False, True, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_outputs_that_differ_are_an_error_and_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")
    write = exports._write_program

    def wrong(*given):
        run = write(*given)
        return lambda inputs: [x + 0.01 * x.abs().max() for x in run(inputs)]

    monkeypatch.setattr(exports, "_write_program", wrong)
    with pytest.raises(ArtifactError, match=r"1\.0e-02 away"):
        export_program(nn.Linear(3, 2), torch.randn(1, 3), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert export_program(nn.Linear(3, 2), torch.randn(1, 3), path, tolerance=0.1).difference > 0.005


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")

    def full(place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports, "flush", full)
    with pytest.raises(ArtifactError, match="Free some space"):
        export_program(nn.Linear(3, 2), torch.randn(1, 3), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_way_to_get_it(name, tmp_path, monkeypatch):
    find = _onnx.importlib.util.find_spec
    monkeypatch.setattr(_onnx.importlib.util, "find_spec", lambda n: None if n == name else find(n))
    with pytest.raises(ArtifactError, match=rf"needs {name}, .*pip install 'coreprune\[onnx\]'"):
        export_onnx(nn.Linear(3, 2), torch.randn(1, 3), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_programs_need_none_of_the_onnx_packages(tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert export_program(nn.Linear(3, 2), torch.randn(1, 3), tmp_path / "m.pt2").path.exists()


class Branch(nn.Module):
    """No graph: the way depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize(
    ("model", "example", "more", "error", "match"),
    [
        (Branch(), torch.ones(1, 3), {}, ModelError, "torch.export cannot trace Branch"),
        (nn.Linear(4, 2), torch.ones(1, 3), {}, ModelError, "Linear does not run on the example"),
        (nn.Linear(3, 2), torch.ones(1, 3), {"batch": "free"}, InputError, "'free'"),
        (nn.Linear(3, 2), {"n": 1}, {}, InputError, "no samples"),
        (nn.Linear(3, 2), torch.ones(1, 3), {"path": "m.zip"}, InputError, r"m\.pt2"),
    ],
)
def test_what_cannot_be_exported_is_an_error(model, example, more, error, match, tmp_path):
    more = dict(more)
    path: Path = tmp_path / more.pop("path", "m.pt2")
    with pytest.raises(error, match=match):
        export_program(model, example, path, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("found", "wanted", "far"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([float("-inf"), 2.0], [float("-inf"), 2.0], 0.0),
        ([float("-inf"), 2.0], [1.0, 2.0], float("inf")),
        ([float("inf"), 2.0], [float("-inf"), 2.0], float("inf")),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([1.0, 2.0], [1.0, float("nan")], float("inf")),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_differences(found, wanted, far):
    assert exports._difference([torch.tensor(found)], [torch.tensor(wanted)]) == far
    with pytest.raises(ArtifactError, match="shapes"):
        exports._difference([torch.tensor(found)], [torch.tensor([wanted])])
