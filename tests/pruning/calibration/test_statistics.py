"""What readers see on the queries: against unfolded inputs from hooks, and against autograd on the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune._progress import silent
from coreprune.errors import InputError
from coreprune.graph import Traced, capture, find_groups
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import collect_readers
from coreprune.pruning.calibration.worth import over_windows
from coreprune.pruning.layer.linear_maps import operators
from coreprune.queries import Queries
from features import normal, patches, rows_of, seen
from graph.zoo import ZOO, randomise


class Net(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, stride=2)
        self.act, self.head = nn.ReLU(inplace), nn.Linear(4 * 9, 3)

    def forward(self, x):
        return self.head(self.act(self.b(self.act(self.a(x)))).flatten(1))


def collect(model, x, blocks=1, **options):
    parts = x.tensor_split(blocks)
    captured = capture(model, parts[0], batch=len(parts[0]))
    groups = find_groups(captured)
    options = {"rows": 1 << 30, "window": 1, **options}
    generator = torch.Generator().manual_seed(0)
    calibration = calibrated(captured, x, [((part,), {}) for part in parts])
    return dict(collect_readers(Traced(model, captured, groups), calibration, Collect(**options), generator, silent))


def calibrated(captured, x, batches):
    return Calibration(Queries((x,), {}, "samples", ""), None, captured, operators(captured), batches)


def worth_by_autograd(model, layer, x, blocks=1):
    """Second moment, per sample, of the gradient at a layer's output of the outputs' random projection."""
    first, total = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0))), 0
    for b, part in enumerate(x.tensor_split(blocks)):
        held = []

        def hook(m, a, y, held=held):
            held.append(y)
            return y.clone()  # what follows may be in place

        handle = model.get_submodule(layer).register_forward_hook(hook)
        out = model(part)
        handle.remove()
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(first + b)).to(out)
        scale = out.std(correction=0) * out[0].numel() ** 0.5
        (gradient,) = torch.autograd.grad((out * noise).sum() / scale.detach(), held)
        flat = rows_of(gradient) if gradient.dim() > 2 else gradient
        total = total + flat.T @ flat / len(part) / blocks
    return total


@pytest.mark.parametrize("blocks", [1, 4])
def test_moments_are_those_of_the_unfolded_inputs(blocks):
    model, x = randomise(Net()), normal(12, 3, 6, 6)
    (reader,), (flat,) = (collect(model, x, blocks)[n] for n in ("a", "b"))
    rows = patches(model.b, seen(model, x)["b"][0])
    assert torch.allclose(reader.mean, rows.mean(0))
    assert torch.allclose(reader.covariance, torch.cov(rows.T, correction=0))
    assert torch.equal(reader.weight, model.b.weight.detach().flatten(1))
    inputs = seen(model, x)["head"][0]
    assert torch.allclose(flat.covariance, torch.cov(inputs.T, correction=0))
    assert torch.equal(flat.weight, model.head.weight)
    for found, all_rows in ((reader, rows), (flat, inputs)):
        assert bool(((found.samples[:, None] - all_rows[None]).abs().amax(2) < 1e-12).any(1).all())


@pytest.mark.parametrize("blocks", [1, 3])
def test_large_kernels_use_the_channel_version(blocks):
    model, x = randomise(Net()), normal(12, 3, 6, 6)
    (reader,) = collect(model, x, blocks, features=53)["a"]
    rows = patches(model.b, seen(model, x)["b"][0]).reshape(-1, 6, 9).transpose(1, 2).reshape(-1, 6)
    assert torch.allclose(reader.mean, rows.mean(0))
    assert torch.allclose(reader.covariance, torch.cov(rows.T, correction=0))
    worth = worth_by_autograd(model, "b", x, blocks)
    w = model.b.weight.detach().flatten(2)
    assert torch.allclose(reader.gram, torch.einsum("ocs,op,pds->cd", w, worth, w))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_worth_of_errors_is_that_of_autograd(inplace, blocks):
    """In place: the gradient is that before the activation, and a mean over the blocks, whatever their number."""
    model, x = randomise(Net(inplace)), normal(12, 3, 6, 6)
    found = collect(model, x, blocks)
    for name, layer in (("a", model.b), ("b", model.head)):
        v = layer.weight.detach().flatten(1)
        worth = worth_by_autograd(model, "b" if name == "a" else "head", x, blocks)
        assert torch.allclose(found[name][0].gram, v.T @ worth @ v, rtol=1e-6)
        plain = collect(model, x, blocks, worth=False)[name][0]
        assert torch.allclose(plain.gram, v.T @ v)


def test_the_first_order_error_is_the_measured_one_for_a_linear_reader():
    """Removing everything from a head that is read last: tr(GK) is the share of the variance that is lost."""
    model, x = randomise(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 40))), normal(4000, 5)
    shares = [float((r.gram * r.covariance).sum()) for b in (1, 8) for r in collect(model, x, b)["0"]]
    y = model(x).detach()
    lost = float((y - y.mean(0)).square().mean() / y.var(correction=0))
    assert shares == pytest.approx([lost, lost], rel=0.1)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_windows_are_sums_over_neighbours_over_the_root_of_their_number(dims):
    gradient, half = normal(2, 3, *[6] * dims), 1
    padded = nn.functional.pad(gradient, [half] * 2 * dims)
    for axis in range(2, 2 + dims):
        padded = padded.unfold(axis, 3, 1)
    wanted = padded.flatten(2 + dims).sum(-1) / 3 ** (dims / 2)
    assert torch.allclose(over_windows(gradient, 3), wanted)
    assert torch.equal(over_windows(gradient, 1), gradient)
    assert over_windows(gradient[..., :2], 5).shape == gradient[..., :2].shape


def test_small_volumes_fit_the_window():
    """avg_pool3d refuses inputs below its kernel, so that small 3-d networks could not be measured at all."""
    assert over_windows(normal(1, 2, 2, 2, 2), 5).shape == (1, 2, 2, 2, 2)


def test_units_of_several_channels_own_their_features_side_by_side():
    model = randomise(ZOO["gpt2"].build()) if "gpt2" in ZOO else pytest.skip("transformers is absent")
    inputs = ZOO["gpt2"].inputs(8)
    captured = capture(model, inputs, batch=8)
    groups = [g for g in find_groups(captured) if g.unit > 1 and g.locked_because is None]
    calibration = calibrated(captured, inputs["input_ids"], [((), inputs)])
    found = dict(collect_readers(Traced(model, captured, groups), calibration, Collect(), torch.Generator(), silent))
    read = [(g, r) for g in groups for r in found[g.name]]
    assert read
    for group, reader in read:
        name = next(s.param for c in group.consumers for s in c.slices)
        with torch.no_grad():
            layer, held = model.get_submodule(name.removesuffix(".weight")), []
            handle = layer.register_forward_pre_hook(lambda m, a, held=held: held.append(a[0]))
            model(**inputs)
            handle.remove()
        consumer = next(c for c in group.consumers if c.slices)
        order = torch.argsort(consumer.index)
        rows = held[0].flatten(0, -2)[:, order]
        assert torch.allclose(reader.covariance, torch.cov(rows.T, correction=0))
        assert torch.equal(reader.weight, layer.weight.detach().T[:, order])
        assert reader.mean.numel() == int((consumer.index >= 0).sum())


def test_grouped_convolutions_stack_their_blocks():
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)))
    x = normal(5, 3, 5, 5)
    (reader,) = collect(model, x, worth=False)["0"]
    rows = patches(model[2], seen(model, x)["2"][0])
    blocks = model[2].weight.detach().flatten(1)
    assert torch.equal(reader.weight, torch.block_diag(blocks[:2], blocks[2:]))
    assert torch.allclose(reader.covariance, torch.cov(rows.T, correction=0))


def test_what_is_not_finite_is_named():
    model, x = randomise(Net()), normal(4, 3, 6, 6)
    with torch.no_grad():
        model.a.weight[0] = 1e308
    with pytest.raises(InputError, match=r"b\.weight.*not finite"):
        collect(model, 1e10 * x)


class _AndNothing(nn.Module):
    """Two layers, and an output that has no entries beside theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        y = self.layers(x)
        return y, y[:, :0]


def test_an_output_without_entries_is_left_out_without_a_warning(caplog):
    model = randomise(_AndNothing())
    (reader,) = collect(model, x := normal(9, 6))["layers.0"]
    (alone,) = collect(model.layers, x)["0"]
    assert torch.equal(reader.gram, alone.gram)
    assert "not finite" not in caplog.text
