"""What a model computes at padding changes nothing: not what is pruned, repaired, trained, compared or distilled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coreprune import Budget, Distill, Repair, prune
from coreprune.pruning.calibration.padding import Ends, Padding, ends_of
from coreprune.pruning.distill.channel_maps import fit_readouts
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.reporting.comparison import apart
from coreprune.pruning.reporting.losses import answers
from coreprune.queries import Queries, Target
from coreprune.queries.sources.tokens import is_causal
from small_networks import bits

LAST = Ends(leaf=0, last=0)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up, self.down = nn.Linear(d, 24), nn.Linear(24, d)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Layer(nn.Module):
    """Attention that masks padding, and an MLP. causal: later tokens are masked, too, and there are two heads."""

    def __init__(self, d, causal):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = nn.RMSNorm(d), *(nn.Linear(d, d) for _ in range(4))
        self.after, self.mlp, self.causal = nn.RMSNorm(d), Block(d), causal

    def forward(self, x, mask):
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        allowed = (1.0 - mask[:, None, :].double()) * -1e9
        if not self.causal:
            mixed = ((q @ k.transpose(1, 2)) * 0.5 + allowed).softmax(-1) @ v
            return self.written(x + self.o(mixed))
        allowed = allowed + torch.full((x.shape[1], x.shape[1]), -1e9, dtype=x.dtype).triu(1)
        q, k, v = (z.unflatten(-1, (-1, 4)).transpose(1, 2) for z in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], scale=0.5)
        return self.written(x + self.o(mixed.transpose(1, 2).flatten(2)))

    def written(self, x):
        return x + self.mlp(self.after(x))


class Reader(nn.Module):
    """noise: what is added at padding to the outputs, and, if it is inner, before every layer."""

    def __init__(self, noise=0.0, words=0, causal=False, inner=True, d=8):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layers = nn.Embedding(50, d), nn.ModuleList(Layer(d, causal) for _ in range(2))
        self.norm, self.head, self.noise = nn.RMSNorm(d), nn.Linear(d, words) if words else nn.Identity(), noise
        self.inner = inner
        self.double()

    def forward(self, ids, mask):
        x, there = self.words(ids), self.noise * (mask[..., None] == 0).double()
        for layer in self.layers:
            x = layer(x + there * torch.sin(x * 7) if self.inner else x, mask)
        y = self.head(self.norm(x))
        return y + there * torch.cos(y * 5)


def texts(n=48, length=10, seed=0, left=False):
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(10, 50, (n, length), generator=g), torch.ones(n, length, dtype=torch.int64)
    for i in range(n):
        pads = int(torch.randint(2, 6, (1,), generator=g))
        at = slice(0, pads) if left else slice(length - pads, length)
        ids[i, at], mask[i, at] = 0, 0
    return ids, mask


def pruned(noise, left, words, causal=False, **how):
    ids, mask = texts(left=left)
    model, budget = (
        Reader(noise, words, causal, inner="residual" not in how).eval(),
        how.pop("budget", Budget(params=0.8)),
    )
    return prune(model, (ids[:1], mask[:1]), budget, queries=(ids, mask), seed=0, **how)


def same(a, b, where=""):
    """Two reports but for seconds and memory."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "memory"}:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-12), where
    else:
        assert a == b, where


ALONE = Repair(descent=False)


@pytest.mark.parametrize(
    ("words", "causal", "left", "how"),
    [
        (0, False, False, {"repair": ALONE, "compare": False}),
        (50, True, True, {"repair": ALONE, "compare": False}),
        (0, False, True, {"repair": ALONE}),
        (50, False, False, {"repair": ALONE, "compare": False}),
        (50, True, False, {"repair": ALONE}),
        (0, False, False, {"repair": Repair(descent=True), "compare": False}),
        (50, True, False, {"repair": ALONE, "distill": Distill(steps=8)}),
        (50, False, False, {"residual": "rotate", "compare": False, "repair": ALONE}),
        (50, False, True, {"depth": True, "compare": False, "repair": ALONE}),
        (0, False, False, {"method": "cone", "compare": False, "repair": ALONE}),
        (50, True, False, {"budget": Budget(error=0.05), "repair": ALONE}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_nothing_that_prune_does_depends_on_it(words, causal, left, how):
    quiet, loud = (pruned(noise, left, words, causal, **how) for noise in (0.0, 3.0))
    same(quiet.report.as_dict(), loud.report.as_dict())
    for name, tensor in loud.model.state_dict().items():
        assert torch.allclose(tensor, quiet.model.state_dict()[name], rtol=1e-6, atol=1e-9), name


def test_the_next_token_is_that_behind_the_words():
    ids, mask = texts(n=40)
    model, small = Reader(0.0, 50, True).eval(), Reader(0.0, 50, True).eval()
    with torch.no_grad():
        small.layers[1].mlp.down.weight.mul_(-1)
    before, after = answers(model, small, Queries((ids, mask), {}, "mine"))
    last = mask.sum(dim=1) - 1
    rows = torch.arange(len(ids))
    assert torch.equal(before, model(ids, mask)[rows, last].argmax(dim=1))
    assert torch.equal(after, small(ids, mask)[rows, last].argmax(dim=1))
    assert not torch.equal(before, model(ids, mask)[:, -1].argmax(dim=1))


def test_a_model_that_reads_in_both_directions_writes_no_text_though_its_example_is_padded():
    ids, mask = texts()
    assert not is_causal(Target(Reader(0.0, 50).eval(), (ids[:1], mask[:1]), {}, 0))
    assert is_causal(Target(Reader(0.0, 50, True).eval(), (ids[:1], mask[:1]), {}, 0))
    assert answers(*[Reader(0.0, 50).eval()] * 2, Queries((ids, mask), {}, "mine")) is None


@pytest.mark.parametrize("words", [0, 50])
def test_distillation_for_itself_does_not_depend_on_it(words):
    ids, mask = texts(seed=1)
    ends = []
    for noise in (0.0, 3.0):
        teacher = Reader(noise, words).eval()
        student = copy.deepcopy(Reader(0.0, words).eval())
        with torch.no_grad():
            student.layers[0].mlp.down.weight.mul_(0.5)
        distill_(student, teacher, Queries((ids, mask), {}, "mine"), Distill(steps=8), seed=0)
        ends.append(student)
    assert bits(ends[0]) == bits(ends[1])
    assert bits(ends[0]) != bits(Reader(0.0, words))


def test_compared_are_the_words_alone():
    ids, mask = texts(n=20)
    queries, model = Queries((ids, mask), {}, "mine"), Reader().eval()
    assert apart(model, Reader(3.0).eval(), queries, ends=LAST).error == 0
    assert apart(model, Reader(3.0).eval(), queries).error > 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[1].mlp.down.weight.mul_(0.9)
        y, z = model(ids, mask), other(ids, mask)
    found = apart(model, other, queries, ends=LAST)
    variance = y[mask.bool()].var(correction=0)
    expected = [(z[i] - y[i])[mask[i].bool()].square().mean() / variance for i in range(len(ids))]
    assert torch.allclose(found.errors, torch.stack(expected))


def test_a_text_of_nothing_but_padding_is_compared_as_it_is():
    ids, mask = texts(n=8)
    ids[3], mask[3] = 0, 0
    mask[3, 0] = 1
    found = apart(Reader().eval(), Reader(3.0).eval(), Queries((ids, mask), {}, "mine"), ends=LAST)
    assert (found.errors > 0).nonzero().flatten().tolist() == [3]


def test_maps_of_narrow_features_are_fitted_to_words():
    ids, mask = texts(n=40)
    teacher, student = Reader().eval(), Reader().eval()
    mlp = student.layers[1].mlp
    mlp.up, mlp.down = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()
    loud = Reader(3.0).eval()
    batches = [((ids, mask), {})]
    (plain,), (other,), (blind,) = (
        fit_readouts(student, t, ["layers.1.mlp.up"], batches, *at)
        for t, at in ((teacher, [LAST]), (loud, [LAST]), (loud, []))
    )
    assert torch.allclose(plain.weight, other.weight)
    assert not torch.allclose(plain.weight, blind.weight)


class Spans(Reader):
    """A number for every token, such as the scores of where an answer starts, or as many for a whole text."""

    def __init__(self, whole, length=10):
        super().__init__(3.0)
        self.last, self.whole = nn.Linear(8, length if whole else 1).double(), whole

    def forward(self, ids, mask):
        y = super().forward(ids, mask)
        return self.last(y[:, 0]) if self.whole else self.last(y)[..., 0]


@pytest.mark.parametrize("whole", [False, True])
def test_outputs_with_as_many_classes_as_tokens_are_told_from_one_number_a_token(whole):
    ids, mask = texts()
    model = Spans(whole).eval()
    found = ends_of(lambda batch: [model(*batch[0]).detach()], 0, [((ids, mask), {})])
    assert (found.last, found.first, found.flat) == (0, None, not whole)
    y = model(ids, mask)
    assert found.of(((ids, mask), {})).without(y).shape == (y.shape if whole else (int(mask.sum()),))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.last.weight.mul_(0.9)
    wanted = (other(ids, mask) - y).square()
    wanted = wanted.mean(dim=1) if whole else (wanted * mask).sum(dim=1) / mask.sum(dim=1)
    kept = y if whole else y[mask.bool()]
    errors = apart(model, other, Queries((ids, mask), {}, "mine"), ends=found).errors
    assert torch.allclose(errors, wanted / kept.var(correction=0))


def test_without_padding_all_counts():
    y = torch.randn(3, 4, 5)
    assert Padding().without(y) is y
    assert Padding().of_text(y[0], 0) is not None
    tokens = torch.tensor([[False, False, True, True]] * 3)
    assert Padding(tokens).without(torch.randn(7, 4, 5)).shape == (7, 4, 5)
    assert Padding(tokens).without(y).shape == (6, 5)


def stock(kind):
    """Small networks of transformers with weights large enough that every token has its say."""
    import transformers as hf

    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {
        "masked words": lambda: hf.BertForMaskedLM(hf.BertConfig(**small, intermediate_size=32)),
        "where answers start": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**small, intermediate_size=32)),
        "classes": lambda: hf.BertForSequenceClassification(hf.BertConfig(**small, intermediate_size=32)),
        "next words": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small, intermediate_size=32, num_key_value_heads=2)),
    }[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return model.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "left"),
    [("masked words", True), ("where answers start", False), ("classes", False), ("next words", False)],
)
def test_which_token_pads_changes_nothing(kind, left, monkeypatch):
    # What a model writes may end with either of the two.
    monkeypatch.setattr("coreprune.pruning.calibration.wider._without_data", lambda *_: None)
    results = []
    for pad in (0, 3):
        ids, mask = texts(left=left)
        ids[mask == 0] = pad
        example = {"input_ids": ids[:1], "attention_mask": mask[:1]}
        given = {"input_ids": ids, "attention_mask": mask}
        how = {"queries": given, "seed": 0, "repair": ALONE, "tokenizer": False}
        results.append(prune(stock(kind), example, Budget(params=0.9), **how))
    same(*(r.report.as_dict() for r in results))
    for a, b in zip(*(r.model.state_dict().values() for r in results), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)
