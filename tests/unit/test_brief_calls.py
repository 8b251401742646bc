"""First calls of a kernel that is in no cache run its brief form; its own is compiled meanwhile and runs from then on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_compile_beside import H100, Compiler, compiling
from test_stand_ins import capture, documents, finish

import flashgen
from flashgen import block_ranges, execution, shared_masks, stand_ins, warm
from flashgen.dispatch import resolve


class Kernels(Compiler):
    """Notes of each kernel which it is; what other threads compile is done once `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.compiled: list[tuple[str, bool]] = []  # what, and whether the main thread did
        self.broken: tuple[str, ...] = ()  # what other threads cannot compile

    def __call__(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        what = self.named(src)
        mine = threading.current_thread() is threading.main_thread()
        if what in ("own", "shared") and not mine:
            assert self.go.wait(60.0)
        self.compiled.append((what, mine))
        if what in self.broken and not mine:
            raise MemoryError("no room")
        kernel = super().__call__(src, target, options)
        kernel.run = lambda *_: self.launched.append(what)
        return kernel

    def named(self, src: Any) -> str:
        if src.name != "attention_fwd":
            return "backward"
        names = [parameter.name for parameter in src.fn.params]
        if "BRIEF" not in names:
            return "plain"
        form = "brief " if src.constants[(names.index("BRIEF"),)] else ""
        shared = shared_masks._mods(128).digest in src.fn.fn.__code__.co_filename
        return f"{form}{'shared' if shared else 'own'}"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernels]:
    from triton.experimental.gluon._runtime import GluonASTSource

    monkeypatch.setattr("test_compile_beside.Compiler", Kernels)
    monkeypatch.setattr("test_compile_beside.SECONDS", 0.0)
    monkeypatch.setattr(GluonASTSource, "make_ir", lambda *_: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: mock.Mock(multi_processor_count=132))
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


def drawn(seqlen: int = 512, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (torch.zeros(1, seqlen, heads, 128, dtype=torch.bfloat16, requires_grad=grad) for heads in (4, 2))
    return q, k


def attend(qk: tuple[torch.Tensor, torch.Tensor] | None = None, **options: Any) -> torch.Tensor:
    """Of other queries than before, as the next layer's, where none are given; with a cap where no option is."""
    q, k = drawn() if qk is None else qk
    return flashgen.attention(q, k, k, backend="gluon", **(options or {"softcap": 30.0}))  # type: ignore[return-value]


def test_the_brief_form_runs_until_its_own_is_compiled(kernels: Kernels) -> None:
    for _ in range(2):
        attend()
    assert kernels.launched == ["brief own"] * 2 and kernels.compiled == [("brief own", True)]
    assert not warm.table(), "what follows is another kernel"
    kernels.go.set()
    finish()
    for _ in range(2):
        attend()
    assert kernels.compiled == [("brief own", True), ("own", False)]
    assert kernels.launched[2:] == ["own"] * 2 and len(warm.table()) == 1


def test_a_kernel_that_is_in_a_cache_runs_at_once(kernels: Kernels) -> None:
    kernels.go.set()
    attend()
    finish()
    stand_ins._own.clear()  # as in a process that finds it in Triton's cache
    attend()
    assert kernels.launched == ["brief own", "own"] and len(kernels.compiled) == 2


def test_arguments_that_triton_specialises_on_are_compiled_beside_calls_too(kernels: Kernels) -> None:
    kernels.go.set()
    attend()
    finish()
    attend(drawn(500))  # the last block of keys is ragged
    finish()
    attend(drawn(500))
    assert kernels.launched == ["brief own", "brief own", "own"]
    assert kernels.compiled == [("brief own", True), ("own", False)] * 2


def test_after_so_many_times_calls_wait(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "_MOST_TIMES", 1)
    kernels.go.set()
    attend()
    finish()
    attend(drawn(500))
    assert kernels.launched == ["brief own", "own"] and kernels.compiled[-1] == ("own", True)


def masked(number: int) -> Any:
    return lambda b, h, i, j: i - j < number


def test_masks_share_a_brief_form_and_what_is_compiled_beside_it(kernels: Kernels) -> None:
    attend(mask_mod=masked(77))
    attend(mask_mod=masked(78))
    kernels.go.set()
    finish()
    attend(mask_mod=masked(79))
    assert kernels.launched == ["brief shared"] * 2 + ["shared"]
    assert kernels.compiled == [("brief shared", True), ("shared", False)]


def reads(ids: torch.Tensor) -> dict[str, Any]:
    return {"mask_mod": lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)}


def test_a_mask_that_reads_tensors_has_the_shared_kernel_where_there_is_one(kernels: Kernels) -> None:
    kernels.go.set()
    attend(mask_mod=masked(77))
    finish()
    kernels.go.clear()
    for _ in range(2):
        attend(**reads(documents(100)))
    assert kernels.launched == ["brief shared"] + ["shared"] * 2, "compiled by another mask's call"
    kernels.go.set()
    finish()
    attend(**reads(documents(100)))
    assert kernels.launched[-1] == "own" and kernels.compiled[-1] == ("own", False)


def test_else_a_brief_form_of_its_own(kernels: Kernels) -> None:
    ids = documents(100)
    for _ in range(2):
        attend(**reads(ids))
    kernels.go.set()
    finish()
    attend(**reads(ids))
    assert kernels.launched == ["brief own"] * 2 + ["own"]
    assert kernels.compiled == [("brief own", True), ("own", False)]


def test_a_call_on_the_same_queries_waits_for_its_own(kernels: Kernels) -> None:
    qk = drawn()
    attend(qk)
    threading.Timer(0.2, kernels.go.set).start()
    attend(qk)
    assert kernels.launched == ["brief own", "own"] and kernels.compiled[-1] == ("own", False)


@pytest.mark.parametrize("how", ["deterministic", "config", "setting", "capture", "plain"])
def test_where_nothing_stands_in(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Where bits are to repeat, the kernel was named, nobody wants it, or a graph is captured; a plain kernel has no brief form."""
    options: dict[str, Any] = {"softcap": 30.0}
    if how == "deterministic":
        options["deterministic"] = True
    elif how == "config":
        q, k = drawn()
        problem = flashgen.Problem.from_tensors(q, k, k, softcap=30.0)
        options["config"] = resolve(problem, backend="gluon", target=H100).config
    elif how == "setting":
        monkeypatch.setenv("FLASHGEN_STAND_INS", "0")
    elif how == "capture":
        capture(monkeypatch)
    else:
        options = {"causal": True}
    what = "plain" if how == "plain" else "own"
    attend(**options)
    assert kernels.launched == [what] and kernels.compiled == [(what, True)] and not stand_ins._own


def test_the_gradients_kernels_are_compiled_beside_it_and_before_its_own(kernels: Kernels) -> None:
    kernels.go.set()
    out = attend(drawn(grad=True))
    finish()
    kinds = [what for what, _ in kernels.compiled]
    assert kinds.index("own") == len(kinds) - 1 and kinds.count("backward") == len(kinds) - 2
    out.sum().backward()
    assert [what for what, mine in kernels.compiled if mine] == ["brief own"], "the main thread compiled nothing else"


def test_an_own_kernel_that_does_not_compile_is_logged_and_compiled_by_the_next_call(
    kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.broken = ("own",)
    kernels.go.set()
    attend()
    finish()
    assert "did not compile beside what stands in" in caplog.text and "no room" in caplog.text
    attend()
    assert kernels.launched == ["brief own", "own"] and kernels.compiled[-2:] == [("own", False), ("own", True)]


def test_who_takes_times_waits_for_it(kernels: Kernels) -> None:
    attend()
    threading.Timer(0.2, kernels.go.set).start()
    stand_ins.settle()
    attend()
    assert kernels.launched == ["brief own", "own"]
