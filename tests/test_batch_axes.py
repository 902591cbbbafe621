"""Which axis of the inputs holds the samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune import Budget, InputError, Queries, list_groups, make_plan, make_queries, measure_latency, prune
from coreprune._batch import BatchAxes, usual
from coreprune._batch_trials import batch_axes
from coreprune._example import normalise_example
from coreprune.artifact import export_program
from coreprune.graph import Traced, capture, find_groups, remove
from coreprune.pruning import apply_plan, certify
from graph.oracle import random_halves, zeroed_original
from unusual_layouts import LAYOUTS, Gcn, Pair, TimeFirst, vector_mlp


def found(model: nn.Module, example, said="auto") -> BatchAxes:
    return batch_axes(model.eval(), normalise_example(example), said)


def run(model: nn.Module, example) -> Tensor:
    args, kwargs = normalise_example(example)
    with torch.no_grad():
        return model(*args, **kwargs)


def double(example):
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, example)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_axis_is_found(name):
    layout = LAYOUTS[name]
    assert found(layout.build(), layout.example()).inputs == layout.axes


@pytest.mark.parametrize("name", LAYOUTS)
def test_channels_leave_exactly(name):
    """The pruned model equals the original with the removed channels at zero, and costs what it should."""
    layout = LAYOUTS[name]
    model, example = layout.build().double().eval(), double(layout.example())
    args, kwargs = normalise_example(example)
    captured = capture(model, args, kwargs)
    groups = find_groups(captured)
    keep = random_halves(groups, torch.Generator().manual_seed(0))
    removed = remove(Traced(model, captured, groups), keep)
    assert removed.kept
    wanted = run(zeroed_original(model, groups, removed.kept), example)
    torch.testing.assert_close(run(removed.model, example), wanted, rtol=1e-9, atol=1e-9)
    # Attention and recurrent layers are counted in their own ways.
    layers = [m for m in model.modules() if isinstance(m, (nn.MultiheadAttention, nn.GRU))]
    if not layers:
        one = captured.axes.cut((args, kwargs))
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*one[0], **one[1])
        assert Traced(model, captured, groups).cost_model().macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["graph, edge features", "images", "one image", "vector", "time first, mask", "pair"])
def test_prune_repairs_and_certifies(name):
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    model, example = layout.build().eval(), layout.example()
    result = prune(model, example, Budget(keep=0.5), n_queries=20)
    assert result.queries is not None
    assert len(result.queries) == 20
    assert result.report.refits
    errors = {one.name: one.error for one in result.report.compared}
    assert errors["the repaired cut"] < errors["the cut without repair"]
    assert run(result.model, example).shape == run(model, example).shape
    again = prune(model, example, Budget(keep=0.5), queries=result.queries)
    assert again.report.refits


def test_node_channels_of_a_graph_leave():
    example = (torch.randn(10, 16), torch.randint(0, 10, (2, 30)))
    report = prune(Gcn().eval(), example, Budget(keep=0.5)).report
    assert report.macs[1] == report.macs[0] // 2


def test_layers_that_start_at_zero_hide_nothing():
    """Attention whose output weights are zero leaves time steps apart, so that they looked like samples."""
    model = TimeFirst()
    model.forward = lambda x: model.t(x)  # type: ignore[method-assign]
    nn.init.zeros_(model.t.layers[0].self_attn.out_proj.weight)
    assert found(model, torch.zeros(7, 2, 32)).inputs == (1,)


def test_steps_that_only_hear_earlier_or_later_ones_are_no_samples():
    class Running(nn.Module):
        def __init__(self, back: bool) -> None:
            super().__init__()
            self.a, self.b, self.back = nn.Linear(4, 8), nn.Linear(8, 4), back

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.relu(h.flip(0).cumsum(0).flip(0) if self.back else h.cumsum(0)))

    for back in (True, False):
        assert found(Running(back), torch.zeros(5, 4)).inputs == (None,)
        assert found(Running(back), torch.zeros(5, 3, 4)).inputs == (1,)


class Odd(nn.Module):
    """Outputs of several kinds for a batch along axis 0."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.run = nn.Linear(6, 4), forward

    def forward(self, x: Tensor):
        return self.run(self.a(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda h: (h, h.mean()),  # a loss
        lambda h: (h @ h.T, h),  # similarities of samples
        lambda h: h + torch.randn_like(h),  # a model that draws random numbers
        lambda h: h.flatten(),
        lambda h: {"most": h.argmax(1)},
        lambda h: torch.log(h.sum(1).abs()),
    ],
)
def test_an_ordinary_batch_is_found_whatever_comes_out(forward):
    for count in (1, 2, 5):
        assert found(Odd(forward), torch.zeros(count, 6)).inputs == (0,)


def test_a_mean_of_all_that_was_seen_is_no_reason_to_doubt():
    """A buffer that a forward updates and reads, such as an observer's."""

    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            self.mean.mul_(0.9).add_(0.1 * h.mean(0))
            return h - self.mean

    assert found(Observed(), torch.zeros(3, 6)).inputs == (0,)


def test_a_sum_over_all_that_is_there_makes_no_batch():
    assert found(Odd(lambda h: (h, h.sum(0))), torch.zeros(5, 6)).inputs == (None,)


def test_a_model_of_one_sample_keeps_axis_0():
    assert found(Odd(lambda h: h.reshape(1, 4)), torch.zeros(1, 6)).inputs == (0,)


def test_what_does_not_run_is_left_to_those_who_say_why():
    assert found(vector_mlp(), torch.zeros(3, 5)) == usual(normalise_example(torch.zeros(3, 5)))


def test_the_user_says_it():
    x, v = torch.zeros(5, 2, 6), torch.zeros(2, 8)
    assert found(Pair(), (x, v), {0: 1, 1: 0}) == BatchAxes((1, 0), (0,))
    assert found(Pair(), {"steps": x, "v": v}, {"steps": 1}).inputs == (1, None)
    assert found(Pair(), (x, v), None).whole
    assert found(TimeFirst(), torch.zeros(7, 2, 32), 1) == BatchAxes((1,), (0,))
    assert found(TimeFirst(), torch.zeros(7, 2, 32), -2).inputs == (1,)
    assert found(Pair(), (x, torch.zeros(1, 2)), 1).inputs == (1, 1)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (3, "no input has such an axis; their shapes are"),
        ({"steps": 5}, "axis 5 for input 'steps', whose shape is"),
        ({"other": 0}, "the input 'other', but the inputs are 'steps', 'v'"),
        ({"steps": 0, "v": 0}, "differ in the number of samples along it: 5 in input 'steps', 2 in input 'v'"),
        (True, "pass a number, None"),
        ("first", "pass a number, None"),
        ({"v": "0"}, "pass a number, None"),
        ({}, "pass a number, None"),
    ],
)
def test_what_is_said_wrongly_is_refused_in_words(said, words):
    with pytest.raises(InputError, match="batch_axis") as error:
        list_groups(Pair().eval(), LAYOUTS["pair"].example(), batch_axis=said)
    assert words in str(error.value)


def test_every_function_takes_it():
    model, example = Pair().eval(), LAYOUTS["pair"].example()
    axes = {"steps": 1, "v": 0}
    assert list_groups(model, example, batch_axis=axes).macs == 5 * 6 * 32 + 8 * 32 + 32 * 4
    assert list_groups(model, example, batch_axis=None).macs == 2 * (5 * 6 * 32 + 8 * 32 + 32 * 4)
    plan = make_plan(model, example, Budget(keep=0.5), n_queries=8, batch_axis=axes)
    small = apply_plan(model, plan, example, queries="auto", n_queries=20, batch_axis=axes)
    assert certify(model, small, example, "white-noise", n=20, batch_axis=axes).theorem == "T11"
    asked = prune(model, example, Budget(keep=0.5), n_queries=8, batch_axis=axes).report.settings
    assert 'batch_axis={"steps": 1, "v": 0}' in asked.call()
    assert "batch_axis" not in prune(model, example, Budget(keep=0.5), n_queries=8).report.settings.call()
    rows = measure_latency(model, example, batch_sizes=(1, 3), seconds=0.0, min_repeats=1, batch_axis=axes).rows
    assert [row.batch for row in rows] == [1, 3]


def test_samples_lie_as_in_the_example(tmp_path):
    """Batches are formed along the axis of the samples, and `Queries` keep them along the first."""
    model, x = TimeFirst().eval(), torch.randn(7, 9, 32)
    queries = make_queries(model, torch.zeros(7, 2, 32), x)
    assert len(queries) == 9
    assert torch.equal(queries.args[0], x.movedim(1, 0))
    batches = list(queries.batches(4))
    assert [args[0].shape for args, _ in batches] == [(7, 4, 32), (7, 4, 32), (7, 1, 32)]
    assert torch.equal(torch.cat([args[0] for args, _ in batches], 1), x)
    assert len(make_queries(model, torch.zeros(7, 2, 32), [x[:, :4], x[:, 4:]])) == 9
    queries.save(tmp_path / "q.safetensors")
    again = Queries.load(tmp_path / "q.safetensors")
    assert torch.equal(next(again.batches(9))[0][0], x)
    with pytest.raises(InputError, match="form"):
        again + Queries((x.movedim(1, 0),), {}, "samples")


def test_whole_examples_as_samples():
    layout = LAYOUTS["graph, edge features"]
    model, (x, edges, features) = layout.build().eval(), layout.example()
    graphs = [(x + i, edges.roll(i, 1), features * i) for i in range(5)]
    queries = make_queries(model, (x, edges, features), graphs)
    assert queries.whole
    assert len(queries) == 5
    for (args, _), graph in zip(queries.batches(32), graphs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(args, graph, strict=True))
    stacked = tuple(torch.stack(part) for part in zip(*graphs, strict=True))
    assert len(make_queries(model, (x, edges, features), stacked)) == 5
    images = LAYOUTS["images"]
    pictures = [[torch.full((3, 8, 8), float(i)), torch.zeros(3, 8, 8)] for i in range(4)]
    made = make_queries(images.build().eval(), images.example(), pictures)
    assert [float(args[0][0][0, 0, 0]) for args, _ in made.batches(1)] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="shape"):
        make_queries(model, (x, edges, features), [(x[:4], edges, features)])


def test_edges_of_a_graph_stay_as_they_are():
    layout = LAYOUTS["graph, edge features"]
    example = layout.example()
    queries = make_queries(layout.build().eval(), example, n=6)
    seen = [args for args, _ in queries.batches(1)]
    assert all(torch.equal(args[1], example[1]) for args in seen)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_nodes_of_one_graph_are_no_independent_samples():
    """T11 counts answers for independent samples. Nodes of one graph are none, clouds are."""
    for name, certified in (("graph, dense", False), ("point cloud", True)):
        layout = LAYOUTS[name]
        report = prune(layout.build().eval(), layout.example(), Budget(keep=0.5), n_queries=20).report
        assert (report.agreement is not None) is certified


def test_exports_free_the_axis_of_the_samples(tmp_path):
    layout = LAYOUTS["pair"]
    model, example = layout.build().eval(), layout.example()
    assert export_program(model, example, tmp_path / "pair.pt2").batch == "dynamic"
    program = torch.export.load(tmp_path / "pair.pt2").module()
    steps, v = torch.randn(5, 7, 6), torch.randn(7, 8)
    torch.testing.assert_close(program(steps=steps, v=v), model(steps, v))
    done = export_program(vector_mlp().eval(), torch.zeros(8), tmp_path / "vector.pt2")
    assert (done.batch, done.note) == (1, "The model has no batch axis: the shapes are those of the example.")


def test_distillation_takes_whole_examples():
    layout = LAYOUTS["point cloud"]
    result = prune(layout.build().eval(), layout.example(), Budget(keep=0.5), n_queries=20, distill=4)
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


class Normalised(nn.Module):
    """Every input is compared with all others, so no axis looks like one of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y / y.abs().sum()


def test_samples_along_an_axis_that_was_not_found_are_told_how_to_say_it() -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"No axis of the inputs was found.*batch_axis=0"):
        make_queries(Normalised(), x[:1], x)
    assert len(make_queries(Normalised(), x[:1], x, batch_axis=0)) == 40
