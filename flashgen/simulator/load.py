"""Executing a kernel file's exact text under the simulated names.

The text gets builtins of its own whose `__import__` answers Triton and torch; `sys.modules` is never touched, so the
real Triton stays importable in the same process, and the simulated one in no other module.
"""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from flashgen.errors import InvalidProblemError
from flashgen.simulator import api, sites
from flashgen.simulator.errors import KernelPythonError, SimulationError, UnsupportedOperationError
from flashgen.simulator.functions import device_range

if TYPE_CHECKING:
    from flashgen.render import KernelSource


def read(source: str | Path | KernelSource) -> tuple[str, str]:
    """The text of a source, and the name to show for it.

    Raises:
        InvalidProblemError: the source is neither text, nor a file, nor a rendered kernel.
    """
    if isinstance(source, Path):
        try:
            return source.read_text(), str(source)
        except OSError as error:
            raise InvalidProblemError(f"the kernel file {source} cannot be read: {error}.") from error
    if isinstance(source, str):
        if "\n" not in source and source.endswith(".py"):
            return read(Path(source))
        return source, "<source>"
    text, name = getattr(source, "text", None), getattr(source, "name", None)
    if isinstance(text, str) and isinstance(name, str):
        return text, name
    raise InvalidProblemError(
        f"source is a {type(source).__name__}: give the text of a kernel file, its path, or a KernelSource of render()."
    )


class _Torch(ModuleType):
    """torch on the CPU, whatever device is named; that device has `processors` of them."""

    def __init__(self, processors: int) -> None:
        import torch

        super().__init__("torch")
        self._real = torch
        self.__path__: list[str] = []
        properties = SimpleNamespace(multi_processor_count=processors, major=9, minor=0)
        self.cuda = SimpleNamespace(
            get_device_properties=lambda *_: properties,
            get_device_capability=lambda *_: (9, 0),
            current_device=lambda: 0,
            current_stream=lambda *_: None,
            synchronize=lambda *_: None,
            device=lambda *_: _nothing(),
            is_available=lambda: True,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def empty(self, *args: Any, **kwargs: Any) -> Any:
        return self._real.empty(*args, **{**kwargs, "device": "cpu"})


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _poisoned(tensor: Any) -> Any:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(0x5A)


def poisoning() -> AbstractContextManager[Any]:
    """While it lasts, tensors of this thread that torch would leave uninitialised are poisoned: `new_empty`, `empty_like`, ...

    What stands in such memory differs from run to run, so that a kernel that reads it would fail now and then.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    makers = {
        torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided,
    }  # fmt: skip

    class Poisoning(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            return _poisoned(made) if func in makers else made

    return Poisoning()


@lru_cache(maxsize=64)
def _code(text: str, file: str) -> CodeType:
    """A kernel is run again and again, and compiling its file takes as long as running a small one."""
    return compile(text, file, "exec")


class Loaded:
    """An executed kernel file.

    Attributes:
        namespace: its globals.
        file: the name its code objects carry, for reports.
    """

    def __init__(self, text: str, shown: str, processors: int) -> None:
        # One name for each text: two mutants of a file are told apart, and what is compiled is compiled once.
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.file = f"<flashgen simulation {digest}: {shown}>"
        sites.register(self.file, shown, text)
        known = api.modules()
        torch = _Torch(processors)

        def simulated_import(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            root = name.partition(".")[0]
            if level or root not in ("triton", "torch"):
                return builtins.__import__(name, globals, locals, fromlist or (), level)
            if root == "torch":
                return torch if name == "torch" or not fromlist else builtins.__import__(name, None, None, fromlist)
            module = known.get(name)
            if module is None:
                raise ModuleNotFoundError(f"{name} is not simulated; known are {', '.join(sorted(known))}", name=name)
            return module if fromlist else known["triton"]

        own = {**vars(builtins), "__import__": simulated_import, "range": device_range}
        self.namespace: dict[str, Any] = {"__name__": "simulated_kernel", "__file__": shown, "__builtins__": own}
        try:
            exec(_code(text, self.file), self.namespace)
        except SimulationError:
            self.close()
            raise
        except Exception as error:
            site = sites.innermost(error).site()
            kind = UnsupportedOperationError if isinstance(error, ImportError) else KernelPythonError
            self.close()
            raise kind(
                f"the file does not load: {type(error).__name__}: {error}\n    at {site}", sites=(site,)
            ) from error

    def close(self) -> None:
        sites.forget(self.file)
