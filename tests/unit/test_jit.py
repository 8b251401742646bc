"""What Triton need not work out for a rendered file: the lines of its functions, their keys, and the texts beside a cached binary."""

from __future__ import annotations

import ast
import contextlib
import inspect
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from flashgen import compiling, jit
from flashgen.build import load_module

GOLDENS = sorted((Path(__file__).resolve().parents[1] / "golden").rglob("attention_*.py"))
TEXT = '''"""A kernel."""

import triton
import triton.language as tl


@triton.jit
def twice(x):
    return x * 2


# -- the kernel --


@triton.jit(do_not_specialize=["n"])
def store(
    x_ptr,
    n,
):
    """Store a number.

    Once.
    """
    # of one program
    if tl.program_id(0) < n:

        tl.store(x_ptr, twice(21))


def launch(x):
    store[(1,)](x, 1, enable_fp_fusion=True)
'''


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.py"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: f"{path.parent.name}-{path.stem}"[:80])
def test_functions_of_rendered_files_end_where_python_says(golden: Path) -> None:
    text = golden.read_text()
    lines = text.splitlines(keepends=True)
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert found
    for node in found:
        start = node.decorator_list[0].lineno - 1
        assert lines[start : jit.end_of(lines, start)] == inspect.getblock(lines[start:]), node.name


def test_triton_is_told_the_lines_and_tokenises_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import jit as triton_jit

    expected = load_module(path)
    blocks: list[Any] = []
    monkeypatch.setattr(inspect, "getblock", lambda *_: blocks.append(1) or ["def nothing():\n"])
    module = load_module(path)
    assert not blocks and triton_jit.inspect is inspect and triton_jit.textwrap.dedent("  x") == "x"
    for name in ("twice", "store"):
        one, other = getattr(module, name), getattr(expected, name)
        assert one.src == other.src and one.src.startswith(f"def {name}(") and one.raw_src == other.raw_src
        assert one.starting_line_number == other.starting_line_number


def test_other_functions_are_read_as_ever(path: Path) -> None:
    from triton.runtime import jit as triton_jit

    with jit.lines_known(path, TEXT):
        lines, first = triton_jit.inspect.getsourcelines(test_other_functions_are_read_as_ever)
        assert triton_jit.textwrap.dedent("  x") == "x"
    assert (lines, first) == inspect.getsourcelines(test_other_functions_are_read_as_ever)


def test_a_file_that_fails_leaves_triton_as_it_was(path: Path) -> None:
    from triton.runtime import jit as triton_jit

    path.write_text(TEXT + "raise RuntimeError\n")
    with pytest.raises(Exception, match="RuntimeError"):
        load_module(path)
    assert triton_jit.inspect is inspect


def test_the_key_of_a_function_is_the_whole_text(path: Path, tmp_path: Path) -> None:
    one = load_module(path)
    elsewhere = tmp_path / "moved" / "other.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text(TEXT)
    same = load_module(elsewhere)
    path.write_text(TEXT.replace("return x * 2", "return x * 3"))
    changed = load_module(path)
    for name in ("twice", "store"):
        keys = [getattr(module, name).cache_key for module in (one, same, changed)]
        assert keys[0] == keys[1] != keys[2], name
    assert one.twice.cache_key != one.store.cache_key


# -- the compiler --


class Driver:
    """A driver of no GPU: what a launch of a compiled kernel asks it."""

    def __init__(self, target: Any) -> None:
        self.target, self.launched = target, list[Any]()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 1, 16, 0, 1024), get_device_properties=lambda *_: {"max_shared_mem": 1 << 20},
        )  # fmt: skip
        self.launcher_cls = lambda src, metadata: lambda *arguments: self.launched.append(arguments)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver as drivers

    made = Driver(GPUTarget("cuda", 80, 32))
    monkeypatch.setattr(drivers, "_active", made)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "triton"))
    return made


X = SimpleNamespace(dtype="fp32", data_ptr=lambda: 1 << 10)


def entries(tmp_path: Path) -> set[str]:
    return {file.name for file in (tmp_path / "triton").rglob("store.*")}


def compiled(path: Path) -> Any:
    """The kernel that one launch in a fresh module runs."""
    module = load_module(path)
    module.launch(X)
    (kernel,) = module.store.device_caches[0][0].values()
    return kernel


def test_a_cached_binary_is_read_without_the_texts_beside_it(
    path: Path, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(path)
    assert len(driver.launched) == 1 and {"store.ptx", "store.llir", "store.cubin"} <= entries(tmp_path)
    import triton.compiler as compiler

    monkeypatch.setattr(compiler, "compile", lambda *_, **__: pytest.fail("compiled, or read by Triton"))
    read: list[str] = []
    text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: read.append(self.suffix) or text(self, *a, **k))
    again = compiled(path)
    assert len(driver.launched) == 2 and not {".ptx", ".llir", ".ttir", ".source"} & set(read)
    assert again.kernel == first.kernel and again.hash == first.hash and again.metadata == first.metadata
    assert again.asm["ptx"] == first.asm["ptx"] and ".ptx" in read
    with pytest.raises(KeyError):
        again.asm["none"]


def test_another_text_or_another_option_is_another_binary(path: Path, driver: Driver, tmp_path: Path) -> None:
    first = compiled(path)
    path.write_text(TEXT.replace("twice(21)", "twice(22)"))
    assert compiled(path).hash != first.hash
    path.write_text(TEXT.replace("(x, 1,", "(x, 1, num_warps=8,"))
    assert compiled(path).hash != first.hash


def test_a_torn_entry_is_compiled_anew(path: Path, driver: Driver, tmp_path: Path) -> None:
    first = compiled(path)
    for file in (tmp_path / "triton").rglob("store.cubin"):
        file.unlink()
    assert compiled(path).kernel == first.kernel


def test_who_asks_to_compile_always_or_listens_gets_tritons_way(
    path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    compiled(path)
    heard: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: heard.append(cache_hit))
    compiled(path)
    monkeypatch.setattr(knobs.compilation, "always_compile", True)
    compiled(path)
    assert heard == [True, False]


def test_triton_3_6_builds_a_launcher_while_the_kernel_compiles(
    path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.compiler as compiler
    from triton.backends.nvidia import driver as nvidia

    order: list[Any] = []
    begun, done, compile_kernel = threading.Event(), threading.Event(), compiler.compile

    def make(constants: Any, signature: dict[Any, str], descriptors: Any) -> str:
        return f"{list(signature.values())} {descriptors}"

    def build(*, src: str, name: str, **_: Any) -> None:
        begun.set()
        done.wait(10.0)
        time.sleep(0.2)  # longer than the kernel, which waits for it
        order.append((name, src))

    def compiling(*arguments: Any, **more: Any) -> Any:
        order.append(begun.wait(10.0) and "beside it")
        made = compile_kernel(*arguments, **more)
        done.set()
        return made

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            order.append("asked for")

        def __call__(self, *arguments: Any) -> None:
            order.append("launched")

    for name, value in {"make_launcher": make, "compile_module_from_src": build, "CudaLauncher": Launcher}.items():
        monkeypatch.setattr(nvidia, name, value, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr(compiler, "compile", compiling)
    monkeypatch.setattr(driver, "launcher_cls", Launcher)
    compiled(path)
    built = ("__triton_launcher", "['*fp32', 'i32'] None")
    assert order == ["beside it", built, "asked for", "launched"]
    del order[:]
    compiled(path)
    assert order == ["asked for", "launched"], "a cached kernel has its launcher"


# -- what is compiled beside it --


def test_a_thread_that_only_compiles_launches_nothing_and_others_do(path: Path, driver: Driver) -> None:
    module = load_module(path)
    with compiling.compiling_only():
        module.launch(X)
        assert not driver.launched
        other = threading.Thread(target=module.launch, args=(X,))
        other.start()
        other.join()
        assert len(driver.launched) == 1
    module.launch(X)
    assert len(driver.launched) == 2
    assert len(module.store.device_caches[0][0]) == 1, "what was compiled is what is launched"


def test_work_begins_once_a_kernel_was_read_and_only_where_one_is_compiled(path: Path, driver: Driver) -> None:
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    begun: list[str] = []
    read, stage = ASTSource.make_ir, CUDABackend.make_ttir

    def reading(self: Any, *arguments: Any, **more: Any) -> Any:
        made = read(self, *arguments, **more)
        begun.append("read")
        return made

    def lowering(*arguments: Any, **more: Any) -> Any:
        begun.append("stage")
        return stage(*arguments, **more)

    with (
        mock.patch.object(ASTSource, "make_ir", reading),
        mock.patch.object(CUDABackend, "make_ttir", staticmethod(lowering)),
    ):
        for _ in range(2):
            with compiling.beside(lambda: begun.append("work")):
                compiled(path)
        path.write_text(TEXT.replace("twice(21)", "twice(22)"))
        compiled(path)
    assert begun == ["read", "work", "stage", "read", "stage"]


# -- numbers of lines --


@pytest.mark.parametrize("asked", [None, "0", "1", False])
def test_kernels_are_compiled_without_numbers_of_lines_unless_asked(
    asked: str | bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia import compiler

    monkeypatch.setattr(compiler, "knobs", getattr(compiler.knobs, "_knobs", compiler.knobs))
    if asked is False:  # in Python, of which the environment need not know
        monkeypatch.setitem(vars(compiler.knobs.compilation), "disable_line_info", asked)
    elif isinstance(asked, str):
        monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", asked)
    seen: list[bool] = []

    def compile(*_: Any, **__: Any) -> Any:
        seen.append(bool(compiler.knobs.compilation.disable_line_info))
        others = threading.Thread(target=lambda: seen.append(bool(compiler.knobs.compilation.disable_line_info)))
        others.start()
        others.join()
        assert compiler.knobs.compilation.dump_ir is not None and compiler.knobs.nvidia is not None
        return SimpleNamespace()

    monkeypatch.setattr(jit, "_launcher_beside", lambda src: None)
    jit._Compile(compile)(SimpleNamespace())
    mine, another_threads = seen
    assert mine == (asked not in ("0", False))
    assert another_threads == (asked == "1"), "other kernels of the process are not ours"
    assert bool(compiler.knobs.compilation.disable_line_info) == (asked == "1")


# -- what is compiled beside it --


@pytest.mark.parametrize("fails", [False, True])
def test_a_source_that_is_not_read_keeps_no_work(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds the binary by itself where it is another than the one known here: its kernel keeps the source for good."""

    class Call:
        """Stands for the tensors of the call."""

    def compile(*_: Any, **__: Any) -> Any:
        if fails:
            raise RuntimeError("ptxas")
        return SimpleNamespace()

    monkeypatch.setattr(jit, "_launcher_beside", lambda src: None)
    src, call = SimpleNamespace(), Call()
    watch = weakref.ref(call)
    with compiling.beside(lambda call=call: None), contextlib.suppress(RuntimeError):  # type: ignore[misc]
        jit._Compile(compile)(src)
    del call
    assert watch() is None and not hasattr(src, "make_ir")


DESCRIBED = '''"""Descriptors."""

import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@triton.jit
def nothing():
    pass


def described(x, shape, layout):
    return TensorDescriptor(x, list(shape), list(x.stride()), [1, 64], layout)
'''


@pytest.mark.parametrize("more", ["", "\n\ndef redirect(x):\n    return TensorDescriptor.__new__(TensorDescriptor)\n"])
def test_descriptors_are_checked_once_for_tensors_of_one_form(tmp_path: Path, more: str) -> None:
    import torch
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia import hopper

    path = tmp_path / "described.py"
    path.write_text(DESCRIBED + more)
    module = load_module(path)
    assert (module.TensorDescriptor is hopper.TensorDescriptor) == bool(more)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    first, second = (torch.zeros(4, 64, dtype=torch.float16) for _ in range(2))
    checked: list[Any] = []
    real = hopper.TensorDescriptor.__post_init__
    with mock.patch.object(hopper.TensorDescriptor, "__post_init__", lambda self: checked.append(self) or real(self)):
        made = [module.described(x, x.shape, layout) for x in (first, second, second)]
        assert len(checked) == (3 if more else 1)
        assert all(type(x) is hopper.TensorDescriptor for x in made)
        assert [x.base.data_ptr() for x in made] == [x.data_ptr() for x in (first, second, second)]
        assert vars(made[0]) | {"base": None} == vars(made[1]) | {"base": None}
        whole = [module.TensorDescriptor.from_tensor(x, [1, 64], layout) for x in (first, second)]
        assert [vars(x) | {"base": None, "shape": [4, 64], "strides": [64, 1]} for x in whole] == [
            vars(made[0]) | {"base": None}
        ] * 2
        assert module.described(second, (3, 64), layout).shape == [3, 64], "another size is another one"
        wide = torch.zeros(4, 65, dtype=torch.float16)
        for wrong in (wide[:, 1:], torch.zeros(300, dtype=torch.float16)[1:257].view(4, 64)):
            with pytest.raises(AssertionError):
                module.described(wrong, wrong.shape, layout)
