"""A mask taken apart is the mask: bounds of rows, comparisons and the rest together, on every pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flex_mods import BATCH, HEADS, MASK_MODS, SIZE
from torch import Tensor

from flashgen.mods import program
from flashgen.mods.conjuncts import Conjunction
from flashgen.mods.graph import Graph, Node
from flashgen.mods.in_torch import READ, source

CPU = torch.device("cpu")


def joined(graph: Graph, parts: Conjunction) -> Node:
    """The mask that the parts say."""
    row, found = graph.input("q_idx"), graph.const(True, "bool")
    if parts.first is not None:
        found = graph.make("and", found, graph.make("ge", row, parts.first))
    if parts.end is not None:
        found = graph.make("and", found, graph.make("lt", row, parts.end))
    for op, x, y in parts.pairs:
        found = graph.make("and", found, graph.make(op, x, y))
    return found if parts.rest is None else graph.make("and", found, parts.rest)


def everywhere(root: Node, made: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    space: dict[str, Any] = {"torch": torch}
    exec(READ + "\n" + source(root, made.captures, "mask"), space)
    sizes = (BATCH, HEADS, SIZE, SIZE)
    places = [
        torch.arange(n, dtype=torch.int32).view([-1 if d == i else 1 for d in range(4)]) for i, n in enumerate(sizes)
    ]
    return torch.as_tensor(space["mask"](*places, *tensors)).expand(sizes)


def apart(mask: Any) -> tuple[Conjunction, Any, tuple[Tensor, ...]]:
    made, tensors = program(None, {"mask_mod": mask}, CPU)
    return made.conjunction, made, tensors


@pytest.mark.parametrize("name", MASK_MODS)
def test_the_parts_are_the_mask(name: str) -> None:
    parts, made, tensors = apart(MASK_MODS[name])
    assert made.mask is not None
    whole = everywhere(made.mask, made, tensors)
    assert torch.equal(everywhere(joined(made.graph, parts), made, tensors), whole)
    for bound in (parts.first, parts.end):
        assert bound is None or bound.depends <= {"kv_idx", "b"}


BOUNDS_ALONE = (
    "causal",
    "causal with an offset",
    "sliding window",
    "prefix",
    "prefix of a function",
    "padding and causal",
    "by batch",
)


@pytest.mark.parametrize("name", BOUNDS_ALONE)
def test_what_is_rows_of_each_key_leaves_nothing_for_a_step(name: str) -> None:
    parts, _, _ = apart(MASK_MODS[name])
    assert not parts.pairs and parts.rest is None


def test_documents_leave_one_comparison() -> None:
    parts, _, _ = apart(MASK_MODS["document and causal"])
    assert [op for op, *_ in parts.pairs] == ["eq"] and parts.rest is None and parts.first is not None


@pytest.mark.parametrize("far", [2**31 - 1, 2**31 - 2, -(2**31), 2**20, 2**20 + 1])
def test_bounds_at_the_end_of_int32(far: int) -> None:
    """Q <= the greatest number is no bound, q > it hides all; distances that a position could overflow stay comparisons."""
    for mask in (
        lambda b, h, q, k: q <= far,
        lambda b, h, q, k: q > far,
        lambda b, h, q, k: q - k <= far,
        lambda b, h, q, k: q - k > -far,
        lambda b, h, q, k: k - q >= far,
        lambda b, h, q, k: q + far <= k,
        lambda b, h, q, k: (k - q).abs() < far,
        lambda b, h, q, k: (q == far) | (k < 3),
    ):
        parts, made, tensors = apart(mask)
        if made.mask is None or made.mask.op == "const":
            continue
        assert torch.equal(everywhere(joined(made.graph, parts), made, tensors), everywhere(made.mask, made, tensors))
