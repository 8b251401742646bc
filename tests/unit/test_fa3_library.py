"""benchmarks/fa3_library.py with a stand-in for the library, on this CPU."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashgen.problem import Problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("fa3_library")


@pytest.fixture
def handlers(library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of a library that holds what `register` puts there."""
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: SimpleNamespace())
    return library.Handlers(Path("none"), "cpu")


def register(library: Any, handlers: Any, name: str, function: Any) -> None:
    def handler(pointer: int) -> int | None:
        found: int | None = function(library._args(library._Frame, pointer))
        return found

    setattr(handlers._library, name, library._Function(handler))


def test_the_structures_have_the_sizes_of_the_interface(library: Any) -> None:
    # sizeof in xla/ffi/api/c_api.h of jaxlib 0.11.2; handlers refuse a frame of another size.
    sizes = {name: ctypes.sizeof(getattr(library, f"_{name}")) for name in ("Api", "Buffer", "Buffers", "Attributes")}
    assert sizes == {"Api": 200, "Buffer": 48, "Buffers": 40, "Attributes": 48} and library._FRAME_SIZE == 168


def test_a_handler_sees_buffers_attributes_and_scratch(library: Any, handlers: Any) -> None:
    seen: dict[str, Any] = {}

    def double(frame: Any) -> None:
        x, y = (library._args(library._Buffer, side.items[0]) for side in (frame.args, frame.rets))
        seen["shape"] = [(b.dtype, *b.dims[: b.rank]) for b in (x, y)]
        names = [frame.attrs.names[n].contents.ptr.decode() for n in range(frame.attrs.size)]
        values = [library._args(library._Scalar, frame.attrs.items[n]) for n in range(frame.attrs.size)]
        kinds = (ctypes.c_bool, ctypes.c_int64, ctypes.c_double)
        seen["attributes"] = {n: ctypes.cast(v.value, ctypes.POINTER(k)).contents.value for n, v, k in zip(names, values, kinds, strict=True)}  # fmt: skip
        asked = library._AllocateArgs(struct_size=ctypes.sizeof(library._AllocateArgs), size=24, alignment=1)
        assert frame.api.contents.DeviceMemory_Allocate(ctypes.addressof(asked)) is None and asked.data
        source, target = (ctypes.cast(b.data, ctypes.POINTER(ctypes.c_float)) for b in (x, y))
        for index in range(6):
            target[index] = 2.0 * source[index]

    register(library, handlers, "double", double)
    x, y = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3)
    handlers.call("double", [x], [y], c=0.5, a=True, b=-7)
    assert torch.equal(y, 2.0 * x) and seen["shape"] == [(11, 2, 3)] * 2
    assert seen["attributes"] == {"a": True, "b": -7, "c": 0.5} and not handlers._scratch


def test_an_error_is_raised_with_its_words(library: Any, handlers: Any) -> None:
    def fail(frame: Any) -> int:
        said = library._ErrorArgs(struct_size=32, message=b"no such head dim", code=3)
        error: int = frame.api.contents.Error_Create(ctypes.addressof(said))
        details = library._DetailsArgs(struct_size=40, error=error)
        frame.api.contents.Error_GetDetails(ctypes.addressof(details))
        assert details.message == b"no such head dim"
        return error

    register(library, handlers, "fail", fail)
    register(library, handlers, "future", lambda frame: frame.api.contents.Future_Create(0))
    with pytest.raises(RuntimeError, match=r"^fail: no such head dim$"):
        handlers.call("fail", [], [])
    with pytest.raises(RuntimeError, match=r"^future: Future_Create is not there outside of JAX$"):
        handlers.call("future", [], [])


def test_it_says_what_it_does_not_take(library: Any, tmp_path: Path) -> None:
    (tmp_path / "dew_flash_attn_cu13-0.3.6.dist-info").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "some.so").write_bytes(b"no library")
    peer = library.FlashAttention3(tmp_path / "lib" / "some.so")
    assert peer.version() == "dew-flash-attn-cu13 0.3.6" and peer.available("cpu") == "needs a CUDA device"
    shape = {"batch": 1, "seqlen_q": 8, "seqlen_k": 16, "num_heads_q": 1, "num_heads_kv": 1}
    options: dict[str, Any] = {**shape, "dtype": "bf16", "head_dim": 64, "head_dim_v": 64, "device": "cpu"}
    assert peer.supports(Problem(**options, causal=True), "attention_fwd") is None
    for change in ({"dtype": "fp32"}, {"head_dim": 192, "head_dim_v": 128}, {"causal": True, "causal_alignment": "top-left"}):  # fmt: skip
        assert peer.supports(Problem(**{**options, **change}), "attention_fwd")


def test_gradients_come_from_its_own_backward(library: Any, handlers: Any) -> None:
    """Which buffers go where; what they hold is judged on a GPU, before anything is timed."""
    shapes: dict[str, list[Any]] = {}

    def note(name: str) -> Any:
        def handler(frame: Any) -> None:
            sides = [[library._args(library._Buffer, side.items[n]) for n in range(side.size)] for side in (frame.args, frame.rets)]  # fmt: skip
            shapes[name] = [[tuple(b.dims[: b.rank]) for b in side] for side in sides]

        return handler

    for name in ("dew_flash3_mha_fwd", "dew_flash3_mha_bwd"):
        register(library, handlers, name, note(name))
    peer = library.FlashAttention3(Path("none"))
    peer._handlers = handlers
    problem = Problem(dtype="bf16", batch=2, seqlen_q=3, seqlen_k=5, num_heads_q=4, num_heads_kv=2, head_dim=64, head_dim_v=64, device="cpu")  # fmt: skip
    q, k, v = (torch.zeros(2, n, h, 64, dtype=torch.bfloat16, requires_grad=True) for n, h in ((3, 4), (5, 2), (5, 2)))
    out = peer.forward(problem)(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    shape_q, shape_k = (2, 3, 4, 64), (2, 5, 2, 64)
    assert [tuple(g.shape) for g in grads] == [shape_q, shape_k, shape_k]
    assert shapes["dew_flash3_mha_fwd"][0] == [shape_q, shape_k, shape_k]
    assert shapes["dew_flash3_mha_fwd"][1][:2] == [shape_q, (2, 4, 3)]
    assert shapes["dew_flash3_mha_bwd"][0] == [shape_q, shape_q, shape_k, shape_k, shape_q, (2, 4, 3)]
    assert shapes["dew_flash3_mha_bwd"][1] == [shape_q, shape_k, shape_k, *[(4 * (2 * 3 + 128 * 3),)] * 2]
