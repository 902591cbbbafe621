"""Removal is physical, atomic, and keeps everything else about a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.errors import InputError, ModelError
from coreprune.graph import Traced, capture, find_groups, probe, remove
from graph.oracle import assert_same, outputs, random_halves, zeroed_original
from graph.zoo import ZOO, gen, randomise


def prepared(name: str):
    entry = ZOO[name]
    model = randomise(entry.build())
    x = entry.inputs(2)["x"]
    captured = capture(model, x)
    groups = find_groups(captured)
    return model, captured, groups, random_halves(groups, gen(0)), x


def state(model: nn.Module) -> dict[str, object]:
    """Everything that must not change: tensors and the numbers of every module."""
    out: dict[str, object] = {k: v.clone() for k, v in model.state_dict().items()}
    for name, m in model.named_modules():
        for key, value in vars(m).items():
            if isinstance(value, (int, float, str, tuple)):
                out[f"{name}/{key}"] = value
    return out


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k]  # type: ignore[arg-type]
        for k, v in a.items()
    )


def test_modules_say_their_new_sizes() -> None:
    model, captured, groups, _, x = prepared("autoencoder")
    small = remove(
        Traced(model, captured, groups), {"enc.0": torch.tensor([0, 2, 5]), "dec.0": torch.tensor([1, 4])}
    ).model
    assert (small.enc[0].out_channels, small.enc[2].in_channels) == (3, 3)
    assert (small.dec[0].out_channels, small.dec[2].in_channels, small.dec[2].groups) == (2, 2, 2)
    assert small(x).shape == x.shape


def test_heads_and_widths_are_scaled() -> None:
    model, captured, groups, _, x = prepared("timm-style-vit")
    heads = next(g for g in groups if "heads" in g.flags)
    keep = heads.units()[[0, 2, 3]].reshape(-1)
    small = remove(Traced(model, captured, groups), {heads.name: keep}).model
    assert small.blocks[0].attn.num_heads == 3
    assert small.blocks[0].attn.qkv.out_features == 3 * 3 * 4
    assert small.blocks[0].attn.proj.in_features == 12
    assert small.blocks[1].attn.num_heads == 4
    assert small(x).shape == (2, 5)


@pytest.mark.parametrize("inplace", [False, True])
def test_removed_memory_is_gone(inplace: bool) -> None:
    model, captured, groups, keep, _ = prepared("vgg")
    small = remove(Traced(model, captured, groups), keep, inplace=inplace).model
    for p in small.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    originals = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert inplace or not originals & {p.untyped_storage().data_ptr() for p in small.parameters()}


def test_in_place_keeps_modules_parameters_and_drops_gradients() -> None:
    model, captured, groups, keep, x = prepared("resnet-bottleneck")
    want = zeroed_original(model, groups, keep)(x)
    model(x).sum().backward()
    modules, params = list(model.modules()), list(model.parameters())
    result = remove(Traced(model, captured, groups), keep, inplace=True)
    assert result.model is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert_same([model(x)], [want])
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, captured, groups, keep, _ = prepared("resnet-bottleneck")
    before = state(model)
    for broken in ("smaller._follow_weights", "smaller.cut", "check.compare"):

        def fail(*_: object, **__: object) -> None:
            raise ModelError("broken on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(f"coreprune.graph.{broken}", fail)
            with pytest.raises(ModelError, match="on purpose"):
                remove(Traced(model, captured, groups), keep, inplace=True)
        assert same(before, state(model))


def test_a_failure_half_way_through_in_place_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, captured, groups, keep, x = prepared("resnet-bottleneck")
    model(x).sum().backward()
    before = state(model)
    grads = [p.grad for p in model.parameters()]
    from coreprune.graph import surgery

    whole, calls = surgery._resize, []

    def fail_at_the_seventh(old: Tensor, new: Tensor) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("no more memory")
        whole(old, new)

    monkeypatch.setattr(surgery, "_resize", fail_at_the_seventh)
    with pytest.raises(RuntimeError, match="no more memory"):
        remove(Traced(model, captured, groups), keep, inplace=True)
    assert same(before, state(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_groups_that_break_are_put_back_and_named() -> None:
    model, captured, groups, keep, x = prepared("literal-sizes")
    before = state(model)
    result = remove(Traced(model, captured, groups), keep)
    assert set(result.kept) == {"a"}
    assert "does not run" in result.locked["b"]
    assert "c" in result.locked
    assert same(before, state(model))
    assert_same([result.model(x)], [zeroed_original(model, groups, result.kept)(x)])


def test_a_boundary_that_moves_silently_is_caught() -> None:
    """y[:, :4] and y[:, 4:8] keep their shapes after a pair has left, but then they are other channels."""

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return (y[:, :4] * y[:, 4:8]).sum(-1)

    model = randomise(Silent())
    x = torch.randn(2, 4, dtype=torch.float64, generator=gen(0))
    captured = capture(model, x)
    groups = find_groups(captured)
    (group,) = [g for g in groups if g.locked_because is None]
    keep = {group.name: torch.tensor([1, 2, 3])}
    traced = Traced(model, captured, groups)
    unchecked = remove(traced, keep, check=False).model
    pairs = model.a(x)[:, 1:4] * model.a(x)[:, 5:8]
    assert unchecked(x).shape == model(x).shape  # nothing but the numbers gives it away
    assert (unchecked(x) - pairs.sum(-1)).abs().min() > 0.1
    result = remove(traced, keep)
    assert "differs from the original" in result.locked[group.name]
    assert torch.equal(result.model(x), model(x))


def test_one_fault_among_many_groups_takes_few_runs() -> None:
    class Deep(nn.Module):
        def __init__(self, n: int = 32) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(n))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = torch.tanh(layer(x))
                if i == 20:
                    x = x.view(-1, 8)
            return x

    model = randomise(Deep())
    captured = capture(model, torch.randn(2, 8, dtype=torch.float64, generator=gen(0)))
    groups = find_groups(captured)
    result = remove(Traced(model, captured, groups), random_halves(groups, gen(0)))
    assert list(result.locked) == ["layers.20"]
    assert result.runs <= 2 * 5 + 4


def test_probe_locks_before_the_budget_is_spent() -> None:
    model, captured, groups, _, _ = prepared("literal-sizes")
    locked = {g.name: g.locked_because for g in probe(Traced(model, captured, groups)).groups}
    assert locked["a"] is None
    assert locked["b"]
    assert locked["c"]


def test_hooks_dtype_flags_and_mode_survive() -> None:
    model = ZOO["mlp"].build().to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model.train()
    calls: list[int] = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    captured = capture(model, torch.randn(2, 6, generator=gen(0)).bfloat16())
    groups = find_groups(captured)
    calls.clear()
    small = remove(Traced(model, captured, groups), random_halves(groups, gen(0))).model
    calls.clear()
    small(torch.randn(2, 6).bfloat16())
    assert calls == [1]
    assert all(p.dtype is torch.bfloat16 for p in small.parameters())
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert small.training
    assert model.training


@pytest.mark.parametrize("inplace", [False, True])
def test_ties_survive(inplace: bool) -> None:
    model, captured, groups, keep, x = prepared("shared-and-tied")
    want = zeroed_original(model, groups, keep)(x)
    small = remove(Traced(model, captured, groups), keep, inplace=inplace).model
    assert small.left.weight is small.right.weight
    assert small.left.weight.shape[0] == 4
    assert_same([small(x)], [want])


def test_illegal_choices_are_refused_with_the_reason() -> None:
    model, captured, groups, _, _ = prepared("timm-style-vit")
    heads = next(g for g in groups if "heads" in g.flags)
    locked = next(g for g in groups if g.locked_because)
    for name, keep, text in (
        ("nowhere", torch.tensor([0]), "no group is called"),
        (heads.name, torch.tensor([0]), "whole units"),
        (heads.name, torch.tensor([], dtype=torch.int64), "at least one"),
        (heads.name, torch.tensor([3, 1]), "sorted"),
        (heads.name, torch.tensor([0.0]), "int64"),
        (heads.name, torch.tensor([0, 10**6]), "within"),
        (locked.name, torch.tensor([0]), "locked"),
    ):
        with pytest.raises(InputError, match=text):
            remove(Traced(model, captured, groups), {name: keep})


def test_sections_keep_the_same_number() -> None:
    model, captured, groups, _, _ = prepared("resnext")
    group = next(g for g in groups if g.sections is not None)
    assert int(group.sections.max()) + 1 == 4
    first = group.units()[group.sections == 0].reshape(-1)
    rest = group.units()[group.sections > 0].reshape(-1)
    with pytest.raises(InputError, match="each of 4 sections"):
        remove(Traced(model, captured, groups), {group.name: torch.cat([first[:1], rest]).sort().values})


def test_another_model_is_refused() -> None:
    model, captured, groups, keep, _ = prepared("mlp")
    other = nn.Sequential(nn.Linear(6, 17), *list(model)[1:])
    with pytest.raises(ModelError, match="capture it again"):
        remove(Traced(other, captured, groups), keep)


def test_new_weights_of_the_same_shape_are_used() -> None:
    model, captured, groups, keep, x = prepared("mlp")
    trained = randomise(copy.deepcopy(model), seed=9)
    small = remove(Traced(trained, captured, groups), keep).model
    assert_same([small(x)], [zeroed_original(trained, groups, keep)(x)])


@pytest.mark.slow
def test_pruning_twice() -> None:
    """Narrow, capture again, narrow again: the second round sees a model like any other."""
    for name in ("cifar-resnet56-a", "shufflenet-v2", "timm-style-vit"):
        model, captured, groups, keep, x = prepared(name)
        small = remove(Traced(model, captured, groups), keep).model
        captured = capture(small, x)
        groups = find_groups(captured)
        keep = random_halves(groups, gen(2))
        result = remove(Traced(small, captured, groups), keep)
        assert result.kept
        assert not result.locked
        assert_same(outputs(result.model, {"x": x}), outputs(zeroed_original(small, groups, keep), {"x": x}))


# --- norms with statistics over channels ----------------------------------------------------------------------------
def test_norm_statistics_are_locked_unless_asked_for() -> None:
    _, captured, groups, _, _ = prepared("rms-norm-by-hand")
    group = next(g for g in groups if g.name == "inp")
    assert "statistics of a norm" in group.locked_because
    free = next(g for g in find_groups(captured, norm_statistics=True) if g.name == "inp")
    assert free.locked_because is None
    assert "norm-statistics" in free.flags


def test_flagged_rms_norm_means_the_mean_over_what_is_left() -> None:
    model, captured, _, _, x = prepared("rms-norm-by-hand")
    groups = find_groups(captured, norm_statistics=True)
    keep = {"inp": torch.tensor([0, 3, 4, 9, 15])}
    small = remove(Traced(model, captured, groups), keep).model
    h = model.inp(x)[:, keep["inp"]]
    h = model.norm.weight[keep["inp"]] * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    want = model.out(F.relu(F.linear(h, model.mid.weight[:, keep["inp"]], model.mid.bias)))
    assert_same([small(x)], [want])


def test_a_residual_stream_with_layer_norm_can_be_narrowed_on_request() -> None:
    entry = ZOO["mlp-mixer"]
    model = randomise(entry.build())
    captured = capture(model, entry.inputs(2)["x"])
    groups = find_groups(captured, norm_statistics=True)
    stream = next(g for g in groups if g.name == "stem")
    small = remove(Traced(model, captured, groups), {"stem": torch.arange(12)}).model
    assert "norm-statistics" in stream.flags
    assert small.norm.normalized_shape == (12,)
    assert small(entry.inputs(3)["x"]).shape == (3, 5)


# --- channels that are read without a weight --------------------------------------------------------------------------
class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Linear(5, 12), nn.Linear(4, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (torch.tanh(self.u(x)) * torch.tanh(self.v(y))).sum(-1)


def test_a_dot_product_of_activations_reads_channels() -> None:
    model = randomise(TwoTowers())
    x, y = (torch.randn(3, n, dtype=torch.float64, generator=gen(n)) for n in (5, 4))
    captured = capture(model, (x, y))
    (group,) = find_groups(captured)
    assert "functional" in group.flags
    keep = torch.tensor([0, 5, 6, 11])
    result = remove(Traced(model, captured, [group]), {group.name: keep})
    assert not result.locked
    mask = torch.zeros(12, dtype=torch.float64)
    mask[keep] = 1
    want = (torch.tanh(model.u(x)) * torch.tanh(model.v(y)) * mask).sum(-1)
    assert_same([result.model(x, y)], [want])


def test_a_mean_over_channels_is_not_a_sum() -> None:
    class Mean(TwoTowers):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.u(x) * self.v(y)).mean(-1)

    model = Mean()
    (group,) = find_groups(capture(model, (torch.zeros(2, 5), torch.zeros(2, 4))))
    assert "mean over channels" in group.locked_because


def test_an_unknown_operation_locks() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.fft.fft(self.a(x)).real)

    groups = find_groups(capture(Fourier(), torch.zeros(2, 4)))
    assert "fft" in next(g for g in groups if g.name == "a").locked_because


@pytest.mark.slow
def test_experts_that_are_multiplied_group_by_group() -> None:
    """The default of transformers sorts tokens by expert; it only exists in single precision."""
    if "mixtral" not in ZOO:
        pytest.skip("transformers is not installed")
    model = ZOO["mixtral"].build().float().eval()
    model.set_experts_implementation("grouped_mm")
    inputs = ZOO["mixtral"].inputs(3)
    captured = capture(model, kwargs=inputs)
    groups = find_groups(captured)
    result = remove(Traced(model, captured, groups), random_halves(groups, gen(0)))
    assert sum(n.endswith("experts") for n in result.kept) == 2
    with torch.no_grad():
        want = outputs(zeroed_original(model, groups, result.kept), inputs)
        assert_same(outputs(result.model, inputs), want, 1e-4)


def test_experts_choose_their_own_channels() -> None:
    if "mixtral" not in ZOO:
        pytest.skip("transformers is not installed")
    model = randomise(ZOO["mixtral"].build())
    captured = capture(model, kwargs=ZOO["mixtral"].inputs(2))
    group = next(g for g in find_groups(captured) if g.name.endswith("experts"))
    assert group.size == 4 * 24
    assert group.sections.bincount().tolist() == [24] * 4
    assert {s.index.shape for s in group.slices} == {(4, 48), (4, 24)}


@pytest.mark.parametrize("dims", [2, 3])
def test_the_layout_in_memory_is_kept(dims: int) -> None:
    layer = (nn.Conv2d, nn.Conv3d)[dims - 2]
    layout = (torch.channels_last, torch.channels_last_3d)[dims - 2]
    model = nn.Sequential(layer(3, 8, 3), nn.ReLU(), layer(8, 6, 3)).to(memory_format=layout).eval()
    x = torch.randn(1, 3, *[7] * dims, generator=gen(0))
    captured = capture(model, x)
    small = remove(Traced(model, captured, find_groups(captured)), {"0": torch.tensor([0, 2, 5])}).model
    assert small[0].weight.is_contiguous(memory_format=layout)
    assert small[2].weight.is_contiguous(memory_format=layout)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    small = remove(Traced(plain, captured, find_groups(captured)), {"0": torch.tensor([0, 2, 5])}).model
    assert small[2].weight.is_contiguous()
