"""Equations of einsum: written out, and in steps of two operands."""

from __future__ import annotations

import pytest
import torch

from coreprune.graph.equations import equation_terms, pairs

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5}


def test_an_ellipsis_is_written_out() -> None:
    assert equation_terms("...c,dc->...d", [4, 2]) == ([["2", "1", "0", "c"], ["d", "c"]], ["2", "1", "0", "d"])
    assert equation_terms("a...,...->a...", [3, 1]) == ([["a", "1", "0"], ["0"]], ["a", "1", "0"])
    assert equation_terms("ij , jk", [2, 2]) == ([["i", "j"], ["j", "k"]], ["i", "k"])
    assert equation_terms("b...a", [2]) == ([["b", "a"]], ["a", "b"])
    assert equation_terms("ii", [2]) == ([["i", "i"]], [])


@pytest.mark.parametrize(
    ("equation", "path"),
    [
        ("ab,bc,cd->ad", None),
        ("ab,bc,cd->ad", [1, 2, 0, 1]),
        ("ab,bc,cd,d->a", [2, 3, 0, 2, 0, 1]),
        ("abc,ab,c->", None),
        ("...a,ab,b->...b", None),
        ("a...,b...,b->ab...", [0, 1, 0, 1]),
        ("ab,bc,cd", None),
        ("aa,ab,b->a", None),
    ],
)
def test_steps_of_two_give_the_same(equation: str, path: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [[SIZES[c] for c in t.replace("...", "cd")] for t in equation.partition("->")[0].split(",")]
    operands = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    want = torch.einsum(equation, *operands)
    for i, j, step in pairs(equation, [x.dim() for x in operands], path):
        second, first = operands.pop(j), operands.pop(i)
        operands.append(torch.einsum(step, first, second))
    torch.testing.assert_close(operands[0], want)
