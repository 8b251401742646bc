"""First calls of a mask that reads tensors run the kernel that masks share; its own is compiled meanwhile and runs from then on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_compile_beside import Compiler, compiling

import flashgen
from flashgen import block_ranges, execution, shared_masks, stand_ins, warm
from flashgen.variants.gluon_fwd_sm90 import GluonForwardSm90


class Kernels(Compiler):
    """Notes of each kernel whether it is the shared one; a mask's own compiles until `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.compiled: list[tuple[str, bool]] = []  # what, and whether the main thread did

    def __call__(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        what = self.named(src)
        mine = threading.current_thread() is threading.main_thread()
        if what == "own" and not mine:
            assert self.go.wait(60.0)
        self.compiled.append((what, mine))
        kernel = super().__call__(src, target, options)
        kernel.run = lambda *_: self.launched.append(what)
        return kernel

    def named(self, src: Any) -> str:
        if src.name != "attention_fwd":
            return "backward"
        shared = shared_masks._mods(128).digest in src.fn.fn.__code__.co_filename
        return "shared" if shared else "own"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernels]:
    from triton.experimental.gluon._runtime import GluonASTSource

    monkeypatch.setattr("test_compile_beside.Compiler", Kernels)
    monkeypatch.setattr("test_compile_beside.SECONDS", 0.0)
    monkeypatch.setattr(GluonASTSource, "make_ir", lambda *_: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: mock.Mock(multi_processor_count=132))
    monkeypatch.setattr(GluonForwardSm90, "brief", lambda self, spec: {})  # see test_brief_calls.py
    made = compiling(monkeypatch, tmp_path)
    assert isinstance(made, Kernels)
    made.patience = 0.0
    yield made
    made.go.set()
    finish()
    execution._beside.clear()
    stand_ins._own.clear()
    block_ranges.forget()
    flashgen.dispatch.forget()


def finish() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("flashgen-"):
            thread.join(60.0)


def documents(length: int) -> torch.Tensor:
    return torch.arange(512, dtype=torch.int32) // length


def drawn(grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (torch.zeros(1, 512, heads, 128, dtype=torch.bfloat16, requires_grad=grad) for heads in (4, 2))
    return q, k


def attend(ids: torch.Tensor, qk: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Of other queries than before, as the next layer's, where none are given."""
    q, k = drawn() if qk is None else qk
    return flashgen.attention(q, k, k, mask_mod=lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j), backend="gluon")  # type: ignore[return-value]


def test_the_shared_kernel_runs_until_its_own_is_compiled(kernels: Kernels) -> None:
    ids = documents(100)
    attend(ids)
    assert kernels.launched == ["shared"] and kernels.compiled == [("shared", True)]
    attend(ids)
    assert kernels.launched == ["shared"] * 2 and not warm.table(), "what follows is another kernel"
    kernels.go.set()
    finish()
    assert kernels.compiled == [("shared", True), ("own", False)]
    for _ in range(2):
        attend(ids)
    assert kernels.launched[2:] == ["own"] * 2 and len(kernels.compiled) == 2 and len(warm.table()) == 1


def test_a_second_mask_that_reads_tensors_compiles_nothing_before_it_runs(kernels: Kernels) -> None:
    other = documents(37)
    attend(documents(100))
    q = torch.zeros(1, 512, 4, 128, dtype=torch.bfloat16)
    flashgen.attention(q, q, q, mask_mod=lambda b, h, i, j: other[i] <= other[j], backend="gluon")
    assert kernels.launched == ["shared"] * 2 and kernels.compiled == [("shared", True)]


def test_nothing_stands_in_where_bits_are_to_repeat(kernels: Kernels) -> None:
    ids, (q, k) = documents(100), drawn()
    flashgen.attention(q, k, k, mask_mod=lambda b, h, i, j: ids[i] == ids[j], deterministic=True, backend="gluon")
    assert kernels.launched == ["own"] and kernels.compiled == [("own", True)]


def test_a_write_that_nobody_counts_is_met_with_tables_of_its_own(kernels: Kernels) -> None:
    ids, other = documents(100), documents(37)
    given: list[torch.Tensor] = []
    real = block_ranges.launch_values

    def noted(*arguments: Any, **more: Any) -> dict[str, Any]:
        values = real(*arguments, **more)
        given.append(values["mask_words"])
        return values

    with mock.patch("flashgen.operands.launch_values", noted):
        for _ in range(2):
            attend(ids)
        ids.data.copy_(other)
        attend(ids)
        attend(other)
    first, again, written, expected = given
    assert kernels.launched == ["shared"] * 4
    assert torch.equal(first, again) and torch.equal(written, expected) and not torch.equal(first, written)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_call_on_the_same_queries_waits_for_its_own(kernels: Kernels, layout: str) -> None:
    """A loop that takes times measures nothing else."""
    ids, (q, k) = documents(100), drawn()
    if layout == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    options: dict[str, Any] = {"mask_mod": lambda b, h, i, j: ids[i] == ids[j], "backend": "gluon", "layout": layout}
    flashgen.attention(q, k, k, **options)
    threading.Timer(0.2, kernels.go.set).start()
    for _ in range(2):
        flashgen.attention(q, k, k, **options)
    assert kernels.launched == ["shared", "own", "own"] and kernels.compiled == [("shared", True), ("own", False)]
    assert warm.table()


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "capturing", lambda device: True)


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_sync_debug_mode", lambda: 2)
    monkeypatch.setattr(stand_ins, "_on_a_gpu", lambda device: True)


@pytest.mark.parametrize("where", [capture, no_waiting])
def test_where_the_host_may_not_wait_for_the_device_it_waits_for_the_compiler(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, where: Callable[[pytest.MonkeyPatch], None]
) -> None:
    ids = documents(100)
    attend(ids)
    where(monkeypatch)
    threading.Timer(0.2, kernels.go.set).start()
    attend(ids)
    assert kernels.launched == ["shared", "own"] and kernels.compiled == [("shared", True), ("own", False)]


def test_under_capture_nothing_stands_in(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(monkeypatch)
    attend(documents(100))
    assert kernels.launched == ["own"] and not stand_ins._own


def test_what_the_gradients_need_is_compiled_before_it(kernels: Kernels) -> None:
    """Where the shared kernel is there already, too: nothing that the forward compiles begins the backward."""
    kernels.go.set()
    q, ids = torch.zeros(1, 512, 4, 128, dtype=torch.bfloat16), documents(37)
    flashgen.attention(q, q, q, mask_mod=lambda b, h, i, j: ids[i] <= ids[j], return_lse=True, backend="gluon")
    finish()
    kernels.compiled.clear()
    out = attend(documents(100), drawn(grad=True))
    finish()
    kinds = [what for what, _ in kernels.compiled]
    assert kinds[0] == "backward" and kinds.index("own") == len(kinds) - 1
    out.sum().backward()
    assert not any(mine for _, mine in kernels.compiled), "the main thread compiled nothing"


def test_a_score_and_many_tiles_have_their_own_at_once(kernels: Kernels) -> None:
    ids = documents(100)
    q = torch.zeros(1, 512, 4, 128, dtype=torch.bfloat16)
    given: dict[str, Any] = {"mask_mod": lambda b, h, i, j: ids[i] == ids[j], "backend": "gluon"}
    flashgen.attention(q, q, q, score_mod=lambda s, b, h, i, j: s * 2, **given)
    with mock.patch("flashgen.mask_words._MOST_SLOTS", 0):
        flashgen.attention(q, q, q, **given)
    assert kernels.launched == ["own"] * 2 and not stand_ins._own


def test_an_own_kernel_that_does_not_compile_says_so_in_the_next_call(kernels: Kernels) -> None:
    ids = documents(100)
    with mock.patch("flashgen.compiling.compiling_only", side_effect=MemoryError("no room")):
        attend(ids)
        finish()
    attend(ids)
    assert kernels.launched == ["shared", "own"] and kernels.compiled == [("shared", True), ("own", True)]
