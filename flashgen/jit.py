"""What Triton works out for any Python file, and what of it a rendered file knows already: the first launch of a kernel is short.

Triton reads each jit function's lines by tokenising the file behind it (17 functions of a Hopper kernel: 17 ms), hashes the syntax trees of
all that a kernel reaches (13 ms), and on a hit in its cache reads every intermediate text beside the binary (7 megabytes: 6 ms). A rendered
file is the content of its digest: functions end where the next line without indentation stands, and the digest is the key of all of
them. Where a kernel is compiled, Triton 3.6 also builds a C extension for each new signature, once the kernel is done: here beside it.

All of it is Triton's own machinery, entered a step later or a step earlier; where another Triton looks different inside, its own way is taken.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from flashgen import launches
from flashgen.stream_capture import relaxed

_lock = threading.RLock()


class _Thread(threading.local):
    """What this thread is about.

    Attributes:
        beside: work to begin beside its next compilation.
        compiles_only: whether its launches only compile.
        lineless: whether without numbers of lines.
    """

    beside: Callable[[], None] | None = None
    compiles_only: bool = False
    lineless: bool = False


_thread = _Thread()


# -- the lines of each function --


class _Instead:
    """A module with one function replaced, for who looks it up by the module's name."""

    def __init__(self, module: ModuleType, **functions: Callable[..., Any]) -> None:
        self.__dict__.update(functions)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def lines_known(path: Path, text: str) -> Iterator[None]:
    """While a rendered file is imported, answer what Triton asks of its functions' lines.

    Args:
        path: as the file's functions know it.
        text: the file.

    Raises:
        ImportError: there is no triton.
    """
    from triton.runtime import jit

    lines = text.splitlines(keepends=True)

    def getsourcelines(thing: Any) -> tuple[list[str], int]:
        code = getattr(thing, "__code__", None)
        if code is None or code.co_filename != str(path) or hasattr(thing, "__wrapped__"):
            return inspect.getsourcelines(thing)
        return lines[code.co_firstlineno - 1 : end_of(lines, code.co_firstlineno - 1)], code.co_firstlineno

    def dedent(text: str) -> str:
        return (
            text if text[:1] in ("@", "d") else textwrap.dedent(text)
        )  # begins without indentation: it has none to lose

    with _lock:
        jit.inspect, jit.textwrap = (
            _Instead(inspect, getsourcelines=getsourcelines),
            _Instead(textwrap, dedent=dedent),
        )
        try:
            yield
        finally:
            jit.inspect, jit.textwrap = inspect, textwrap


def end_of(lines: list[str], start: int) -> int:
    """Behind the last line of the function whose first decorator, or `def`, stands at `start`."""
    stop = start
    while not lines[stop].startswith("def "):
        stop += 1
    stop += 1
    while stop < len(lines) and lines[stop][0] in " \t\n)#":  # a signature may close in the first column
        stop += 1
    while not lines[stop - 1].strip() or lines[stop - 1].startswith("#"):  # what stands above the next function
        stop -= 1
    return stop


# -- the key, the binary and the launcher --


def adopt(module: ModuleType, path: Path, digest: str) -> None:
    """Give the jit functions of a rendered file the file's digest as their key, and the short way to a binary.

    Triton's key names its own version beside it, and the file nothing but Triton.

    Args:
        module: the imported file.
        path: as its functions know it.
        digest: of its text.
    """
    from triton.runtime import jit

    for name, function in vars(module).items():
        own = isinstance(function, jit.JITCallable) and function.fn.__code__.co_filename == str(path)
        if own:
            function.hash = hashlib.sha256(f"{digest}:{name}".encode()).hexdigest()
        if own and isinstance(function, jit.JITFunction):
            function._do_compile = functools.partial(_do_compile, function)
            function.run = functools.partial(_run, function)


def _do_compile(function: Any, *arguments: Any, **more: Any) -> Any:
    """`JITFunction._do_compile`, whose `compile` looks for the binary alone first."""
    if not isinstance(function.compile, _Compile):  # set when a device is first met
        function.compile = _Compile(function.compile)
    return type(function)._do_compile(function, *arguments, **more)


class _Compile:
    """`triton.compile`, as a jit function calls it.

    Args:
        compile: Triton's.
    """

    def __init__(self, compile: Callable[..., Any]) -> None:
        self._compile = compile

    def __call__(self, src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        found = None
        try:
            found = _cached(src, target, options)
        except (AttributeError, TypeError, KeyError, ValueError, OSError, ImportError, StopIteration):
            pass  # another Triton, or a torn entry: it compiles
        if found is not None:
            return _loading_apart(found)
        launcher = _launcher_beside(src)
        work, _thread.beside = _thread.beside, None
        if work is not None:
            _after_reading(src, work)
        try:
            with _without_lines():
                made = self._compile(src, target=target, options=options, **more)
        finally:
            # Where Triton found the binary after all nothing was read: its kernel keeps `src`, which must not keep the work.
            vars(src).pop("make_ir", None)
            if launcher is not None:
                launcher.join()
        return _loading_apart(made)


class _Lineless:
    """Triton's knobs, as its compilers read them: this thread may do without the numbers of source lines.

    Machine code is the same without them, a quarter of the binary is left, and LLVM and ptxas have less to carry.
    """

    def __init__(self, knobs: Any) -> None:
        self._knobs = knobs
        self.compilation = _Compilation(knobs.compilation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._knobs, name)


class _Compilation:
    def __init__(self, knobs: Any) -> None:
        self._knobs = knobs

    def __getattr__(self, name: str) -> Any:
        return True if name == "disable_line_info" and _thread.lineless else getattr(self._knobs, name)


@contextlib.contextmanager
def _without_lines() -> Iterator[None]:
    """Compile without numbers of lines, unless the user's TRITON_DISABLE_LINE_INFO says what is wanted; it is a part of Triton's keys."""
    if "TRITON_DISABLE_LINE_INFO" in os.environ:
        yield
        return
    with contextlib.suppress(ImportError, AttributeError):
        from triton.backends.nvidia import compiler

        if not isinstance(compiler.knobs, _Lineless):
            compiler.knobs = _Lineless(compiler.knobs)
    _thread.lineless = True
    try:
        yield
    finally:
        _thread.lineless = False


def _loading_apart(kernel: Any) -> Any:
    """A compiled kernel whose module may be loaded while a stream is captured: at its first launch, in whatever thread."""
    if hasattr(kernel, "_init_handles"):  # another Triton's loads as it always does
        kernel._init_handles = functools.partial(_init_handles, kernel)
    return kernel


def _init_handles(kernel: Any) -> None:
    if kernel.module is None:
        with relaxed():
            type(kernel)._init_handles(kernel)


def _cached(src: Any, target: Any, options: Any) -> Any:
    """What `triton.compile` answers from its cache, without the texts beside the binary; None where it has to look itself."""
    from triton import knobs
    from triton.compiler.compiler import CompiledKernel, get_cache_key, get_cache_manager, make_backend

    looks = knobs.compilation
    if looks.always_compile or looks.listener or looks.override or looks.dump_ir or looks.use_ir_loc:
        return None
    if getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        return None
    from triton._C.libtriton import get_cache_invalidating_env_vars

    backend = make_backend(target)
    parsed = backend.parse_options({**options, **src.parse_options()})
    key = get_cache_key(src, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    digest = hashlib.sha256(key.encode()).hexdigest()
    name = f"{src.name[:150]}.json"
    group = get_cache_manager(digest).get_group(name) or {}
    if name not in group:
        return None
    few = {file: place for file, place in group.items() if file.endswith((".json", f".{backend.binary_ext}"))}
    kernel = CompiledKernel(src, few, digest)
    kernel.metadata_group = group
    kernel.asm = _texts()(kernel.asm, group)
    return kernel


@functools.cache
def _texts() -> Any:
    from triton.compiler.compiler import AsmDict

    class Texts(AsmDict):  # type: ignore[misc]
        """Triton's `asm`, whose texts are read when somebody asks for them."""

        def __init__(self, known: Mapping[str, Any], group: Mapping[str, str]) -> None:
            super().__init__(known)
            self._group = group

        def __missing__(self, key: str) -> Any:
            for file, place in self._group.items():
                if file.endswith(f".{key}"):
                    self[key] = Path(place).read_text()
                    return self[key]
            return super().__missing__(key)

    return Texts


def _launcher_beside(src: Any) -> threading.Thread | None:
    """Triton 3.6 builds a C extension for a signature that is new, once the kernel is compiled: build it meanwhile.

    Goes when Triton below 3.7 is no longer supported: later ones launch through one extension.
    """
    try:
        from triton.backends.nvidia import driver
        from triton.runtime.driver import driver as drivers

        if drivers.active.launcher_cls is not driver.CudaLauncher:
            return None
        make, compile_module = driver.make_launcher, driver.compile_module_from_src
    except (ImportError, AttributeError):
        return None

    def build() -> None:
        with contextlib.suppress(Exception):  # at worst Triton builds it itself, and says what is wrong
            descriptors = [
                one for one in src.signature.values() if isinstance(one, str) and one.startswith("tensordesc")
            ]
            text = make(src.constants, dict(src.signature), [{} for _ in descriptors] or None)
            directories = {"library_dirs": driver.library_dirs(), "include_dirs": driver.include_dirs}
            compile_module(src=text, name="__triton_launcher", libraries=driver.libraries, **directories)

    thread = threading.Thread(target=build, name="flashgen-launcher")  # no daemon: the end of the process waits for it
    thread.start()
    return thread


# -- what is compiled beside it --


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Call `work` once if a kernel has to be compiled inside, on this thread, as soon as its Python has been read.

    What follows the reading, nine tenths of the time, leaves the interpreter to other threads: `work` is to start one.
    """
    _thread.beside = work
    try:
        yield
    finally:
        _thread.beside = None


def begin_beside() -> None:
    """Begin now what `beside` was given, if nothing was compiled."""
    work, _thread.beside = _thread.beside, None
    if work is not None:
        work()


def _after_reading(src: Any, work: Callable[[], None]) -> None:
    def make_ir(*arguments: Any, **more: Any) -> Any:
        # A compiled kernel keeps its source, which must not keep the work: the call's tensors, and through the output its autograd graph.
        # Leaves of a graph that lives on remember the stream of that call, and a captured backward would have to wait for it.
        del src.make_ir
        made = src.make_ir(*arguments, **more)
        work()
        return made

    src.make_ir = make_ir


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Launches of rendered files' kernels, on this thread, compile and run nothing."""
    _thread.compiles_only = True
    try:
        yield
    finally:
        _thread.compiles_only = False


def _run(function: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> Any:
    """`JITFunction.run`, unless this thread only compiles, or knows what it would find."""
    known = launches.current()
    if known is None or warmup or _thread.compiles_only:
        return type(function).run(function, *arguments, grid=grid, warmup=warmup or _thread.compiles_only, **more)
    return known.run(function, arguments, grid, more)
