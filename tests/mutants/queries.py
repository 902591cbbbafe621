"""Faults in queries/: where inputs come from."""

from __future__ import annotations

from mutants.mutant import Mutant

MAKE = ("queries/test_make_queries.py",)
SAMPLES = ("queries/test_query_samples.py",)
OBJECT = ("queries/test_queries_object.py",)
INVERSION = ("queries/sources/test_batch_norm_inversion.py",)
SOURCES = ("queries/sources/test_query_sources.py",)
TOKENS = ("queries/sources/test_query_tokens.py",)

MUTANTS = (
    Mutant(
        "batches-of-one-seed",
        "queries/sources/base.py",
        "torch.Generator().manual_seed(seeds[i])",
        "torch.Generator().manual_seed(seeds[0])",
        (*MAKE, *INVERSION),
        "every batch of a source repeats the first",
    ),
    Mutant(
        "the-second-input-is-the-first",
        "queries/make.py",
        "torch.Generator().manual_seed(self.seed + k)",
        "torch.Generator().manual_seed(self.seed)",
        MAKE,
        "two images of one model are the same noise",
    ),
    Mutant(
        "masks-are-drawn",
        "queries/leaves.py",
        "axes.stored(i, leaf).dim() < 2 or any(word in name for word in _KEPT):",
        "axes.stored(i, leaf).dim() < 2:",
        MAKE,
        "noise in the place of a mask",
    ),
    Mutant(
        "sources-for-inputs-of-another-kind",
        "queries/make.py",
        '(source, "") if source is not None and t in own else choose(t)',
        '(source, "") if source is not None else choose(t)',
        MAKE,
        "a source of tokens is asked for the pixels beside them",
    ),
    Mutant(
        "a-cache-of-any-run",
        "queries/cache.py",
        'return tree if about["cache"] == self.key else {}',
        "return tree",
        MAKE,
        "queries that were made for another model or seed are taken up",
    ),
    Mutant(
        "samples-may-be-infinite",
        "queries/check.py",
        "        if bool(bad.any()):\n            raise",
        "        if False:\n            raise",
        SAMPLES,
        "NaN among the samples",
    ),
    Mutant(
        "labels-are-inputs",
        "queries/samples.py",
        "    return len(spec) == 2 and spec[1].ndim == 1 and like.dim() > 1 and len(spec[0]) == len(spec[1])\n",
        "    return False\n",
        SAMPLES,
        "a list of inputs and labels is taken for two batches",
    ),
    Mutant(
        "loaders-are-read-to-their-end",
        "queries/samples.py",
        "        if found >= n:\n            break\n",
        "",
        SAMPLES,
        "a loader without an end hangs",
    ),
    Mutant(
        "splits-overlap",
        "queries/queries.py",
        "return self._chosen(order[:n].sort().values), self._chosen(order[n:].sort().values)",
        "return self._chosen(order[:n].sort().values), self._chosen(order[: len(self) - n].sort().values)",
        OBJECT,
        "what is held back was used",
    ),
    Mutant(
        "shared-tensors-are-cut",
        "queries/queries.py",
        "return isinstance(leaf, Tensor) and leaf.dim() > 0 and i not in self.shared",
        "return isinstance(leaf, Tensor) and leaf.dim() > 0",
        OBJECT,
        "a tensor that all inputs share is cut like a batch",
    ),
    Mutant(
        "inversion-of-means-alone",
        "queries/sources/norm_statistics.py",
        " + ((var + eps).sqrt() / sd - 1).square().mean()\n",
        "\n",
        INVERSION,
        "the deviations of the batch norms are not matched",
    ),
    Mutant(
        "inversion-without-a-range",
        "queries/sources/batch_norm_inversion.py",
        "x.clamp_(*start.range)",
        "x.clamp_(-1e9, 1e9)",
        INVERSION,
        "the optimised inputs leave the range of the training",
    ),
    Mutant(
        "starts-of-one-kind",
        "queries/sources/starting.py",
        "return min(found, key=lambda s: s.off)",
        "return start",
        INVERSION,
        "the inversion starts from dead leaves whatever the network has seen",
    ),
    Mutant(
        "variance-without-gradient",
        "queries/sources/norm_statistics.py",
        "scale = 2 * grads[1] / ctx.count",
        "scale = 0 * grads[1] / ctx.count",
        INVERSION,
        "the gradient of the variance is lost",
    ),
    Mutant(
        "crops-that-wrap-around",
        "queries/sources/starting.py",
        "torch.nn.functional.pad(x, (padding,) * 4)",
        'torch.nn.functional.pad(x, (padding,) * 4, mode="circular")',
        INVERSION,
        "what is cropped comes in on the other side",
    ),
    Mutant(
        "pink-noise-of-another-power",
        "queries/sources/noise.py",
        "torch.fft.rfftn(mixed, dim=axes) * f**-power",
        "torch.fft.rfftn(mixed, dim=axes) * f ** (-power / 2)",
        SOURCES,
        "the spectrum falls half as fast",
    ),
    Mutant(
        "mixtures-in-order",
        "queries/sources/mixture.py",
        "return torch.cat(parts)[torch.randperm(n, generator=generator).to(target.example.device)]",
        "return torch.cat(parts)",
        SOURCES,
        "the inputs of the first source come first",
    ),
    Mutant(
        "padding-is-a-token",
        "queries/sources/tokens.py",
        "        weights[pad] = 0\n",
        "        pass\n",
        TOKENS,
        "the padding token is drawn like any other",
    ),
    Mutant(
        "temperature-upside-down",
        "queries/sources/self_generated.py",
        'step(ids, t).to("cpu", torch.float64) / divisors',
        'step(ids, t).to("cpu", torch.float64) * divisors',
        TOKENS,
        "a low temperature gives more varied text",
    ),
    Mutant(
        "padding-is-read",
        "queries/sources/tokens.py",
        "read = (ids != pad).long()",
        "read = (ids == ids).long()",
        ("queries/sources/test_text.py",),
        "the mask leaves the padding",
    ),
    Mutant(
        "masks-hide-what-moves",
        "queries/sources/tokens.py",
        "before <= _MOVES * last and",
        "before <= 1e-3 * float(here.abs().max()) and",
        TOKENS,
        "a model that reads in both directions and masks a word writes text",
    ),
)
