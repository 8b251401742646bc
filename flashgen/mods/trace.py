"""Trace: a user's function runs once, on stand-ins for its arguments, and what it does becomes a graph.

The stand-ins are tensors without memory. A function mode sees the calls that PyTorch would answer in Python (indexing, reading a
value), a dispatch mode the operators that everything else comes down to, whatever a function is called in Python.
Captured tensors are only named, never read, so one trace serves every content.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashgen.errors import FlashgenError, InvalidProblemError, UnsupportedProblemError
from flashgen.mods import arrays, aten
from flashgen.mods.arrays import Array
from flashgen.mods.captures import Captures
from flashgen.mods.graph import INDICES, Graph, Node
from flashgen.stream_capture import apart

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

_SUPPORTED = (
    "Supported: arithmetic, comparisons, logic, bit operations, shifts, integer // and %, where, min/max/clamp, abs, sign, "
    "floor/ceil/round, exp/log/log2/exp2/sqrt/rsqrt/pow, tanh/sigmoid/sin/cos/erf, activations (silu, gelu, softplus, ...), casts, "
    "captured tensors indexed by integers, and sum/mean/any/all/dot of up to 64 of their elements. "
    "backend='torch' runs any function."
)
_APPLY: Any = torch.autograd.Function.apply
_APPLY = _APPLY.__func__.__code__
_READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__complex__"}
_READS |= {"__contains__", "data_ptr"}
_PLACES = {"storage_offset", "untyped_storage", "_typed_storage", "storage"}
_STEPS = {"stride", "is_contiguous"}
_SIZES = {"size", "dim", "ndimension", "numel", "nelement", "__len__", "shape", "ndim"}
_SHOWS = {"__repr__", "__format__", "__str__"}
_CREATORS = {"full", "zeros", "ones", "scalar_tensor", "arange", "eye", "linspace", "lift_fresh"}


@dataclass(frozen=True, slots=True)
class Site:
    """A line of the user's source."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def trace(
    function: Callable[..., Any],
    kind: str,
    graph: Graph,
    captures: Captures,
    sites: dict[int, Site] | None = None,
    per_score: set[str] | None = None,
    sized: set[str] | None = None,
) -> Node:
    """Run a mod once and keep what it computes.

    Args:
        function: FlexAttention's score_mod(score, b, h, q_idx, kv_idx) or mask_mod(b, h, q_idx, kv_idx).
        kind: `score_mod`, or the mask's name as the user knows it, e.g. `block_mask.mask_mod`.
        graph: makes the nodes.
        captures: collects captured tensors.
        sites: filled with the line of each load, by id of its node.
        per_score: takes the kind of a function that is right for 0-d arguments alone (`table[b][q_idx]`, a sum): on whole blocks it
            would index, or sum over, their dimensions.
        sized: takes the kind of a function that asks an argument for its dimensions, of which it has none here and four on blocks.

    Returns:
        The result's node: fp32 of a score_mod, bool of a mask_mod.

    Raises:
        UnsupportedProblemError: an operation that kernels do not have; names it and the user's line.
        InvalidProblemError: the function raises, depends on a value in Python (`if q_idx > 3`), writes into what it
            captures, or returns something else than one number (score_mod) or one bool (mask_mod).
    """
    scores = kind.rpartition(".")[2] == "score_mod"
    inputs = [graph.input(name) for name in (("score", *INDICES) if scores else INDICES)]
    tracer = _Tracer(kind, graph, captures, sites if sites is not None else {})
    arguments = [tracer.stand_in(arrays.of_node(node)) for node in inputs]
    with torch.enable_grad(), tracer.dispatch, tracer:  # so that a `no_grad` of the function's own is seen
        try:
            result = function(*arguments)
        except FlashgenError:
            if tracer.per_score and per_score is not None:
                per_score.add(kind)
            raise
        except Exception as error:
            where = _site_of(error)
            raise InvalidProblemError(
                f"{kind} raises {type(error).__name__}: {error}{f' ({where})' if where else ''}. It is called once with 0-d "
                f"tensors ({', '.join(str(node) for node in inputs)}), indices int32."
            ) from error
        if tracer.per_score and per_score is not None:
            per_score.add(kind)
        if tracer.sized and sized is not None:
            sized.add(kind)
        return _result(tracer, result, function)


def _result(tracer: _Tracer, result: Any, function: Callable[..., Any]) -> Node:
    kind, graph = tracer.kind, tracer.graph
    scores = kind.rpartition(".")[2] == "score_mod"
    code = getattr(function, "__code__", None)
    where = f" ({Site(code.co_filename, code.co_firstlineno)})" if code is not None else ""
    if not isinstance(result, Tensor):
        raise InvalidProblemError(
            f"{kind}{where} returns a {type(result).__name__}: it must return a torch.Tensor, one value per score."
        )
    array = tracer.array(result)
    if array.shape != ():
        raise InvalidProblemError(
            f"{kind}{where} returns shape {array.shape} for 0-d arguments: it must return one value per score, shape (). "
            "Index what it captures with b, h, q_idx, kv_idx."
        )
    if scores and array.dtype == "bool":
        raise InvalidProblemError(
            f"{kind}{where} returns torch.bool: it must return the new scores, numbers that fp32 can hold. A condition belongs "
            "into `mask_mod`."
        )
    if not scores and array.dtype != "bool":
        raise InvalidProblemError(
            f"{kind}{where} returns torch.{array.dtype}: it must return torch.bool, True = may attend. Numbers to add belong "
            "into `score_mod` or `bias`."
        )
    return graph.cast(array.node, "float32" if scores else "bool")


class _StandIn(Tensor):
    """A tensor without memory that carries a lazy array."""

    array: Array
    shares = False  # whether it is a view, or one was made of it: both would see what is written into one
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    def shown(self) -> str:
        """For a `print` of the function's own: it is traced once, so that there is no value to show."""
        shown = f", shape={self.array.shape}" if self.array.shape else ""
        return f"traced({self.array.node if not shown else '...'}, torch.{self.array.dtype}{shown})"

    @staticmethod
    def __new__(cls, array: Array, device: torch.device) -> _StandIn:
        made = Tensor._make_wrapper_subclass(cls, array.shape, dtype=aten.TORCH[array.dtype], device=device)
        made.array = array
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise InvalidProblemError(
            f"{func} is called on a stand-in after the mod was traced: it must not keep its arguments."
        )


class _Tracer(TorchFunctionMode):
    """What PyTorch asks while the function runs."""

    def __init__(self, kind: str, graph: Graph, captures: Captures, sites: dict[int, Site]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind, self.graph, self.captures, self.sites = kind, graph, captures, sites
        self.device = captures._device
        self.per_score = self.sized = False
        self.dispatch = _Dispatch(self)
        self._made: dict[int, tuple[Tensor, Array]] = {}  # tensors that the function made; held, since ids are reused

    def stand_in(self, array: Array) -> _StandIn:
        # A single value becomes its node at once: on the user's line, and only once however often it is used.
        return _StandIn(array if array.shape else arrays.of_node(array.node, varies=array.varies), self.device)

    def array(self, tensor: Tensor) -> Array:
        """What a tensor is to the graph: a stand-in's array, a number the function made, or a captured tensor."""
        if isinstance(tensor, _StandIn):
            return tensor.array
        known = self._made.get(id(tensor))
        if known is not None:
            return known[1]
        try:
            number = self.captures.number(tensor)
        except InvalidProblemError as error:
            raise InvalidProblemError(f"{self.kind} ({self.here()}): {error}") from None
        return self._read(number)

    def arrays_in(self, arg: Any) -> Any:
        """An operator's argument with arrays in the place of tensors, of a list of them, too."""
        if isinstance(arg, (list, tuple)) and any(isinstance(one, Tensor) for one in arg):
            return [self.array(one) if isinstance(one, Tensor) else one for one in arg]
        return self.array(arg) if isinstance(arg, Tensor) else arg

    def made(self, tensor: Tensor) -> Tensor:
        """Note a tensor that the function made from numbers."""
        dtype = aten.DTYPES.get(tensor.dtype)
        if dtype is None:
            raise self.unsupported(f"a tensor of {tensor.dtype}")
        if tensor.dim() == 0:
            array = arrays.filled(self.graph, (), tensor.item(), dtype)
        else:
            with apart(self.device):
                moved = tensor.to(self.device)
            array = self._read(self.captures.number(moved, constant=True))
        self._made[id(tensor)] = (tensor, array)
        return tensor

    def note_shape(self, array: Array) -> None:
        """Dimensions of what depends on an argument are looked at: on whole blocks they come after those of the block.

        A single value has none: who looks for them in a score means other scores, and is refused where that shows.
        """
        zero = self.graph.const(0, "int32")
        if array.shape and array.varies and 0 not in array.shape and array.element((zero,) * len(array.shape)).depends:
            self.per_score = True

    def note_view(self, base: Tensor, view: _StandIn) -> None:
        """One memory under two names: the graph keeps values, so neither may be written into any more."""
        view.shares = True
        if isinstance(base, _StandIn):
            base.shares = True

    def recorded(self, result: Array) -> Array:
        """The result of an operator, as one without gradient inside of `torch.no_grad()`."""
        if not torch.is_grad_enabled() and self.kind.rpartition(".")[2] == "score_mod":
            self._refuse_own_backward()
        return result if torch.is_grad_enabled() else aten.detached(self.graph, result)

    def _refuse_own_backward(self) -> None:
        """A `torch.autograd.Function` runs its forward without gradients and brings its own: a trace would lose it."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not trace.__code__:
            if frame.f_code is _APPLY:
                name = getattr(frame.f_locals.get("cls"), "__name__", "")
                raise self.unsupported(f"the torch.autograd.Function {name}, whose backward is its own,")
            frame = frame.f_back

    def _read(self, number: int) -> Array:
        row = self.captures.rows[number]
        base = arrays.captured(self.graph, number, row.shape, row.dtype)

        def element(index: arrays.Index) -> Node:
            node = base.element(index)
            self.sites.setdefault(id(node), self.here())
            return node

        return Array(base.shape, base.dtype, element, base.varies)

    def here(self) -> Site:
        """The user's line that is running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith((*_NOT_THE_USERS, "<")):
            frame = frame.f_back
        return Site(frame.f_code.co_filename, frame.f_lineno) if frame else Site("?", 0)

    def unsupported(self, what: str) -> UnsupportedProblemError:
        return UnsupportedProblemError(
            f"{self.kind} uses {what} at {self.here()}, which generated kernels do not have. {_SUPPORTED}"
        )

    def depends_on_value(self, what: str) -> InvalidProblemError:
        return InvalidProblemError(
            f"{self.kind} reads the value of a tensor in Python ({what}) at {self.here()}: it is traced once for all "
            "scores, so it cannot branch on data. Use torch.where for `if`, & | ~ for and/or/not, // for int()."
        )

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SHOWS and args and isinstance(args[0], _StandIn):
            return args[0].shown()
        if func is Tensor.__getitem__:
            return self._getitem(*args)
        if name == "__setitem__":
            raise self.unsupported("an assignment to elements of a tensor")
        if args and (name in _PLACES or (name in _STEPS and isinstance(args[0], _StandIn) and args[0].array.shape)):
            # A trace is kept for all tensors of a shape and its strides, wherever they lie; a view of one has no memory here.
            raise self.unsupported(f"where a captured tensor lies in memory ({name}())")
        read = getattr(func.__self__, "__name__", "") if name == "__get__" else name  # `shape` is a property
        if read in _SIZES and args and isinstance(args[0], _StandIn):
            self.note_shape(args[0].array)
            self.sized |= not args[0].array.shape
        if name in _READS and args and isinstance(args[0], Tensor) and id(args[0]) not in self._made:
            raise self.depends_on_value("`if`, `and`, `or`, `not`" if name == "__bool__" else name.strip("_") + "()")
        return func(*args, **(kwargs or {}))

    def _getitem(self, tensor: Tensor, index: Any) -> Tensor:
        array = self.array(tensor)
        self.note_shape(array)
        parts = index if isinstance(index, tuple) else (index,)
        try:
            seen = tuple(self.array(part) if isinstance(part, Tensor) else part for part in parts)
            result = self.stand_in(self.recorded(arrays.indexed(self.graph, array, seen)))
            if not any(isinstance(part, Tensor) for part in parts):
                self.note_view(tensor, result)
            return result
        except TypeError as error:
            raise self.unsupported(str(error)) from None


class _Dispatch(TorchDispatchMode):
    """The operators that the function comes down to."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would wrap the method below in torch._dynamo.disable, whose import takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        tracer, kwargs = self._tracer, kwargs or {}
        tensors = [one for arg in (*args, *kwargs.values()) for one in _tensors_in(arg)]
        name = func._schema.name.partition("::")[2]
        if name in _CREATORS and (not tensors or name == "lift_fresh"):
            return tracer.made(func(*args, **kwargs))
        if not tensors:
            raise tracer.unsupported(str(func))
        if name == "_local_scalar_dense":
            made = tracer._made.get(id(tensors[0]))
            if made is not None:
                return func(*args, **kwargs)
            raise tracer.depends_on_value("item()")
        in_place = name.endswith("_") and not name.startswith("__")
        if in_place and not isinstance(args[0], _StandIn):
            raise InvalidProblemError(
                f"{tracer.kind} writes into a tensor that it captures ({func}) at {tracer.here()}."
            )
        seen = [tracer.arrays_in(arg) for arg in args]
        named = {key: tracer.arrays_in(arg) for key, arg in kwargs.items()}
        for array in aten.read_as_a_whole(func, seen):
            tracer.note_shape(array)
        try:
            result = tracer.recorded(aten.translate(tracer.graph, func, seen, named))
        except aten.NotInTableError as error:
            for array in seen:  # it may look at their dimensions
                if isinstance(array, Array) and array.shape:
                    tracer.note_shape(array)
            raise tracer.unsupported(f"{func} {error}".rstrip()) from None
        in_place = name.endswith("_") and not name.startswith("__")
        if not in_place:
            stand_in = tracer.stand_in(result)
            if aten.is_view(func):
                tracer.note_view(tensors[0], stand_in)
            return stand_in
        target = args[0]
        if not isinstance(target, _StandIn):
            raise InvalidProblemError(
                f"{tracer.kind} writes into a tensor that it captures ({func}) at {tracer.here()}."
            )
        if target.shares:
            raise tracer.unsupported(f"{func} on a view, or on a tensor that has one,")
        target.array = result
        return target


def _tensors_in(arg: Any) -> list[Tensor]:
    if isinstance(arg, (list, tuple)):
        return [one for one in arg if isinstance(one, Tensor)]
    return [arg] if isinstance(arg, Tensor) else []


def _site_of(error: BaseException) -> Site | None:
    """The user's line that raised."""
    found, step = None, error.__traceback__
    while step is not None:
        if not step.tb_frame.f_code.co_filename.startswith((*_NOT_THE_USERS, "<")):
            found = Site(step.tb_frame.f_code.co_filename, step.tb_lineno)
        step = step.tb_next
    return found
