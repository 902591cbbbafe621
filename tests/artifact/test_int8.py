"""int8 files: they run, are smaller, give the model's answers on queries held out, or nothing is written."""

from __future__ import annotations

import functools
import json
import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from coreprune import Queries, _onnx, export_int8, export_onnx, make_queries
from coreprune._twin import quiet
from coreprune.artifact import int8
from coreprune.errors import ArtifactError, InputError, ModelError
from graph.zoo import ZOO, randomise
from small_networks import bits


def seeded(*layers: nn.Module) -> nn.Sequential:
    """The layers with weights of a seed, whatever was drawn before."""
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        fan = p[0].numel() if p.dim() > 1 else 10
        p.data.normal_(0, (2 / fan) ** 0.5, generator=generator)
    return model


def cnn() -> nn.Module:
    pairs = pairwise((3, 24, 48))
    convolutions = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU())]
    return seeded(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5))


def mlp(classes: int = 5) -> nn.Module:
    return seeded(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes))


def draws(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def weights(path: Path) -> list[np.ndarray]:
    """The matrices and kernels that lie in the file as int8."""
    tensors = (numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer)
    return [t for t in tensors if t.dtype == np.int8 and t.ndim >= 2]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize(
    ("build", "shape", "mode", "layers"), [(cnn, (3, 10, 10), "static", 3), (mlp, (20,), "dynamic", 3)]
)
def test_a_file_runs_is_smaller_and_gives_the_models_answers(build, shape, mode, layers, tmp_path):
    model, path = build(), tmp_path / "deep" / "m.onnx"
    done = export_int8(model, torch.zeros(1, *shape), path, draws(300, *shape))
    assert (done.path, done.mode, done.batch, done.note) == (path, mode, "dynamic", "")
    assert (done.calibrated, done.held_out) == (150 if mode == "static" else 0, 150)
    assert len(weights(path)) == layers
    assert all(abs(w.astype(int)).max() <= 64 for w in weights(path)), "7 bits, for processors that overflow with 8"
    export_onnx(model, torch.zeros(1, *shape), tmp_path / "float.onnx")
    assert done.bytes == ((tmp_path / "float.onnx").stat().st_size, path.stat().st_size)
    assert done.bytes[1] < 0.5 * done.bytes[0]
    for samples in (1, 7):
        x = draws(samples, *shape, seed=2)
        with quiet(model) as still:
            assert outputs(path, x).shape == (samples, 5)
            assert relative(outputs(path, x), still(x)) < 0.01
    assert done.agreement > 0.9
    assert 0 < done.error < 0.01
    assert f"the same answer for {done.agreement:.1%}" in str(done)
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]


def test_what_was_measured_is_in_the_file(tmp_path):
    done = export_int8(mlp(), torch.zeros(1, 20), tmp_path / "m.onnx", draws(40, 20), mode="static")
    (said,) = [json.loads(p.value) for p in onnx.load(done.path).metadata_props if p.key == "coreprune.int8"]
    assert said["onnxruntime"] == onnxruntime.__version__
    assert all(said[k] == v for k, v in done.as_dict().items() if k not in ("path", "bytes", "note"))
    assert (said["mode"], said["calibrated"], said["held_out"], said["source"]) == ("static", 20, 20, "samples")


def test_what_is_measured_is_counted_on_queries_that_set_no_range(tmp_path, monkeypatch):
    """Every query twice, so that a split by position alone would leak. The numbers are counted again by hand."""
    seen: dict[str, Queries] = {}
    feeds, compared = int8.feeds, int8._compared

    def calibrate(queries, *rest):
        seen["calibration"] = queries
        return feeds(queries, *rest)

    def measure(model, file, held_out):
        seen["held out"] = held_out
        return compared(model, file, held_out)

    monkeypatch.setattr(int8, "feeds", calibrate)
    monkeypatch.setattr(int8, "_compared", measure)
    model, x = cnn(), draws(60, 3, 10, 10)
    done = export_int8(model, x[:1], tmp_path / "m.onnx", torch.cat([x, x]), seed=3)
    rows = {name: {r.numpy().tobytes() for r in q.args[0]} for name, q in seen.items()}
    assert len(rows["calibration"]) == len(rows["held out"]) == 30
    assert not rows["calibration"] & rows["held out"]
    fresh = seen["held out"].args[0]
    with quiet(model) as still:
        wanted, found = still(fresh), outputs(done.path, fresh)
    assert done.agreement == float((wanted.argmax(1) == found.argmax(1)).double().mean())
    assert done.error == pytest.approx(relative(found, wanted) * 150 / 149, rel=1e-3)


def test_static_ranges_are_those_of_the_calibration(tmp_path):
    """Inputs far outside of them are cut off; a dynamic file finds its ranges anew."""
    model, x = mlp(), draws(100, 20)
    files = {m: export_int8(model, x[:1], tmp_path / f"{m}.onnx", x, mode=m).path for m in ("static", "dynamic")}
    with quiet(model) as still:
        far = {mode: relative(outputs(path, 30 * x), still(30 * x)) for mode, path in files.items()}
    assert far["dynamic"] < 0.01
    assert far["static"] > 0.3


@pytest.mark.slow
def test_a_transformer_is_dynamic_and_its_embedding_shrinks(tmp_path):
    entry = ZOO["bert"]
    model = randomise(entry.build()).float()
    done = export_int8(model, entry.inputs(1), tmp_path / "m.onnx", "random-tokens", tolerance=1)
    assert (done.mode, done.batch) == ("dynamic", "dynamic")
    assert done.error < 0.05
    assert done.bytes[1] < done.bytes[0]
    tables = [t for t in onnx.load(done.path).graph.initializer if t.data_type in (2, 3) and len(t.dims) == 2]
    vocabulary = model.config.vocab_size
    assert any(t.dims[0] == vocabulary for t in tables)


class Reader(nn.Module):
    """A number for every token and direction; at padding, which the mask names, a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.net = seeded(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 6))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net(self.words(ids)) * (100 - 99 * mask[..., None])


def test_what_is_computed_at_padding_is_no_error(tmp_path):
    torch.manual_seed(0)
    model = Reader().eval()
    ids = torch.randint(10, 50, (80, 8), generator=torch.Generator().manual_seed(0))
    ids[::2, 5:] = 0
    mask = (ids > 0).long()
    done = export_int8(model, (ids[:1], mask[:1]), tmp_path / "m.onnx", (ids, mask), tolerance=1)
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    found = torch.from_numpy(session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))[0])
    with torch.no_grad():
        wanted = model(ids, mask)
    at_words = relative(found[mask.bool()], wanted[mask.bool()])
    assert at_words > 0
    assert done.error == pytest.approx(at_words, rel=0.5)  # of other texts, those that were held out
    assert not at_words / 2 < relative(found, wanted) < 2 * at_words  # so that the test tells the two apart


class Regression(nn.Module):
    """No classes: an image in, an image out, and no batch axis at all if it is given none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("shape", [(1, 2, 6, 6), (2, 6, 6)], ids=["batch", "whole"])
def test_without_classes_the_error_counts(shape, tmp_path):
    model, example = Regression(), torch.zeros(shape)
    path = tmp_path / "m.onnx"
    queries = draws(20, 2, 6, 6)
    done = export_int8(model, example, path, list(queries) if len(shape) == 3 else queries)
    assert done.agreement is None
    assert "the same answer" not in str(done)
    assert 0 < done.error < 0.1
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"squared error is .* of the outputs' variance, more than tolerance=1e-09"):
        export_int8(model, example, path, list(queries) if len(shape) == 3 else queries, tolerance=1e-9, mode="static")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_other_answers_is_refused_and_says_what_to_do(tmp_path):
    """Two classes that differ by less than int8 can tell."""
    model = mlp(classes=2)
    model[-1].weight.data[1] = model[-1].weight[0] + 1e-4 * draws(128)
    model[-1].bias.data.zero_()
    with pytest.raises(ArtifactError) as caught:
        export_int8(model, torch.zeros(1, 20), tmp_path / "m.onnx", draws(200, 20))
    said = str(caught.value)
    assert "the dynamic int8 file is far from the model on 100 held-out queries (samples): it gives another" in said
    assert "more than tolerance=0.1, so it is not kept" in said
    assert "Pass more samples, try mode='static', or export without int8" in said
    assert not list(tmp_path.iterdir())
    done = export_int8(model, torch.zeros(1, 20), tmp_path / "m.onnx", draws(200, 20), tolerance=1)
    assert done.agreement < 0.9


def test_a_file_that_runs_at_one_batch_size_alone_is_not_kept(tmp_path, monkeypatch):
    run = int8.onnx_run

    def only_one(place, names):
        real = run(place, names)

        def once(inputs):
            if len(inputs[0][0]) > 1:
                raise RuntimeError("a shape")
            return real(inputs)

        return once

    monkeypatch.setattr(int8, "onnx_run", only_one)
    with pytest.raises(ArtifactError, match="the int8 file does not run with 2 samples: RuntimeError: a shape"):
        export_int8(mlp(), torch.zeros(1, 20), tmp_path / "m.onnx", draws(20, 20))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_fixed_batch_on_request(mode, tmp_path):
    model = mlp()
    done = export_int8(model, torch.zeros(4, 20), tmp_path / "m.onnx", draws(30, 20), mode=mode, batch="static")
    assert done.batch == 4
    assert "batch size 4 alone" in str(done)
    x = draws(4, 20, seed=2)
    with quiet(model) as still:
        assert relative(outputs(done.path, x), still(x)) < 0.01


class Second(nn.Module):
    """Samples along axis 1, a keyword, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = seeded(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x, scale=None, twice=False):
        y = self.layer(x).sum(0) * scale
        return {"logits": 2 * y if twice else y, "sum": y.sum(1)}


def test_keywords_and_another_batch_axis(tmp_path):
    example = {"x": torch.zeros(5, 1, 6), "twice": True, "scale": torch.tensor([2.0])}
    axes = {"x": 1, "scale": None}
    done = export_int8(Second(), example, tmp_path / "m.onnx", {"x": draws(5, 40, 6)}, batch_axis=axes)
    assert (done.batch, done.held_out, done.mode) == ("dynamic", 20, "dynamic")
    assert done.agreement > 0.8


def test_the_model_and_the_callers_logging_stay_as_they_were(tmp_path):
    root = logging.getLogger()
    model, handlers = cnn().train(), list(root.handlers)
    before = bits(model)
    export_int8(model, torch.zeros(1, 3, 10, 10), tmp_path / "m.onnx", draws(20, 3, 10, 10))
    assert bits(model) == before
    assert model.training
    assert root.handlers == handlers


@functools.cache
def queries_with_nan() -> Queries:
    queries = make_queries(mlp(), torch.zeros(1, 20), draws(10, 20))
    queries.args[0][3, 4] = float("nan")
    return queries


class Scaled(nn.Module):
    """Nothing to quantise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(20))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * self.scale)


class Two(nn.Module):
    """A batch size that is written into the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(2, 4) + 1


X = (1, 20)


@pytest.mark.parametrize(
    ("model", "example", "queries", "more", "error", "match"),
    [
        (mlp, X, draws(9, 20), {"mode": "int8"}, InputError, r"mode must be .* not 'int8'"),
        (mlp, X, draws(9, 20), {"tolerance": -1}, InputError, "tolerance must be a number of at least 0, not -1"),
        (mlp, X, draws(9, 20), {"tolerance": float("nan")}, InputError, "tolerance must be a number"),
        (mlp, X, draws(9, 20), {"batch": "free"}, InputError, "'free'"),
        (lambda: mlp().double(), X, draws(9, 20), {}, InputError, r"0\.weight is torch\.float64\. Call model\.float"),
        (mlp, X, draws(9, 21), {}, InputError, r"\(N, 20\)"),
        (mlp, X, draws(9, 20) * float("nan"), {}, InputError, "NaN or infinite numbers in row 0"),
        (mlp, X, queries_with_nan, {}, InputError, "the queries hold NaN or infinite numbers"),
        (mlp, X, torch.ones(9, 20), {}, InputError, "at least two different queries"),
        (mlp, X, "nonsense", {}, InputError, "nonsense"),
        (Scaled, X, draws(9, 20), {}, ModelError, "there is nothing to quantise"),
        (Regression, (1, 2, 6, 6), draws(9, 2, 6, 6), {"mode": "dynamic"}, ModelError, "matrix products, and the mod"),
        (Two, (2, 20), draws(9, 20), {"batch_axis": 0}, ModelError, "Two does not run with 1 sample "),
    ],
)
def test_what_cannot_be_done_is_an_error_and_leaves_nothing(
    model, example, queries, more, error, match, tmp_path, unchecked
):
    queries = queries() if callable(queries) else queries
    with pytest.raises(error, match=match):
        export_int8(model(), torch.zeros(example), tmp_path / "m.onnx", queries, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_the_way_to_get_it(name, tmp_path, monkeypatch):
    find = _onnx.importlib.util.find_spec
    monkeypatch.setattr(_onnx.importlib.util, "find_spec", lambda n: None if n == name else find(n))
    with pytest.raises(ArtifactError, match=rf"needs {name}, .*pip install 'coreprune\[onnx\]'"):
        export_int8(mlp(), torch.zeros(1, 20), tmp_path / "m.onnx", draws(9, 20))
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*m\.onnx: Is a directory"):
        export_int8(mlp(), torch.zeros(1, 20), tmp_path / "m.onnx", draws(9, 20))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
