"""T20: a residual stream in another basis is the same network, and shrinks along its principal axes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, InputError, ModelError, Plan, apply_plan, load, prune, rotate_residual, save
from coreprune.pruning.calibration.wider import accompanied
from graph.zoo import ZOO, gen, randomise
from small_networks import bits
from zoo_examples import call, example

D, HIDDEN = 24, 40


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(D), nn.Linear(D, HIDDEN, bias=False), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stream(nn.Module):
    """Tokens, places that are added, blocks, a norm and a head."""

    def __init__(self, norm: type[nn.Module], blocks: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, D), nn.Parameter(torch.zeros(1, 7, D))
        self.blocks = nn.Sequential(*(Block(norm) for _ in range(blocks)))
        self.norm, self.head = norm(D), nn.Linear(D, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(ids) + self.places)))


def stream(norm: type[nn.Module]) -> Stream:
    return randomise(Stream(norm), 3)


def ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(30, (n, 7), generator=gen(seed))


def without_scales(d: int) -> nn.LayerNorm:
    return nn.LayerNorm(d, elementwise_affine=False)


@pytest.fixture
def used(monkeypatch):
    """The queries that axes are taken from: those that are given, and those that go with them."""
    seen = []

    def told(*args):
        kinds = accompanied(*args)
        seen.append(sum(kinds[1:], kinds[0]))
        return kinds

    monkeypatch.setattr("coreprune.pruning.rotation.accompanied", told)
    return seen


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, without_scales])
def test_the_function_is_the_same_and_the_axes_are_the_principal_ones(norm, used):
    model, given = stream(norm), ids(64)
    before = bits(model)
    turned = rotate_residual(model, ids(2), queries=given)
    (queries,) = (found.args[0] for found in used)
    assert torch.equal(queries[:64], given)
    assert len(queries) == 64 + 96
    assert bits(model) == before
    with torch.no_grad():
        assert torch.allclose(turned.model(ids(50, 1)), model(ids(50, 1)), atol=1e-10)
    norms = [m for m in turned.model.modules() if isinstance(m, nn.RMSNorm)]
    assert len(norms) == 3
    assert all(m.weight is None or bool((m.weight == 1).all()) for m in norms)
    assert not any(isinstance(m, nn.LayerNorm) for m in turned.model.modules())

    # Recomputed: the outputs of all norms in the given model without scale and shift, and the moments of these.
    seen = []
    for module in model.modules():
        if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            shift, scale = (getattr(module, name, None) for name in ("bias", "weight"))
            shift, scale = 0.0 if shift is None else shift, 1.0 if scale is None else scale
            module.register_forward_hook(lambda m, x, y, a=shift, b=scale: seen.append((y - a) / b))
    with torch.no_grad():
        model(queries)
    rows = torch.cat([x.flatten(0, 1) for x in seen]).double()
    values = torch.linalg.eigvalsh(rows.mT @ rows).flip(0)
    assert torch.allclose(turned.shares["words"], values / values.sum(), atol=1e-10)
    mine = []
    for module in norms:
        module.register_forward_hook(lambda m, x, y: mine.append(y.flatten(0, 1).square().sum(0)))
    with torch.no_grad():
        turned.model(queries)
    power = torch.stack(mine).sum(0)
    assert torch.allclose(power / power.sum(), turned.shares["words"], atol=1e-10)  # channel by channel, falling
    if norm is not nn.RMSNorm:
        assert float(turned.shares["words"][-1]) < 1e-12  # along (1, …, 1), on which nothing lies


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_the_stream_is_that_of_the_given_model_in_an_orthogonal_basis(norm):
    """Against the definition: QᵀQ = 1 with what enters the last norm, whose mean a LayerNorm takes out."""
    model = stream(norm)
    turned = rotate_residual(model, ids(2), queries=ids(64)).model
    kept: list[Tensor] = []
    for m in (model, turned):
        m.norm.register_forward_pre_hook(lambda _, x: kept.append(x[0].flatten(0, 1)))
        with torch.no_grad():
            m(ids(40, 2))
    old, new = kept
    old = old - old.mean(1, keepdim=True) if norm is nn.LayerNorm else old
    assert torch.allclose(old @ old.mT, new @ new.mT, atol=1e-9)


def test_no_projection_of_the_same_rank_leaves_less_than_the_first_axes(used):
    model = stream(nn.RMSNorm)
    shares = rotate_residual(model, ids(2), queries=ids(64)).shares["words"]
    queries = used[0].args[0]
    seen = []
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda m, x, y: seen.append(y / m.weight))
    with torch.no_grad():
        model(queries)
    rows = torch.cat([x.flatten(0, 1) for x in seen])
    for k in (1, 5, 12, 23):
        for seed in range(20):
            start = torch.randn(D, k, generator=gen(seed), dtype=torch.float64)
            for _ in range(seed):  # from anywhere to the principal axes: steps of orthogonal iteration
                start = rows.mT @ (rows @ start) / len(rows)
            basis = torch.linalg.qr(start).Q
            left = float((rows - rows @ basis @ basis.mT).square().sum() / rows.square().sum())
            assert left >= float(shares[k:].sum()) - 1e-12


def test_axes_from_texts_of_one_kind_serve_other_kinds(monkeypatch):
    model, other = stream(nn.RMSNorm), ids(200, 5) % 10 + 20
    with torch.no_grad():
        model.words.weight[:10, D // 2 :] *= 0.01  # words of one kind lie in one half of the stream
        model.words.weight[20:, : D // 2] *= 0.01
    few = ids(20) % 10
    few[0, 3], few[1, 3] = 0, 29  # the vocabulary that they span

    def left(k=D // 2):
        turned = rotate_residual(model, ids(2), queries=few).model
        seen = []
        hooks = [
            m.register_forward_hook(lambda m, x, y: seen.append(y.flatten(0, 1).square().sum(0)))
            for m in turned.modules()
            if isinstance(m, nn.RMSNorm)
        ]
        with torch.no_grad():
            turned(other)
        for hook in hooks:
            hook.remove()
        power = torch.stack(seen).sum(0)
        return float(power[k:].sum() / power.sum())

    together = left()
    monkeypatch.setattr(
        "coreprune.pruning.rotation.accompanied", lambda model, captured, example, samples, *_: [samples]
    )
    assert together < 0.75 * left()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "vit", "timm-style-vit", "whisper", "swin"])
def test_transformers_of_the_zoo(name):
    entry = ZOO[name]
    model = randomise(entry.build())
    turned = rotate_residual(model, example(entry.inputs(1)), n_queries=16)
    for batch in (1, 3):
        wanted, found = (call(m, entry.inputs(batch)) for m in (model, turned.model))
        assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))  # in float32 in some norms


def test_a_rotated_stream_can_leave_where_the_given_one_cannot():
    """The stream lies on a quarter of the directions, and on every channel."""
    model, queries = stream(nn.RMSNorm), ids(256)
    basis = torch.linalg.qr(torch.randn(D, D // 4, generator=gen(5), dtype=torch.float64)).Q
    with torch.no_grad():
        for weight in (model.words.weight, model.places):
            weight.copy_(weight @ basis @ basis.mT)
        for block in model.blocks:
            block.down.weight.copy_(basis @ basis.mT @ block.down.weight)
            block.down.bias.copy_(basis @ basis.mT @ block.down.bias)
    asked: dict[str, Any] = {"queries": queries, "compare": False, "exclude": "*up*"}
    errors = []
    for more in ({"norm_statistics": True}, {"residual": "rotate"}, {"residual": "rotate", "repair": False}):
        result = prune(model, ids(2), Budget(keep=0.25), **asked, **more)
        assert result.model.words.weight.shape == (30, D // 4)
        with torch.no_grad():
            want, got = model(ids(200, 9)), result.model(ids(200, 9))
        errors.append(float((got - want).square().mean() / want.var()))
    assert max(errors[1:]) < 1e-6  # without repair, too: all of the stream lies on the axes that stay
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, without_scales])
def test_the_artifact_is_read_with_the_given_model(norm, tmp_path):
    model = stream(norm)
    before = copy.deepcopy(model)
    result = prune(model, ids(2), Budget(params=0.7), queries=ids(64), exclude="*up*", residual="rotate")
    assert result.report.parameters[1] <= 0.7 * result.report.parameters[0]
    assert result.report.settings.residual == "rotate"
    assert 'residual="rotate"' in result.report.settings.call()
    assert any("principal axes" in note for note in result.report.notes)
    assert not any("tied" in note for note in result.report.notes)
    save(result, tmp_path / "small")
    for dense in (model, lambda: Stream(norm).double()):
        again = load(tmp_path / "small", dense)
        assert torch.equal(again(ids(5)), result.model(ids(5)))
    assert bits(model) == bits(before)


def tied(layers: int, words: int) -> Any:
    """A Llama whose head is its embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=words, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_tied_weights_are_taken_apart_and_stock_transformers_reads_the_result(tmp_path):
    model = tied(1, 50)
    x = {"input_ids": torch.randint(50, (2, 9), generator=gen(0))}
    rest = ("*self_attn*", "*mlp*")
    result = prune(model, x, Budget(keep=0.5), n_queries=32, residual="rotate", exclude=rest, compare=False)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert result.model.config.hidden_size == 16
    result.model.save_pretrained(tmp_path / "stock")
    again = type(model).from_pretrained(tmp_path / "stock").eval()
    assert torch.equal(call(again, x), call(result.model, x))
    save(result, tmp_path / "small")
    assert torch.equal(call(load(tmp_path / "small"), x), call(result.model, x))


def test_a_share_of_the_parameters_is_one_of_the_given_model():
    """Regression: tied weights were counted twice, so that the result could be larger than the model."""
    model = tied(2, 200)
    x = {"input_ids": torch.randint(200, (2, 9), generator=gen(0))}
    for kind in ("params", "bytes"):
        result = prune(model, x, Budget(**{kind: 0.8}), n_queries=32, residual="rotate", compare=False)
        before = sum(p.numel() for p in model.parameters())
        assert sum(p.numel() for p in result.model.parameters()) <= 0.8 * before
        assert result.report.parameters == (before, sum(p.numel() for p in result.model.parameters()))
        assert any(f"{200 * 32:,} parameters more" in note for note in result.report.notes)
        assert 0.7 * result.report.bytes[0] < result.report.bytes[1] <= 0.8 * result.report.bytes[0]


def test_weights_that_are_not_numbers_are_named_and_nothing_changes():
    model = tied(1, 50)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    x = {"input_ids": torch.randint(50, (2, 9), generator=gen(0))}
    with pytest.raises(InputError, match="not finite"):
        prune(model, x, Budget(params=0.8), n_queries=16, residual="rotate")
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in model.state_dict().items())


class Single(Stream):
    """An activation that works on single channels of the stream."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.words(ids))))


class Bare(Stream):
    """A block that reads the stream without a norm."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.head(self.norm(x + self.blocks[0].down(torch.relu(self.blocks[0].up(x)))))


class Behind(nn.Module):
    """Norms behind the sum: their output stays in the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down, self.norm = (
            nn.Embedding(30, D),
            nn.Linear(D, 9),
            nn.Linear(9, D),
            nn.LayerNorm(D),
        )
        self.head = nn.Linear(D, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids))
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


@pytest.mark.parametrize("build", [lambda: Single(nn.RMSNorm), lambda: Bare(nn.RMSNorm), Behind])
def test_what_is_no_rotation_is_refused(build):
    model = randomise(build(), 1)
    before = bits(model)
    with pytest.raises(ModelError, match=r"cannot be (rotated|written in another basis)"):
        prune(model, ids(2), Budget(params=0.7), queries=ids(32), residual="rotate")
    assert bits(model) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"residual": "turn"}, "residual must be None, 'rotate' or a Rotated, not 'turn'"),
        ({"residual": "rotate", "queries": None}, "takes the axes from queries"),
        ({"residual": "rotate", "part": "blocks"}, "does not go with part="),
        ({"residual": "rotate", "inplace": True}, "does not go with inplace="),
        ({"residual": "rotate", "queries": torch.zeros(3, 2)}, "cannot be taken|sample|shape"),
    ],
)
def test_bad_arguments(more, words):
    with pytest.raises(InputError, match=words):
        prune(stream(nn.RMSNorm), ids(2), Budget(params=0.7), **{"queries": ids(32), **more})


class Answer(Stream):
    """Whole numbers alone, which show little of a change."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).argmax(-1)


def test_what_cannot_be_compared_is_refused():
    silent = stream(nn.RMSNorm)
    for p in silent.head.parameters():
        nn.init.zeros_(p)
    for model in (silent, randomise(Answer(nn.RMSNorm), 3)):
        with pytest.raises(ModelError, match="cannot be compared with it"):
            rotate_residual(model, ids(2), queries=ids(32))


def test_a_stream_that_is_not_finite_has_no_axes():
    model = stream(nn.RMSNorm)
    with torch.no_grad():
        model.words.weight[3, 0] = torch.nan
    before = bits(model)
    with pytest.raises(InputError, match="not finite on the queries"):
        prune(model, ids(2), Budget(params=0.7), queries=ids(32), residual="rotate")
    assert bits(model) == before


def test_the_plan_is_refused_for_other_models():
    model = stream(nn.RMSNorm)
    plan = prune(model, ids(2), Budget(params=0.7), queries=ids(32), residual="rotate", compare=False).plan
    assert plan.rotated
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(InputError, match="fits no other model"):
        apply_plan(model, plan, norm_statistics=True)


def test_a_network_without_a_stream_is_refused():
    with pytest.raises(ModelError, match="there is no residual stream to rotate"):
        rotate_residual(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.ones(2, 4))
