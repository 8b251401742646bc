"""Numbers and scalars beside blocks in the interpreter, whose search for common types the worker cuts short."""

from __future__ import annotations

import pytest
import torch
import triton
from handwritten import kernel

from flashgen import interpret
from flashgen.errors import BuildError

ROWS = (
    "x + 0.0",
    "x + (-0.0)",  # another constant than the one before
    "2.5 - x",
    "x * 2 + 1",
    "x / scale - scale",  # a scalar of the launch
    "scale - x",
    "i * 3 - 7",
    "i + 2147483647",  # wraps
    "i / 3",  # of two integers a float
    "x.to(tl.float16) / 3",  # and of halves a float, too
    "(x.to(tl.float16) + 1.0009765625).to(tl.float32)",
    "(i.to(tl.uint32) * 4294967295).to(tl.int32, bitcast=True)",
    "(i.to(tl.int64) + 4294967296) >> 32",
    "(i & 1) * x",
    "tl.where(x > 1, x, 0)",
    "tl.where((x == x) & (scale > 1.0), x, -1.0)",
)


def test_they_have_the_values_that_a_gpu_has() -> None:
    q = torch.tensor([-0.0, 0.0, 1.5, -2.0, 0.1, 3.0, 1000.0, -1e-3, *range(8)]).reshape(1, 1, 1, 16)
    o = torch.zeros(1, 1, len(ROWS), 16)
    body = ["i = tl.arange(0, 16)", "x = tl.load(q + i)", "scale = tl.load(q + 2)"]
    body += [
        f"tl.store(o + {16 * n} + i, ({text}))" for n, text in enumerate(ROWS)
    ] * 2  # the second time as it is known
    interpret.launch(kernel("\n".join(body)), q, q.clone(), q.clone(), o, None, sm_scale=1.0, causal_offset=0)
    x, i, scale = q.flatten(), torch.arange(16, dtype=torch.int32), torch.tensor(1.5)
    half = x.half()
    minus_zero = (
        -0.0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 0.0
    )  # a number's sign was lost
    want = [
        x + 0.0, x + minus_zero, 2.5 - x, x * 2 + 1, x / scale - scale, scale - x, i * 3 - 7, i + 2147483647, i / 3,
        half.float() / 3, (half + torch.tensor(1.0009765625).half()).float(), -i, torch.ones(16), (i & 1) * x,
        torch.where(x > 1, x, torch.zeros(())), x,
    ]  # fmt: skip
    for text, row, expected in zip(ROWS, o.reshape(len(ROWS), 16), want, strict=True):
        assert torch.equal(row, expected.float()) and torch.equal(row.signbit(), expected.float().signbit()), text


@pytest.mark.parametrize("text", ["i + 2147483648", "i.to(tl.uint32) + (-1)"])
def test_one_that_does_not_fit_is_an_error(text: str) -> None:
    q = torch.zeros(1, 1, 1, 16)
    body = f"i = tl.arange(0, 16)\ntl.store(o + i, {text})"
    with pytest.raises(BuildError, match=r"out of range|unsigned tensor and a negative"):
        interpret.launch(kernel(body), q, q.clone(), q.clone(), q.clone(), None, sm_scale=1.0, causal_offset=0)
