"""The equations of einsum, written out: which letter every axis of every operand has."""

from __future__ import annotations

from collections.abc import Sequence


def equation_terms(equation: str, ndims: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The letters of the axes of every operand, and of the result.

    An ellipsis stands for axes that are aligned at the right, as in broadcasting; they get the names "0", "1" … from
    the right. Without "->", the result has the ellipsis and then the letters that occur once, in their order.

    equation: as in torch.einsum. ndims: the number of axes of every operand.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    hidden = [n - len(term.replace("...", "")) for term, n in zip(terms, ndims, strict=True)]
    written = [_letters(term, n) for term, n in zip(terms, hidden, strict=True)]
    most = max((n for term, n in zip(terms, hidden, strict=True) if "..." in term), default=0)
    if not arrow:
        once = sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1)
        output = "..." * (most > 0) + "".join(once)
    return written, _letters(output, most)


def _letters(term: str, hidden: int) -> list[str]:
    before, dots, after = term.partition("...")
    middle = [str(i) for i in reversed(range(hidden))] if dots else []
    return [*before, *middle, *after]


def pairs(equation: str, ndims: Sequence[int], path: Sequence[int] | None = None) -> list[tuple[int, int, str]]:
    """The sum of products of three or more operands as a chain of sums of two.

    path: as torch.einsum has it: the positions of two operands, step by step; the result of a step goes to the end. By
        default from left to right.

    Returns for every step the positions of two operands, and the equation. The operands are taken out of the list, and
    the result goes to its end.
    """
    terms, output = equation_terms(equation, ndims)
    names = {c: c for term in terms for c in term if not c.isdigit()}
    spare = iter(c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in names)
    for c in dict.fromkeys(c for term in terms for c in term if c.isdigit()):
        names[c] = next(spare)
    chosen = [(path[i], path[i + 1]) for i in range(0, len(path), 2)] if path else []
    steps = []
    while len(terms) > 1:
        k = len(steps)
        i, j = sorted(chosen[k]) if chosen else ((0, 1) if k == 0 else (0, len(terms) - 1))
        second, first = terms.pop(j), terms.pop(i)
        needed = {c for term in terms for c in term} | set(output)
        result = [c for c in dict.fromkeys([*first, *second]) if c in needed] if terms else output
        steps.append((i, j, f"{_written(first, names)},{_written(second, names)}->{_written(result, names)}"))
        terms.append(result)
    return steps


def _written(term: Sequence[str], names: dict[str, str]) -> str:
    return "".join(names[c] for c in term)
