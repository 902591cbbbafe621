"""open_model: weights that stay in their files are the same weights, and what is damaged is refused."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hf_cases import BERT, CLIP, GPT2, GQA, T5, TIED, VIT, hf, made
from safetensors.torch import load_file, save_file
from torch import nn

from coreprune import ArtifactError, Budget, InputError, open_model, prune
from coreprune import _mapped as mapping
from coreprune._mapped import copies, in_file, is_mapped, mapped_file, stored_as, write_

IDS = torch.randint(3, 20, (16, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def spilled(monkeypatch):
    """Small tensors go into files, too."""
    monkeypatch.setattr(mapping, "_SMALL", 1)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def ties(model):
    state = model.state_dict(keep_vars=True)
    return {frozenset(name for name in state if state[name] is t) for t in state.values()}


@pytest.mark.parametrize(
    ("case", "mapped"),
    [(BERT, True), (GPT2, True), (GQA, True), (TIED, True), (T5, True), (CLIP, True), (VIT, False)],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_it_is_the_model_that_transformers_loads(case, mapped, tmp_path, caplog):
    made(case).save_pretrained(tmp_path)
    found, loaded = open_model(tmp_path), type(made(case)).from_pretrained(tmp_path)
    assert all(is_mapped(p) == mapped for p in found.parameters())
    assert ("read into memory as a whole" in caplog.text) != mapped
    for mine, theirs in (
        (found.state_dict(), loaded.state_dict()),
        (dict(found.named_buffers()), dict(loaded.named_buffers())),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], t) and mine[n].dtype == t.dtype for n, t in theirs.items())
    assert ties(found) == ties(loaded)
    assert found.config.to_dict() == loaded.config.to_dict()
    assert found.config.name_or_path == str(tmp_path)
    assert not found.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_gives_the_same_bits(dtype, tmp_path, spilled):
    model = made(GQA).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    before = digests(tmp_path)
    call = {"budget": Budget(keep={"*mlp*": 0.5}), "queries": {"input_ids": IDS}, "tokenizer": False, "compare": False}
    example = {"input_ids": IDS[:1]}
    opened = open_model(tmp_path)
    was = {n: t.clone() for n, t in opened.state_dict().items()}
    mine = prune(opened, example, **call)
    theirs = prune(hf.LlamaForCausalLM.from_pretrained(tmp_path), example, **call)
    assert mine.plan == theirs.plan
    small = mine.model.state_dict()
    assert small.keys() == theirs.model.state_dict().keys()
    assert all(torch.equal(small[n], t) and small[n].dtype == dtype for n, t in theirs.model.state_dict().items())
    assert all(is_mapped(p) for p in mine.model.parameters())
    assert all(torch.equal(t, was[n]) for n, t in opened.state_dict().items())
    with torch.no_grad():
        for p in mine.model.parameters():
            p.zero_()
    assert all(torch.equal(t, was[n]) for n, t in opened.state_dict().items()), "the result has memory of its own"
    assert digests(tmp_path) == before


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def test_a_file_and_a_factory(tmp_path):
    trained = net()
    save_file({n: t + 1 for n, t in trained.state_dict().items()}, tmp_path / "net.safetensors")
    before = digests(tmp_path)
    model = open_model(tmp_path / "net.safetensors", net)
    assert all(is_mapped(p) for p in model.parameters())
    assert all(torch.equal(t, trained.state_dict()[n] + 1) for n, t in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.zero_()
    assert digests(tmp_path) == before, "the map is private"


def test_recurrent_layers_and_tied_weights(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head, self.table = nn.LSTM(6, 6), nn.Linear(6, 9), nn.Embedding(9, 6)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(self.table(ids))[0])

    trained, ids = Recurrent(), torch.arange(5)[:, None]
    state = {n: t for n, t in trained.state_dict().items() if n != "table.weight"}
    save_file(state, tmp_path / "net.safetensors")
    model = open_model(tmp_path / "net.safetensors", Recurrent)
    assert model.head.weight is model.table.weight
    assert torch.equal(model(ids), trained(ids))


def test_a_factory_that_reads_its_parameters(tmp_path, caplog):
    def reads() -> nn.Module:
        model = net()
        model.scale = float(model[0].weight.detach().abs().sum())
        return model

    save_file(net().state_dict(), tmp_path / "net.safetensors")
    model = open_model(tmp_path / "net.safetensors", reads)
    assert "made whole in memory" in caplog.text
    assert all(torch.equal(t, load_file(tmp_path / "net.safetensors")[n]) for n, t in model.state_dict().items())


def test_random_buffers_that_no_file_holds_are_those_of_the_factory(tmp_path):
    def random() -> nn.Module:
        torch.manual_seed(3)
        model = net()
        model.register_buffer("features", torch.randn(4), persistent=False)
        return model

    save_file(net().state_dict(), tmp_path / "net.safetensors")
    assert torch.equal(open_model(tmp_path / "net.safetensors", random).features, random().features)


# --- what is damaged -----------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def wrong_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def no_json(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"x" + data[9:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_off, wrong_header, no_json, empty, Path.unlink])
def test_a_shard_that_is_damaged_or_gone(damage, tmp_path):
    made(GQA).save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    damage(shard)
    before = digests(tmp_path)
    with pytest.raises(ArtifactError, match=f"cannot read .*{shard.name}"):
        open_model(tmp_path)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda places: places.update({"model.norm.weight": min(places.values())}), "does not hold it"),
        (lambda places: places.update({"model.norm.weight": "absent.safetensors"}), "there is no such file"),
        (lambda places: places.update({"model.norm.weight": "../model.safetensors"}), "does not lie in its folder"),
    ],
    ids=["absent tensor", "absent file", "outside"],
)
def test_an_index_that_is_wrong(change, said, tmp_path):
    made(GQA).save_pretrained(tmp_path, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    change(found["weight_map"])
    index.write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match=said):
        open_model(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{"])
def test_an_index_that_is_none(text, tmp_path):
    made(GQA).save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read as an index"):
        open_model(tmp_path)


def test_a_shape_that_the_configuration_does_not_give(tmp_path):
    made(GQA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 20}))
    before = digests(tmp_path)
    with pytest.raises(InputError, match=r"mlp\.\w+\.weight has shape \(24, 16\), and the model has \(20, 16\)"):
        open_model(tmp_path)
    assert digests(tmp_path) == before


def test_arguments_that_do_not_go_together(tmp_path):
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="Pass a factory"):
        open_model(tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="Leave the factory out"):
        open_model(tmp_path, net)
    with pytest.raises(InputError, match=r"neither a folder nor a \.safetensors"):
        open_model(tmp_path / "net.pt", net)
    with pytest.raises(InputError, match=r"not a torch\.nn\.Module"):
        open_model(tmp_path / "net.safetensors", lambda: 3)  # type: ignore[arg-type, return-value]
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"lacks \['0.weight'.* and has \['other'\] too many"):
        open_model(tmp_path / "other.safetensors", net)


# --- mapped tensors ------------------------------------------------------------------------------------------------


def one(folder: Path, x: torch.Tensor) -> torch.Tensor:
    save_file({"x": x}, folder / "x.safetensors")
    return mapped_file(folder / "x.safetensors")["x"]


def test_what_is_made_of_a_mapped_tensor_is_mapped(tmp_path, spilled):
    x = one(tmp_path, torch.randn(6, 5).bfloat16())
    y = stored_as(x, x.float().T)
    assert is_mapped(y)
    assert y.stride() == (1, 5)
    assert torch.equal(y, x.float().T)
    assert not is_mapped(stored_as(torch.zeros(3), torch.ones(3)))


def test_copies_are_apart_and_hold_what_was_written(tmp_path, spilled):
    x = one(tmp_path, torch.randn(6, 5))
    y = in_file(x.T, keep_open=True)
    for original in (x, y):
        was = original.clone()
        first = copies({"": original})[""]
        assert is_mapped(first)
        first.zero_()
        assert torch.equal(original, was)
        original.fill_(2)  # as an optimiser would: the file does not know of it
        assert torch.equal(copies({"": original})[""], torch.full_like(original, 2))
        write_(original, was)
        assert torch.equal(original, was)
        assert is_mapped(original)


def test_without_room_for_temporary_files(tmp_path, monkeypatch, spilled):
    x = one(tmp_path, torch.randn(6, 5))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mapping, "in_file", full)
    with pytest.raises(ArtifactError, match=r"No space left on device\. Set TMPDIR"):
        stored_as(x, x.clone())


def test_files_are_closed(tmp_path, spilled):
    count = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("needs /proc")
    x = one(tmp_path, torch.randn(6, 5))
    many = [stored_as(x, x + i) for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) > count
    del x, many
    assert len(os.listdir("/proc/self/fd")) == count


def test_a_deep_copy_of_a_mapped_model_is_a_copy(tmp_path):
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    model = open_model(tmp_path / "net.safetensors", net)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
    assert bool(model[0].weight.any())
