"""Block classes against elementwise evaluation: never wrong on random masks, and exact for the families that are promised."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mods_running import CPU

from flashgen import mods
from flashgen.mods import classes, semantics
from flashgen.mods.graph import Graph, Node

Array = Any
DOCUMENT = torch.tensor(
    [0] * 3 + [1] * 40 + [2] + [4] * 55 + [5] * 2 + [9] * 99, dtype=torch.int32
)  # 200 tokens, sorted
FALLING = 190 - torch.arange(200, dtype=torch.int32) * 3 // 4
LENGTHS = torch.tensor([120, 33], dtype=torch.int32)


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def window(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (q - k <= 20)


def two_sided(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k).abs() <= 20


def prefix(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (k < 37) | (q >= k)


def chunked(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q // 48 == k // 48


def document(b: Any, h: Any, q: Any, k: Any) -> Any:
    return DOCUMENT[q] == DOCUMENT[k]


def dilated(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (q - k <= 60) & ((q - k) % 4 == 0)


def all_of(*parts: Callable[..., Any]) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = parts[0](b, h, q, k)
        for part in parts[1:]:
            found = found & part(b, h, q, k)
        return found

    return mask


def any_of(*parts: Callable[..., Any]) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = parts[0](b, h, q, k)
        for part in parts[1:]:
            found = found | part(b, h, q, k)
        return found

    return mask


EXACT: dict[str, Callable[..., Any]] = {
    "causal": causal,
    "strictly causal": lambda b, h, q, k: q > k,
    "aligned at the end": lambda b, h, q, k: k <= q + 50,
    "window": window,
    "two-sided window": two_sided,
    "prefix": prefix,
    "chunked": chunked,
    "chunked and causal": all_of(chunked, causal),
    "the chunk and the one before": lambda b, h, q, k: (q // 48 - k // 48 <= 1) & (q >= k),
    "local and global": any_of(two_sided, lambda b, h, q, k: k < 10, lambda b, h, q, k: q < 10),
    "sink and window": lambda b, h, q, k: (q >= k) & ((q - k <= 20) | (k < 4)),
    "document": document,
    "document and causal": all_of(document, causal),
    "document and window": all_of(document, two_sided),
    "document and prefix": all_of(document, prefix),
    "document and first keys": all_of(document, lambda b, h, q, k: k < 37),
    "document or window": any_of(document, two_sided),
    "document or first keys": any_of(document, lambda b, h, q, k: k < 37),
    "other documents": lambda b, h, q, k: ~(DOCUMENT[q] == DOCUMENT[k]),
    "later documents": lambda b, h, q, k: DOCUMENT[q] >= DOCUMENT[k],
    "dilated": dilated,
    "dilated without end": lambda b, h, q, k: (q - k) % 3 == 0,
    "dilated or window": any_of(dilated, lambda b, h, q, k: (q - k).abs() < 3),
    "length of keys": lambda b, h, q, k: k < LENGTHS[b],
    "length and causal": lambda b, h, q, k: (k < LENGTHS[b]) & (q >= k) & (q < LENGTHS[b]),
    "window by head": lambda b, h, q, k: (q >= k) & (q - k < 10 * (h + 1)),
    "global tokens": lambda b, h, q, k: (k % 50 == 0) | (q - k).abs().lt(8),
    "everything": lambda b, h, q, k: q >= 0,
    "nothing": lambda b, h, q, k: q < 0,
    "exclusive or": lambda b, h, q, k: (q >= k) ^ (k < 30),
    "a choice": lambda b, h, q, k: torch.where(h == 0, q >= k, (q - k).abs() < 9),
    "fractions": lambda b, h, q, k: k.float() <= q * 0.5,
    "fewer keys for later queries": lambda b, h, q, k: k < FALLING[q],
    "fewer queries for later keys": lambda b, h, q, k: (FALLING[k] > q) & (q >= k),
    "chunks beside a diagonal": lambda b, h, q, k: (q - 25 >= k) | (q // 40 == k // 40),
}  # fmt: skip
# (queries, keys, block_m, block_n): square; wide and tall tiles; ragged ends on both sides; fewer keys than queries.
SHAPES = [(200, 200, 16, 16), (200, 200, 32, 16), (130, 200, 16, 64), (200, 150, 64, 32)]


def elementwise(mask: Node, tables: list[Array], rows: int, columns: int, b: int = 0, h: int = 0) -> Array:
    index = {"q_idx": np.arange(rows, dtype=np.int32)[:, None], "kv_idx": np.arange(columns, dtype=np.int32)[None]}
    index |= {"b": np.int32(b), "h": np.int32(h)}
    return np.broadcast_to(semantics.evaluate(mask, index, tables), (rows, columns))


def tiles(pairs: Array, block_m: int, block_n: int) -> Array:
    """0, 1 or 2 for none, some or all of each tile; a tile that reaches beyond the keys is never all."""
    rows, columns = pairs.shape
    found = np.zeros((-(-rows // block_m), -(-columns // block_n)), int)
    for i, j in np.ndindex(*found.shape):
        tile = pairs[i * block_m : (i + 1) * block_m, j * block_n : (j + 1) * block_n]
        found[i, j] = 2 if tile.all() and (j + 1) * block_n <= columns else int(tile.any())
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_the_families_are_exact(name: str, shape: tuple[int, int, int, int]) -> None:
    rows, columns, block_m, block_n = shape
    program, tensors = mods.program(None, {"mask_mod": EXACT[name]}, CPU)
    assert program.mask is not None
    tables = mods.arrays_of(tensors)
    ranges = mods.key_ranges(
        program.mask, tables, batch=2, num_heads=2, seqlen_q=rows, seqlen_k=columns, block_m=block_m, block_n=block_n
    )
    found = ranges.classes(-(-columns // block_n))
    for b, h in np.ndindex(*found.shape[:2]):
        expected = tiles(elementwise(program.mask, tables, rows, columns, b, h), block_m, block_n)
        np.testing.assert_array_equal(found[b, h], expected)


@pytest.mark.parametrize(
    "name", ["causal", "document and window", "local and global", "length and causal", "fractions"]
)
def test_the_queries_of_keys_are_the_transpose(name: str) -> None:
    program, tensors = mods.program(None, {"mask_mod": EXACT[name]}, CPU)
    assert program.mask is not None
    tables = mods.arrays_of(tensors)
    found = mods.query_ranges(
        program.mask, tables, batch=2, num_heads=2, seqlen_q=150, seqlen_k=200, block_m=32, block_n=16
    ).classes(5)
    for b, h in np.ndindex(*found.shape[:2]):
        expected = tiles(elementwise(program.mask, tables, 150, 200, b, h).T, 16, 32)
        np.testing.assert_array_equal(found[b, h], expected)


def test_elementwise_evaluation_is_pytorchs() -> None:
    """The yardstick of this file, itself measured."""
    index = torch.arange(200, dtype=torch.int32)
    for name, function in EXACT.items():
        program, tensors = mods.program(None, {"mask_mod": function}, CPU)
        assert program.mask is not None
        found = elementwise(program.mask, mods.arrays_of(tensors), 200, 200, 1, 1)
        one = torch.tensor([[1]], dtype=torch.int32)
        expected = function(one, one, index[:, None], index[None]).expand(200, 200)
        np.testing.assert_array_equal(found, expected.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "contiguous"), [("causal", True), ("document and causal", True), ("local and global", False)]
)
def test_ranges_are_loop_bounds_where_they_can_be(name: str, contiguous: bool) -> None:
    program, tensors = mods.program(None, {"mask_mod": EXACT[name]}, CPU)
    assert program.mask is not None
    found = mods.key_ranges(
        program.mask,
        mods.arrays_of(tensors),
        batch=1,
        num_heads=1,
        seqlen_q=192,
        seqlen_k=192,
        block_m=32,
        block_n=16,
    )
    assert found.is_contiguous is contiguous
    if name == "causal":
        assert found.first[0, 0].tolist() == [0] * 6
        assert found.full_first[0, 0].tolist() == [2, 0, 0, 0, 0, 0], "without full tiles both stand at the end"
        assert found.full_last[0, 0].tolist() == [2, 2, 4, 6, 8, 10]
        assert found.last[0, 0].tolist() == [2, 4, 6, 8, 10, 12]


def test_a_document_mask_of_128k_tokens_is_prepared_in_20_ms_and_a_megabyte() -> None:
    size = 1 << 17
    ids = torch.arange(size, dtype=torch.int32) // 777
    program, tensors = mods.program(None, {"mask_mod": lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k)}, CPU)
    assert program.mask is not None

    def prepare() -> Any:
        return mods.key_ranges(
            program.mask,
            mods.arrays_of(tensors),
            batch=1,
            num_heads=1,
            seqlen_q=size,
            seqlen_k=size,
            block_m=128,
            block_n=128,
        )

    took = []
    for _ in range(5):
        start = time.thread_time()  # of the CPU: others may use the machine
        found = prepare()
        took.append(time.thread_time() - start)
    tracemalloc.start()
    prepare()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1 << 20, f"{peak} bytes"
    assert found.nbytes <= 1 << 17
    assert min(took) <= 0.020, f"{took} s of CPU time"
    # Right, too: row 100 holds queries 12800 to 12927, of documents 16 (from 12432) alone.
    assert (found.first[0, 0, 100], found.last[0, 0, 100]) == (97, 101)
    assert (found.full_first[0, 0, 100], found.full_last[0, 0, 100]) == (98, 100)


# -- random masks: sound --

TABLES = [np.array([3, 1, 4, 1, 5, 9, 2, 6] * 6, np.int32), np.sort(np.array([3, 1, 4, 1, 5, 9, 2, 6] * 6, np.int32))]
SIZE = 48


@st.composite
def integers(draw: Any, graph: Graph, depth: int) -> Node:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        kind = draw(st.integers(0, 4))
        if kind < 3:
            return graph.input(draw(st.sampled_from(["q_idx", "kv_idx", "q_idx", "kv_idx", "h"])))
        if kind == 3:
            return graph.const(draw(st.integers(-60, 60) | st.sampled_from([2**31 - 1, -(2**31), 2**30])), "int32")
        return graph.load(draw(st.integers(0, 1)), [graph.input(draw(st.sampled_from(["q_idx", "kv_idx"])))], "int32")
    op = draw(
        st.sampled_from(
            ["add", "sub", "sub", "mul", "floordiv", "mod", "min", "max", "abs", "neg", "and", "xor", "where", "shr"]
        )
    )
    x = draw(integers(graph, depth - 1))
    if op in ("abs", "neg"):
        return graph.make(op, x)
    if op in ("floordiv", "mod"):
        return graph.make(op, x, graph.const(draw(st.sampled_from([1, 2, 3, 8, 16, 50, -3])), "int32"))
    if op == "shr":
        return graph.make(op, x, graph.const(draw(st.integers(0, 5)), "int32"))
    y = draw(integers(graph, depth - 1))
    if op == "where":
        return graph.make("where", draw(conditions(graph, depth - 1)), x, y)
    return graph.make(op, x, y)


@st.composite
def conditions(draw: Any, graph: Graph, depth: int) -> Node:
    if depth > 0 and draw(st.integers(0, 2)) > 0:
        op = draw(st.sampled_from(["and", "or", "and", "or", "not", "xor", "eq", "where"]))
        x = draw(conditions(graph, depth - 1))
        if op == "not":
            return graph.make("not", x)
        y = draw(conditions(graph, depth - 1))
        if op == "where":
            return graph.make("where", draw(conditions(graph, depth - 1)), x, y)
        return graph.make(op, x, y)
    op = draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
    x, y = draw(integers(graph, 2)), draw(integers(graph, 2))
    if draw(st.booleans()):
        x, y = (graph.cast(one, "float32") for one in (x, y))
        x = graph.make("mul", x, graph.const(draw(st.sampled_from([0.5, 1.0, -1.5])), "float32"))
    return graph.make(op, x, y)


@st.composite
def masks(draw: Any) -> Node:
    return draw(conditions(Graph(), draw(st.integers(0, 3))))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(mask=masks(), rows=st.integers(1, SIZE), columns=st.integers(1, SIZE), block_m=st.sampled_from([4, 8, 16]))
def test_no_class_is_ever_wrong(mask: Node, rows: int, columns: int, block_m: int) -> None:
    block_n = 8
    sizes = {"batch": 1, "num_heads": 2, "seqlen_q": rows, "seqlen_k": columns, "block_m": block_m, "block_n": block_n}
    of_queries = mods.key_ranges(mask, TABLES, **sizes).classes(-(-columns // block_n))
    of_keys = mods.query_ranges(mask, TABLES, **sizes).classes(-(-rows // block_m))
    for h in range(2):
        pairs = elementwise(mask, TABLES, rows, columns, 0, h)
        for ranges, expected in (
            (of_queries, tiles(pairs, block_m, block_n)),
            (of_keys, tiles(pairs.T, block_n, block_m)),
        ):
            found = ranges[0, min(h, ranges.shape[1] - 1)]
            assert not ((found == 0) & (expected > 0)).any(), "a visible tile is skipped"
            assert not ((found == 2) & (expected < 2)).any(), "a tile with hidden pairs is taken for full"
    if "h" in mask.depends:
        return
    expected = tiles(elementwise(mask, TABLES, rows, columns), block_m, block_n)
    one = classes.classifier(mask, TABLES, seqlen_q=rows, seqlen_k=columns)
    i, j = np.meshgrid(np.arange(-(-rows // block_m)), np.arange(-(-columns // block_n)), indexing="ij")
    q1, k1 = np.minimum(i * block_m + block_m, rows) - 1, np.minimum(j * block_n + block_n, columns) - 1
    kinds = one.classify(i * block_m, q1, j * block_n, k1)
    assert not ((kinds == 0) & (expected > 0)).any()
    padded = np.pad(elementwise(mask, TABLES, rows, columns), ((0, 0), (0, -columns % block_n)), constant_values=True)
    assert not ((kinds == 2) & (tiles(padded, block_m, block_n) < 2)).any()


def _family(name: str, n: int) -> Callable[..., Any]:
    """A member of a promised family, of a size between 1 and 60."""
    found: dict[str, Callable[..., Any]] = {
        "causal": lambda b, h, q, k: q + n - 30 >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k <= n),
        "two-sided window": lambda b, h, q, k: (q - k).abs() < n,
        "prefix": lambda b, h, q, k: (k < 3 * n) | (q >= k),
        "chunked": lambda b, h, q, k: q // n == k // n,
        "chunks and causal": lambda b, h, q, k: (q // n == k // n) & (q >= k),
        "local and global": lambda b, h, q, k: ((q - k).abs() <= n) | (k < n) | (q < n // 2),
        "document": lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k],
        "dilated": lambda b, h, q, k: (q >= k) & (q - k <= 64) & ((q - k) % (1 + n % 8) == 0),
    }
    return found[name]


FAMILIES = (
    "causal", "window", "two-sided window", "prefix", "chunked", "chunks and causal", "local and global", "document", "dilated",
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(FAMILIES), st.integers(1, 60)), min_size=1, max_size=3),
    union=st.booleans(),
    tile=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
)
def test_products_and_unions_of_the_families_are_exact(
    parts: list[tuple[str, int]], union: bool, tile: tuple[int, int]
) -> None:
    function = (any_of if union else all_of)(*(_family(*part) for part in parts))
    program, tensors = mods.program(None, {"mask_mod": function}, CPU)
    assert program.mask is not None
    tables = mods.arrays_of(tensors)
    ranges = mods.key_ranges(
        program.mask, tables, batch=1, num_heads=1, seqlen_q=200, seqlen_k=200, block_m=tile[0], block_n=tile[1]
    )
    found = ranges.classes(-(-200 // tile[1]))[0, 0]
    expected = tiles(elementwise(program.mask, tables, 200, 200), *tile)
    np.testing.assert_array_equal(found, expected)
