"""What save() writes, load() brings back bit for bit; what save() did not write, load() refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_models import Attention, Buffers, ReadsValues, Residual, Tied, edit, mlp, pruned, reseal, seeded
from torch import nn

from coreprune import Plan, apply_plan, load, save
from coreprune.artifact import read_manifest, read_plan
from coreprune.errors import ArtifactError, CoreprunError, InputError, ModelError
from coreprune.pruning.plans.plan import fingerprint

IMAGES, VECTORS, SEQUENCE = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8), torch.zeros(1, 5, 16)
IDS = torch.tensor([[1, 2, 3, 19]])


def outputs(model, example):
    gen = torch.Generator().manual_seed(3)
    x = example if not example.is_floating_point() else torch.randn((4, *example.shape[1:]), generator=gen)
    with torch.no_grad():
        return model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """An artifact that the tests copy: the convolutions with the residual sum."""
    model, result = pruned(Residual, IMAGES)
    return model, result, save(result, tmp_path_factory.mktemp("kept") / "small")


@pytest.fixture
def folder(kept, tmp_path):
    return shutil.copytree(kept[2], tmp_path / "small")


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "example", "method"),
    [
        (mlp, VECTORS, "l2"),
        (mlp, VECTORS, "merging"),
        (mlp, VECTORS, "loewner"),
        (Residual, IMAGES, "folding"),
        (Tied, IDS, "l2"),
        (Buffers, VECTORS, "l2"),
        (ReadsValues, VECTORS, "l2"),
        (Attention, SEQUENCE, "l2"),
        (lambda: mlp().half(), VECTORS.half(), "l2"),
        (lambda: mlp().bfloat16(), VECTORS.bfloat16(), "l2"),
    ],
    ids=["mlp", "merged", "sampled", "folded", "tied", "buffers", "reads-values", "attention", "half", "bfloat16"],
)
def test_round_trip(make, example, method, tmp_path):
    model, result = pruned(make, example, method)
    assert result.plan.groups, "nothing was pruned, so nothing would be tested"
    save(result, tmp_path / "small")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for dense in (make, model):  # a function that makes the model, or such a model
        again = load(tmp_path / "small", dense)
        assert not again.training
        assert torch.equal(outputs(again, example), outputs(result.model, example))
        state = result.model.state_dict()
        assert list(again.state_dict()) == list(state)
        assert all(
            torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in again.state_dict().items()
        )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert next(model.parameters()).data_ptr() != next(again.parameters()).data_ptr()
    assert read_plan(tmp_path / "small") == result.plan == Plan.from_json(result.plan.to_json())
    assert read_manifest(tmp_path / "small").recipe == result.recipe


def test_a_loaded_model_does_not_lie_in_the_file(kept, folder):
    """Where the numbers lie decides how kernels round; and what is written over the file must not reach the model."""
    model, result, _ = kept
    again, path = load(folder, model), folder / "model.safetensors"
    assert all(t.data_ptr() % 64 == 0 for t in again.state_dict().values())  # like all memory of torch
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(outputs(again, IMAGES), outputs(result.model, IMAGES))


def test_ties_and_numbers_come_back(tmp_path):
    save(pruned(Tied, IDS)[1], tmp_path / "tied")
    tied = load(tmp_path / "tied", Tied)
    assert tied.out.weight is tied.embed.weight
    save(pruned(Attention, SEQUENCE)[1], tmp_path / "attention")
    attention = load(tmp_path / "attention", Attention)
    assert (attention.num_heads, attention.inner_dim, attention.proj.in_features) == (2, 16, 16)


def test_the_factory_runs_on_the_meta_device_where_that_suffices(kept):
    seen = []

    def factory():
        model = Residual()
        seen.append(model.head.weight.device.type)
        return model

    load(kept[2], factory)
    assert seen == ["meta"]


def test_frozen_parameters_stay_frozen_and_training_goes_on(kept):
    model = seeded(Residual)
    model.stem.requires_grad_(False)
    again = load(kept[2], model)
    assert not again.stem.weight.requires_grad
    again(torch.randn(2, 3, 8, 8)).sum().backward()
    assert again.head.weight.grad is not None


def test_what_lies_in_the_folder(kept):
    _, result, folder = kept
    assert {f.name for f in folder.iterdir()} == {
        "model.safetensors", "plan.json", "manifest.json", "report.json", "report.html",
    }  # fmt: skip
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o666 & ~umask for f in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    for name in ("plan.json", "manifest.json", "report.json"):
        json.loads((folder / name).read_text(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert set(load_file(folder / "model.safetensors")) == set(result.model.state_dict())


def test_the_plan_fits_another_checkpoint_without_an_example(kept):
    plan = read_plan(kept[2])
    other = seeded(Residual, seed=7)
    small = apply_plan(other, plan)
    group = plan.groups["inner"]
    assert torch.equal(small.inner.bias, other.inner.bias[list(group.kept)])
    with pytest.raises(InputError, match="another architecture"):
        apply_plan(seeded(mlp), plan)


# --- a place that is taken -----------------------------------------------------------------------------------------


def test_overwrite_is_asked_for(kept, tmp_path):
    _, result, _ = kept
    place = tmp_path / "small"
    place.mkdir()
    save(result, place)  # an empty folder is fine
    with pytest.raises(ArtifactError, match=r"not empty.*overwrite"):
        save(result, place)
    (place / "notes.txt").write_text("mine")
    save(result, place, overwrite=True)
    assert not (place / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        save(result, tmp_path / "file", overwrite=True)
    with pytest.raises(ArtifactError, match="cannot write"):
        save(result, tmp_path / "file" / "small")


def test_a_folder_called_old_is_not_ours_to_delete(kept, tmp_path):
    """Overwriting used to move the former artifact to small.old, and deleted what the user kept there."""
    (tmp_path / "small.old").mkdir()
    (tmp_path / "small.old" / "precious").write_text("mine")
    save(kept[1], tmp_path / "small")
    save(kept[1], tmp_path / "small", overwrite=True)
    assert (tmp_path / "small.old" / "precious").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(kept, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "small").symlink_to(tmp_path / "disk")
    for overwrite in (False, True):
        save(kept[1], tmp_path / "small", overwrite=overwrite)
        assert (tmp_path / "small").is_symlink()
        load(tmp_path / "disk", Residual)


def test_the_current_folder_is_refused(kept, tmp_path, monkeypatch):
    """Renamed over, it would be gone from under the user's shell."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="current folder"):
        save(kept[1], ".")


# --- what cannot be saved ------------------------------------------------------------------------------------------


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_models_that_could_not_be_loaded_are_not_saved(tmp_path):
    _, result = pruned(lambda: nn.Sequential(Extra(8, 16), nn.ReLU(), nn.Linear(16, 3)), VECTORS)
    with pytest.raises(InputError, match="neither a parameter nor a buffer"):
        save(result, tmp_path / "small")
    for change in (nn.Module.half, lambda m: m.append(nn.Linear(3, 3)), lambda m: m.__delitem__(4)):
        _, result = pruned(mlp, VECTORS)
        change(result.model)
        with pytest.raises(InputError, match=r"not as prune\(\) left it"):
            save(result, tmp_path / "small")
    _, result = pruned(mlp, VECTORS)
    for more in ({"extra": {"x": object()}}, {"source": {"x": {1, 2}}}):
        with pytest.raises(InputError, match="plain values"):
            save(result, tmp_path / "small", **more)
    with pytest.raises(InputError, match="what prune"):
        save(result.model, tmp_path / "small")
    assert not list(tmp_path.iterdir())


class Remembers(nn.Module):
    """Tuples of modules and of tensors, which differ in every copy."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.both = (self.a, self.b)
        self.grids = (torch.arange(4), torch.arange(4))
        self.shape = self.a.weight.shape
        self.nothing = (float("nan"), None)

    def forward(self, x):
        return self.both[1](torch.relu(self.both[0](x)))


def test_tuples_of_modules_are_no_numbers(tmp_path):
    """They were compared, which raised, or put into the manifest, which failed; in place, they became the copy's."""
    _, result = pruned(Remembers, VECTORS)
    save(result, tmp_path / "small")
    again = load(tmp_path / "small", Remembers)
    assert torch.equal(outputs(again, VECTORS), outputs(result.model, VECTORS))
    assert again.both[0] is again.a
    model, result = pruned(Remembers, VECTORS, inplace=True)
    assert model.both[0] is model.a
    assert model.a.out_features == 8


# --- refusals: the dense model -------------------------------------------------------------------------------------


class Wider(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(12, 10, 3, padding=1)


class Longer(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


class Shorter(Residual):
    def __init__(self) -> None:
        super().__init__()
        del self.head


class Grouped(Residual):
    """The same shapes, but for a number that the module remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.outer.out_channels = 99


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        (None, InputError, "Pass a function that makes"),
        (mlp, InputError, "the dense model has no stem.weight"),
        (Wider, InputError, r"inner.weight is float32 \(10, 12, 3, 3\) in this dense model and was"),
        (Longer, InputError, "further tensors"),
        (Shorter, InputError, "has no head.weight"),
        (Grouped, ModelError, "outer.out_channels was 12 in the model that was pruned, and is 99"),
        (lambda: Residual().double(), InputError, "float64"),
        (lambda: (Residual(), IMAGES), InputError, "gave a tuple"),
        (5, InputError, "not a int"),
    ],
)
def test_another_dense_model(kept, dense, error, message):
    with pytest.raises(error, match=message):
        load(kept[2], dense)


def test_ties_must_be_there(tmp_path):
    save(pruned(Tied, IDS)[1], tmp_path / "tied")

    def untied():
        model = Tied()
        model.out.weight = nn.Parameter(model.out.weight.clone())
        return model

    with pytest.raises(InputError, match="were one tensor"):
        load(tmp_path / "tied", untied)


def test_a_device_that_is_not_there(kept):
    with pytest.raises(InputError, match="device='nonsense' cannot be used"):
        load(kept[2], Residual, device="nonsense")
    assert load(kept[2], Residual, device="cpu").head.weight.device.type == "cpu"


# --- refusals: the folder ------------------------------------------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "manifest.json"])
def test_damaged_files(folder, name):
    path = folder / name
    whole = path.read_bytes()
    cut_off(path)
    with pytest.raises(ArtifactError, match=r"incomplete|not JSON"):
        load(folder, Residual)
    path.write_bytes(whole)
    flip(path)
    with pytest.raises(ArtifactError, match=r"hash differs|not JSON"):
        load(folder, Residual)
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot read"):
        load(folder, Residual)
    path.mkdir()
    with pytest.raises(ArtifactError, match="not a regular file"):
        load(folder, Residual)


def test_no_artifact_at_all(tmp_path):
    for place in (tmp_path / "absent", tmp_path, __file__):
        with pytest.raises(ArtifactError, match=r"cannot read|coreprune\.save"):
            load(place, Residual)


MANIFEST = {
    "another schema": (lambda m: m.update(schema=2), "has schema 2"),
    "a schema that equals ours": (lambda m: m.update(schema=True), "has schema True"),
    "a path upwards": (lambda m: m["files"].update({"../x": m["files"]["plan.json"]}), "no place in an artifact"),
    "an absolute path": (lambda m: m["files"].update({"/etc/passwd": m["files"]["plan.json"]}), "no place"),
    "no weights": (lambda m: m["files"].pop("model.safetensors"), "does not list model.safetensors"),
    "no plan": (lambda m: m["files"].pop("plan.json"), "does not list plan.json"),
    "a negative size": (lambda m: m["files"]["plan.json"].update(bytes=-1), "is no size"),
    "a hash that is none": (lambda m: m["files"]["plan.json"].update(sha256="0"), "64 hexadecimal"),
    "another fingerprint": (lambda m: m.update(fingerprint="0" * 16), "another architecture"),
    "an unknown dtype": (lambda m: m["tensors"]["head.bias"].update(dtype="object"), "no dtype"),
    "another dtype": (lambda m: m["tensors"]["head.bias"].update(dtype="float16"), "the manifest says"),
    "another shape": (lambda m: m["tensors"]["head.bias"].update(shape=[4]), "the manifest says"),
    "a tensor too many": (lambda m: m["tensors"].update(x=m["tensors"]["head.bias"]), "different tensors: x"),
    "a tensor too few": (lambda m: m["tensors"].pop("head.bias"), "different tensors: head.bias"),
    "a shape that grows": (lambda m: m["recipe"]["shapes"]["inner.bias"].reverse(), "pruning cannot make"),
    "a shape without a tensor": (lambda m: m["recipe"]["shapes"].update(x=[[2], [1]]), "contradicts itself"),
    "a shape of another rank": (lambda m: m["recipe"]["shapes"].update(x=[[2, 2], [1]]), "pruning cannot make"),
    "a shape of many axes": (lambda m: m["tensors"]["head.bias"].update(shape=[1 << 61] * 10**5), "is no shape"),
    "a number that grows": (lambda m: m["recipe"]["numbers"]["inner"].update(out_channels=[4, 8]), "cannot make"),
    "a number of two kinds": (lambda m: m["recipe"]["numbers"]["inner"].update(out_channels=[8, [4]]), "cannot make"),
    "a number that is none": (lambda m: m["recipe"]["numbers"]["inner"].update(out_channels=["8", 4]), "no size"),
    "nothing": (lambda m: m.clear(), "not a manifest"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MANIFEST.values(), ids=MANIFEST.keys())
def test_forged_manifests(folder, change, message):
    edit(folder / "manifest.json", change)
    with pytest.raises(ArtifactError, match=message):
        load(folder, Residual)


@pytest.mark.parametrize(
    ("path", "key", "values", "message"),
    [
        ("inner", "out_channels", [7, 4], "inner.out_channels was 7"),
        ("inner", "nothing", [8, 4], "inner.nothing was 8"),
        ("inner", "kernel_size", [3, 1], "kernel_size was 3"),
        ("absent", "out_channels", [8, 4], "absent.out_channels was 8"),
        ("inner", "__class__", [8, 4], "inner.__class__ was 8"),
    ],
)
def test_numbers_that_are_not_the_models(folder, path, key, values, message):
    edit(folder / "manifest.json", lambda m: m["recipe"]["numbers"].setdefault(path, {}).update({key: values}))
    with pytest.raises(ModelError, match=message):
        load(folder, Residual)


def test_tensors_that_nothing_names(folder):
    """The weights were exchanged, and sizes and hashes made right again."""
    weights = load_file(folder / "model.safetensors")
    a, b = weights["bn1.running_mean"], weights["inner.bias"]
    forged = {
        "different tensors: further": weights | {"further": torch.zeros(1)},
        "different tensors: head.bias": {k: t for k, t in weights.items() if k != "head.bias"},
        "inner.bias is": weights | {"bn1.running_mean": b, "inner.bias": a},
        "head.bias is": weights | {"head.bias": weights["head.bias"].double()},
    }
    for message, tensors in forged.items():
        save_file(tensors, folder / "model.safetensors")
        reseal(folder)
        with pytest.raises(ArtifactError, match=message):
            load(folder, Residual)


def test_a_plan_of_another_model(folder, tmp_path):
    save(pruned(mlp, VECTORS)[1], tmp_path / "other")
    shutil.copy(tmp_path / "other" / "plan.json", folder / "plan.json")
    reseal(folder)
    with pytest.raises(ArtifactError, match="another architecture"):
        load(folder, Residual)


def test_links_are_followed_to_files_and_to_nothing_else(folder, tmp_path):
    """Download caches consist of links, and the hash says whether the content is right. A device never ends."""
    for name in ("model.safetensors", "plan.json", "manifest.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    load(folder, Residual)
    os.mkfifo(tmp_path / "pipe")
    for name in ("model.safetensors", "plan.json", "manifest.json"):
        for target, message in (
            ("/dev/zero", "not a regular file"),
            (tmp_path / "pipe", "not a regular file"),
            ("/etc/passwd", "has .* bytes, the manifest says|is not JSON"),
            (tmp_path / "absent", "cannot read"),
            (folder / name, "cannot read"),
        ):
            (folder / name).unlink()
            (folder / name).symlink_to(target)
            with pytest.raises(ArtifactError, match=message):
                load(folder, Residual)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)


def test_a_forged_configuration_makes_no_giant(tmp_path):
    """A few bytes of config could ask for any amount of memory, where the real model has to be made."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    make = lambda: transformers.BertForSequenceClassification(config)  # noqa: E731
    _, result = pruned(make, {"input_ids": torch.tensor([[1, 2, 3]])})
    folder = save(result, tmp_path / "small")
    load(folder)

    def giant(m):
        m["config"]["vocab_size"] = 1 << 40
        m["recipe"]["shapes"]["bert.embeddings.word_embeddings.weight"] = [[1 << 40, 16], [50, 16]]

    def deep(m):
        m["config"]["num_hidden_layers"] = 9_999

    whole = (folder / "manifest.json").read_text()
    for change in (giant, deep):
        edit(folder / "manifest.json", change)
        with pytest.raises(CoreprunError, match=r"dense|further tensors|more than 512 are not built"):
            load(folder)
        (folder / "manifest.json").write_text(whole)

    # And where the fingerprints are forged as well, so that nothing contradicts itself.
    config.vocab_size = 1 << 36
    with torch.device("meta"):
        forged = fingerprint(make())
    plan = json.loads((folder / "plan.json").read_text()) | {"fingerprint": forged}
    content = json.dumps(plan).encode()
    (folder / "plan.json").write_bytes(content)

    def consistent(m):
        m["config"]["vocab_size"], m["fingerprint"] = 1 << 36, forged
        m["recipe"]["shapes"]["bert.embeddings.word_embeddings.weight"] = [[1 << 36, 16], [50, 16]]
        m["files"]["plan.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit(folder / "manifest.json", consistent)
    with pytest.raises(CoreprunError, match=r"of [\d,]+ bytes, and model.safetensors has"):
        load(folder)


# --- a disk that refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["save_file", "write_text", "fsync", "rename", "mkdtemp"])
@pytest.mark.parametrize("present", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_at_every_point(kept, tmp_path, monkeypatch, point, present):
    """Whatever fails: an ArtifactError, no trace, and the former artifact as it was."""
    _, result, _ = kept
    place = tmp_path / "small"
    if present:
        save(result, place)
    before = {f.name: f.read_bytes() for f in place.iterdir()} if present else None
    targets = {
        "write_text": "pathlib.Path.write_text",
        "fsync": "os.fsync",
        "rename": "pathlib.Path.replace",
        "mkdtemp": "tempfile.mkdtemp",
    }
    real = {"fsync": os.fsync, "rename": type(place).replace, "write_text": type(place).write_text}.get(point)

    def unwritten(*args):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    fails = 0
    for last in range(30):  # the first call fails, then only the second, and so on, until none does
        calls = 0

        def full(*args, last=last, **kwargs):
            nonlocal calls
            calls += 1
            if real is None or calls == last + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            if point == "save_file":  # safetensors has an error of its own, with the number in the text
                patch.setattr(sys.modules["coreprune.artifact.saving"], "save_file", unwritten)
            else:
                patch.setattr(targets[point], full)
            try:
                save(result, place, overwrite=True)
                break
            except ArtifactError as error:
                said = str(error)
        fails += 1
        assert "No space left on device. Free some space" in said
        found = {f.name: f.read_bytes() for f in place.iterdir()} if place.exists() else None
        assert found == before
        assert [p.name for p in tmp_path.iterdir()] == (["small"] if present else [])
        if real is None:
            break
    assert fails >= {"fsync": 7, "rename": 1 + present, "write_text": 3}.get(point, 1)


def test_an_interruption_while_folders_are_exchanged(kept, tmp_path, monkeypatch):
    """Ctrl-C between the two renames used to leave the former artifact under another name."""
    save(kept[1], tmp_path / "small")
    real, calls = type(tmp_path).replace, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(kept[1], tmp_path / "small", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    load(tmp_path / "small", Residual)
