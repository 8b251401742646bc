"""Launches that differ in addresses alone, replayed: what a rendered `launch` gave the driver once, with the addresses of today.

A rendered `launch` works out grids, strides and TMA descriptors in Python, and Triton's launcher unpacks and checks them: more time than a small
problem's kernels take. For calls of one kind the outcome is the same but for where tensors lie. So one launch is watched: every operator of
PyTorch that it calls, and what it hands Triton's compiled launcher. Where each address is known to be that of an input, of memory that the launch
allocated, or of its stream's counter, the next launches hand the launcher the same with their own addresses. Anything else (a tensor that was
computed or copied, zeros, a number from the device, a launcher that looks different inside) is launched as ever.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashgen import launches

_TRIES = 2  # launches of a kind that are watched in vain
_MOST_MAPS = 1024  # addresses that a TMA descriptor is kept for
_ONE_PIECE = (
    1 << 20
)  # bytes of scratch memory up to which one allocation is carved up: a larger one may find no room where several do
_ALIGNMENT = 512  # PyTorch's allocator gives no less

_aten: Any = torch.ops.aten
_ALLOCATES = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_strided.default, _aten.empty_like.default}
_VIEWS = {
    _aten.slice.Tensor, _aten.select.int, _aten.unbind.int, _aten.transpose.int, _aten.view.default, _aten.alias.default,
    _aten.detach.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.permute.default, _aten.expand.default,
}  # fmt: skip


class _Watcher(TorchDispatchMode):
    """Watches one launch: where each tensor's memory comes from, and what Triton's launchers are given."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, tuple[Any, ...]]] = []
        self.roots: list[Any] = []  # an input's place, an allocation's bytes or whose counter it is
        self.memory: list[range] = []  # of each root
        self.found: dict[
            int, tuple[int, int, Tensor]
        ] = {}  # id -> its root, bytes behind that one's start; keeps the id
        self.refused = False
        for place, x in enumerate(inputs):
            self.knows(x, ("input", place))

    def knows(self, x: Tensor, what: Any) -> None:
        """A tensor whose memory comes from somewhere that is known."""
        self.found[id(x)] = (len(self.roots), 0, x)
        self.roots.append(what)
        self.memory.append(range(x.data_ptr(), x.data_ptr() + max(1, x.untyped_storage().nbytes())))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would wrap the method below in torch._dynamo.disable, whose import takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note where its result's memory comes from."""
        result = func(*args, **(kwargs or {}))
        if launches.thread.watcher is not self:  # inside what knows by itself
            return result
        results = result if isinstance(result, (tuple, list)) else [result]
        if all(isinstance(x, Tensor) and not x.numel() for x in results):
            return result  # nothing was computed or written; a kernel that gets it gets what is not known
        if func in _ALLOCATES:
            self.knows(result, ("scratch", result.untyped_storage().nbytes(), result.device))
        elif func in _VIEWS and id(args[0]) in self.found:
            root, start, base = self.found[id(args[0])]
            for x in results:
                self.found[id(x)] = (root, start + x.data_ptr() - base.data_ptr(), x)
        else:
            self.refused = True
        return result


class _Unknown(Exception):
    """A launch cannot be replayed."""


# -- what is replayed --


class _At:
    """Stands in a descriptor for the tensor at an address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        """The address."""
        return self.address


_STREAM = object()  # in the place of the stream


class _Step:
    """One kernel's launch: what Triton's compiled launcher is given, and where addresses stand in it.

    Args:
        launcher: Triton's, of the kernel.
        arguments: what it was given.
        watcher: knows the addresses.

    Raises:
        _Unknown: something in it is neither constant nor an address that is known.
    """

    def __init__(self, launcher: Any, arguments: tuple[Any, ...], watcher: _Watcher) -> None:
        if getattr(launcher, "global_scratch_size", 1) or getattr(launcher, "profile_scratch_size", 1):
            raise _Unknown("Triton allocates memory for it")
        if getattr(launcher, "gsan_enabled", False):
            raise _Unknown("it is checked by Triton's sanitizer")
        x, y, z, _, function, packed, _, enter, leave, *given = arguments
        if not (_silent(enter) and _silent(leave)):
            raise _Unknown("somebody listens")
        self._launcher = launcher
        self._before = (x, y, z, _STREAM, function, packed, None, None, None)
        self._bases: list[tuple[int, int]] = []  # of each descriptor: its root, bytes behind its start
        self._given: list[Any] = []
        for x in given:
            if hasattr(x, "base") and hasattr(x, "block_shape"):
                root, start, _ = watcher.found.get(id(x.base)) or _refuse("a descriptor of a tensor that is not known")
                self._bases.append((root, start))
                x = _moved(x, x.base.data_ptr())
            self._given.append(x)
        self._last, values = self._final(self._given)
        self._maps: list[tuple[int, int, int, dict[int, Any], int]] = []
        self._addresses: list[tuple[int, int, int]] = []
        nested = [at for at, value in enumerate(values) if isinstance(value, (tuple, list)) and _has_addresses(value)]
        if len(nested) > 1:
            raise _Unknown("more than one list of arguments")
        self._nested = nested[0] if nested else None
        inner, outer = (values, []) if self._nested is None else (values[self._nested], values)
        self._outer = [None if at == self._nested else self._constant(value, watcher) for at, value in enumerate(outer)]
        self._inner = [self._slot(at, value, watcher) for at, value in enumerate(inner)]
        self._given = [None if isinstance(x, Tensor) else x for x in self._given]  # nobody's tensors are kept
        if not any(x is _STREAM for x in (self._outer or self._inner)) or len(self._maps) != len(self._bases):
            raise _Unknown("a launcher that looks different inside")

    def _final(self, given: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
        """Triton's compiled launcher, and what its Python hands it."""
        caught: list[Any] = []

        def catch(*values: Any) -> None:
            caught.append(list(values))

        probe = copy.copy(self._launcher)
        launch = getattr(probe, "launch", None)
        last = launch
        if isinstance(launch, FunctionType) and "launcher" in launch.__code__.co_freevars and launch.__closure__:
            cells = dict(zip(launch.__code__.co_freevars, launch.__closure__, strict=True))
            last = cells["launcher"].cell_contents
            cells["launcher"] = CellType(catch)
            probe.launch = FunctionType(
                launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, tuple(cells.values())
            )
        else:
            probe.launch = catch
        if last is None or isinstance(last, FunctionType):  # Python that may do anything
            raise _Unknown("a launcher that looks different inside")
        probe(*self._before, *given)
        return last, caught[0]

    def _constant(self, value: Any, watcher: _Watcher) -> Any:
        if value is _STREAM:
            return value  # its place is known once all are seen
        inside = type(value) is int and value > 1 << 16 and any(value in memory for memory in watcher.memory)
        if inside or isinstance(value, Tensor) or _is_map(value):
            raise _Unknown("an address in a place of its own")
        return value

    def _slot(self, at: int, value: Any, watcher: _Watcher) -> Any:
        if isinstance(value, Tensor):
            root, start, _ = watcher.found.get(id(value)) or _refuse("a tensor that is not known")
            self._addresses.append((at, root, start))
            return 0
        if _is_map(value):
            number = len(self._maps)
            root, start = self._bases[number]
            self._maps.append((at, root, start, {}, number))
            return None
        return self._constant(value, watcher)

    def bound(self) -> Callable[[list[int], int], None]:
        """What launches, given all roots' addresses and the stream."""
        outer, inner, nested, last = self._outer, self._inner, self._nested, self._last
        addresses, maps, made = tuple(self._addresses), tuple(self._maps), self._map
        stream_at = [x is _STREAM for x in outer or inner].index(True)

        def launch(places: list[int], stream: int) -> None:
            values = inner.copy()
            for at, root, start in addresses:
                values[at] = places[root] + start
            for at, root, start, known, number in maps:
                place = places[root] + start
                values[at] = known.get(place) or made(place, known, number)
            if nested is None:
                values[stream_at] = stream
                last(*values)
            else:
                whole = outer.copy()
                whole[stream_at] = stream
                whole[nested] = values
                last(*whole)

        return launch

    def _map(self, place: int, known: dict[int, Any], number: int) -> Any:
        """A TMA descriptor of an address that is new."""
        given, at = self._given.copy(), -1
        for position, x in enumerate(given):
            if hasattr(x, "block_shape"):
                at += 1
                if at == number:
                    given[position] = _moved(x, place)
        _, values = self._final(given)
        made = (values if self._nested is None else values[self._nested])[self._maps[number][0]]
        if len(known) >= _MOST_MAPS:
            known.clear()
        known[place] = made
        return made


def _counter(counters: launches.Counters, device: torch.device, stream: int) -> Tensor:
    """What a rendered file's `ticket_counter` gives, where the current stream is known."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return counters.real(device)  # type: ignore[no-any-return]
    found = counters.known.get((device.index, stream))
    if found is None:
        found = counters.known[device.index, stream] = counters.real(device)
    return found  # type: ignore[no-any-return]


def _refuse(what: str) -> NoReturn:
    raise _Unknown(what)


def _silent(hook: Any) -> bool:
    """Whether a hook of Triton's is nobody's."""
    return hook is None or not getattr(hook, "calls", True)


def _is_map(value: Any) -> bool:
    return type(value).__name__ == "PyCUtensorMap"


def _has_addresses(values: Any) -> bool:
    return any(isinstance(x, Tensor) or _is_map(x) for x in values)


def _moved(descriptor: Any, address: int) -> Any:
    """A descriptor of the same at another address; the checks are those of the first."""
    moved = copy.copy(descriptor)
    vars(moved).update(base=_At(address))
    return moved


def _bound(watcher: _Watcher, inputs: int, device: torch.device) -> Callable[[list[int]], bool]:
    """What replays a launch that was watched.

    Raises:
        _Unknown: it cannot be replayed.
    """
    if watcher.refused or not watcher.steps:
        raise _Unknown("operators that compute, or no kernel at all")
    from triton import knobs
    from triton.runtime.driver import driver as drivers

    steps = tuple(_Step(*step, watcher).bound() for step in watcher.steps)
    runtime, active = knobs.runtime, drivers.active
    index, stream_of = active.get_current_device(), active.get_current_stream
    sizes: list[int] = []
    rest: list[
        tuple[Any, int, int]
    ] = []  # of each root behind the inputs: whose counter, or in which allocation and where
    total = sum(
        -(-what[1] // _ALIGNMENT) * _ALIGNMENT
        for what in watcher.roots
        if isinstance(what, tuple) and what[0] == "scratch"
    )
    for what in watcher.roots[inputs:]:
        if isinstance(what, launches.Counters):
            rest.append((what, 0, 0))
        elif what[2] != device:
            raise _Unknown("memory of another device")
        elif total > _ONE_PIECE or not sizes:
            rest.append((None, len(sizes), 0))
            sizes.append(what[1])
        else:
            start = -(-sizes[0] // _ALIGNMENT) * _ALIGNMENT
            rest.append((None, 0, start))
            sizes[0] = start + what[1]
    empty, byte = torch.empty, torch.uint8

    def replay(places: list[int]) -> bool:
        if not (_silent(runtime.launch_enter_hook) and _silent(runtime.launch_exit_hook)):
            return False
        stream = stream_of(index)
        if rest:
            held = [empty(size, dtype=byte, device=device) for size in sizes]
            starts = [x.data_ptr() for x in held]
            for counters, number, start in rest:
                if counters is None:
                    places.append(starts[number] + start)
                else:
                    held.append(_counter(counters, device, stream))
                    places.append(held[-1].data_ptr())
        for step in steps:
            step(places, stream)
        return True

    return replay


class Kind:
    """Launches of one rendered `launch` that differ in addresses alone.

    Args:
        launch: the rendered function.
        fixed: what it is given by name each time.

    Attributes:
        replay: given the addresses of all tensors that are given, in their order, launches; False where it cannot just now. None
            until it is known how.
    """

    def __init__(self, launch: Callable[..., None], fixed: dict[str, Any]) -> None:
        self.replay: Callable[[list[int]], bool] | None = None
        self._launch, self._fixed = launch, fixed
        self._kernels, self._tries = launches.Kernels(), 0

    def __call__(self, tensors: Sequence[Tensor | None], named: dict[str, Tensor | None] | None = None) -> None:
        """Launch as ever, and find out how to replay it.

        Args:
            tensors: given by position.
            named: given by name.
        """
        values = {**self._fixed, **(named or {})}
        kernels, launch = self._kernels, self._launch
        watch = kernels.found is not None and self._tries < _TRIES and self.replay is None
        if not watch or torch._C._len_torch_dispatch_stack() or launches.thread.watcher is not None:
            launches.launched(kernels, launch, *tensors, **values)
            return
        self._tries += 1
        apart = _Apart()  # one tensor in two places: each is somebody else's in another launch
        tensors, values = [apart(x) for x in tensors], {name: apart(x) for name, x in values.items()}
        launches.thread.watcher = watcher = _Watcher(apart.seen)
        try:
            with watcher:
                launches.launched(kernels, launch, *tensors, **values)
        finally:
            launches.thread.watcher = None
        with contextlib.suppress(Exception):  # whatever another Triton's launcher makes of it: launched as ever
            self.replay = _bound(watcher, len(apart.seen), apart.seen[0].device)


class _Apart:
    """Tensors of a launch, each an object of its own."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        self.seen.append(x.detach() if any(x is other for other in self.seen) else x)
        return self.seen[-1]
