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
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flashgen import compiling, garbage, launches
from flashgen.lineless import without_lines
from flashgen.stream_capture import relaxed

_MOST_DESCRIPTORS = 1024  # of one file, remembered
_lock = threading.RLock()


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
    if "ticket_counter" in vars(module):
        module.ticket_counter = launches.Counters(module.ticket_counter)  # type: ignore[attr-defined]
    found = vars(module).get("TensorDescriptor")
    if "redirect" not in vars(module) and type(found) is type:  # a file that has it remembers its own
        module.TensorDescriptor = _Descriptors(found)  # type: ignore[attr-defined]


class _Descriptors:
    """Triton's TensorDescriptor, whose checks take 8 microseconds, made once for all tensors of the same dtype, sizes and strides."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._known: dict[Any, dict[str, Any]] = {}

    def __call__(
        self, base: Any, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int], layout: Any
    ) -> Any:
        key = (base.dtype, *shape, *strides, *block_shape, id(layout))
        fields = self._known.get(key)
        if fields is None or base.data_ptr() % 16:
            made = self._kind(base, shape, strides, block_shape, layout)
            if len(self._known) >= _MOST_DESCRIPTORS:
                self._known.clear()
            self._known[key] = {**vars(made), "base": None}  # keeps the layout, and so its id
            return made
        found = self._kind.__new__(self._kind)
        vars(found).update(fields, base=base)
        return found

    def from_tensor(self, tensor: Any, block_shape: Sequence[int], layout: Any) -> Any:
        """Of a whole tensor."""
        return self(tensor, tensor.shape, tensor.stride(), block_shape, layout)


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
        if compiling.thread.refuses:
            raise compiling.NotCompiledError
        launcher = _launcher_beside(src)
        work, compiling.thread.beside = compiling.thread.beside, None
        if work is not None:
            compiling.after_reading(src, work)
        try:
            with without_lines(), garbage.as_ever():
                made = self._compile(src, target=target, options=options, **more)
        finally:
            # Where Triton found the binary after all nothing was read: its kernel keeps `src`, which must not keep the work.
            vars(src).pop("make_ir", None)
            if launcher is not None:
                with garbage.as_ever():
                    launcher.join()
        return _loading_apart(made)


def _loading_apart(kernel: Any) -> Any:
    """A compiled kernel whose module may be loaded while a stream is captured: at its first launch, in whatever thread."""
    if hasattr(kernel, "_init_handles"):  # another Triton's loads as it always does
        kernel._init_handles = functools.partial(_init_handles, kernel)
    return kernel


def _init_handles(kernel: Any) -> None:
    if kernel.module is None:
        with relaxed():
            type(kernel)._init_handles(kernel)
        if getattr(kernel, "_run", None) is not None:
            kernel._run = launches.Noted(kernel._run)


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

    # At the end of the process it is waited for.
    thread = threading.Thread(target=build, name="flashgen-launcher", daemon=False)
    thread.start()
    return thread


def _run(function: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> Any:
    """`JITFunction.run`, unless this thread only compiles, or knows what it would find."""
    if compiling.thread.compiling is not None:
        compiling.thread.compiling.begin(function, arguments, grid, more)
        return None
    known = launches.current()
    if known is None or warmup:
        return type(function).run(function, *arguments, grid=grid, warmup=warmup, **more)
    return known.run(function, arguments, grid, more)
