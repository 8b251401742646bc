"""FlashAttention 3 as a contestant beside PyTorch, from a shared library that was built for JAX.

    python benchmarks/hopper_forward.py --fa3-library DIR/dew_flash_attn/libdew_flash_attn3.so --csv FILE
    python benchmarks/hopper_backward.py --fa3-library DIR/dew_flash_attn/libdew_flash_attn3.so --csv FILE

No wheel of FlashAttention 3 fits this torch and comes from a package index; `dew-flash-attn-cu13` (0.3.6) holds Dao-AILab's Hopper kernels, unchanged in
the dense case, for head dims 64, 128, 192 and 256, in one library without a Python ABI. Its entry points are handlers of XLA's FFI, a stable C interface
(`xla/ffi/api/c_api.h`, shipped in jaxlib): a call frame with buffers and attributes, and a table of functions for the stream, scratch memory and errors.
Both are made here by ctypes, so JAX takes no part: the kernels run on PyTorch's stream, on PyTorch's memory, in turns with everybody else's.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, addressof, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p, cast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgen.peers.base import BenchOp, Peer, bottom_right_only
from flashgen.problem import Problem

# -- the structures of xla/ffi/api/c_api.h, version 0.4 --

_VERSION = (0, 4)
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_BUFFER, _SCALAR = 1, 3  # XLA_FFI_ArgType_BUFFER and XLA_FFI_RetType_BUFFER; XLA_FFI_AttrType_SCALAR
_DTYPES = {torch.float16: 10, torch.float32: 11, torch.bfloat16: 16}
_SCALARS: dict[type, tuple[int, Any]] = {bool: (1, ctypes.c_bool), int: (5, c_int64), float: (12, ctypes.c_double)}
_Function = CFUNCTYPE(c_void_p, c_void_p)
_FUNCTIONS = (
    "Error_Create", "Error_GetDetails", "Error_Destroy", "Handler_Register", "Stream_Get", "Type_Register", "InvokeContext_Get", "State_Set",
    "State_Get", "DeviceMemory_Allocate", "DeviceMemory_Free", "ThreadPool_Schedule", "ThreadPool_NumThreads", "Future_Create",
    "Future_SetAvailable", "Future_SetError", "RunId_Get", "DeviceOrdinal_Get", "InvokeContext_FindExtension",
)  # fmt: skip


def _struct(name: str, *fields: tuple[str, Any]) -> Any:
    return type(name, (Structure,), {"_fields_": [*fields]})


def _sized(name: str, *fields: tuple[str, Any]) -> Any:
    """A structure that begins with its own size, as all that cross the interface do."""
    return _struct(name, ("struct_size", c_size_t), ("extension_start", c_void_p), *fields)


_Version = _sized("Version", ("major", c_int), ("minor", c_int))
_Api = _sized("Api", ("version", _Version), ("internal", c_void_p), *((name, _Function) for name in _FUNCTIONS))
_Buffer = _sized("Buffer", ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64)))
_Span = _struct("Span", ("ptr", c_char_p), ("len", c_size_t))
_Scalar = _struct("Scalar", ("dtype", c_int), ("value", c_void_p))
_Buffers = _sized("Buffers", ("size", c_int64), ("types", POINTER(c_int)), ("items", POINTER(c_void_p)))
_Attributes = _sized("Attributes", ("size", c_int64), ("types", POINTER(c_int)), ("names", POINTER(POINTER(_Span))), ("items", POINTER(c_void_p)))  # fmt: skip
_Frame = _sized(
    "Frame", ("api", POINTER(_Api)), ("ctx", c_void_p), ("stage", c_int), ("args", _Buffers), ("rets", _Buffers), ("attrs", _Attributes), ("future", c_void_p)
)  # fmt: skip
_FRAME_SIZE = _Frame.attrs.offset + _Frame.attrs.size  # the interface does not count `future`
_ErrorArgs = _sized("ErrorArgs", ("message", c_char_p), ("code", c_int))
_DetailsArgs = _sized("DetailsArgs", ("error", c_void_p), ("message", c_char_p), ("code", c_int))
_StreamArgs = _sized("StreamArgs", ("ctx", c_void_p), ("stream", c_void_p))
_OrdinalArgs = _sized("OrdinalArgs", ("ctx", c_void_p), ("ordinal", c_int32))
_AllocateArgs = _sized("AllocateArgs", ("ctx", c_void_p), ("size", c_size_t), ("alignment", c_size_t), ("data", c_void_p))  # fmt: skip
_FreeArgs = _sized("FreeArgs", ("ctx", c_void_p), ("size", c_size_t), ("data", c_void_p))


def _args(kind: Any, pointer: int) -> Any:
    return cast(pointer, POINTER(kind)).contents


class Handlers:
    """A library's handlers, called on the current stream of one device.

    Args:
        path: of the library.
        device: whose memory and stream; "cpu" for a library that launches nothing.
    """

    def __init__(self, path: Path, device: str) -> None:
        self._device = torch.device(device)
        self._library = ctypes.CDLL(str(path))
        self._lock = threading.Lock()
        self._scratch: dict[int, Tensor] = {}
        self._errors: list[bytes] = []
        self._api = _Api(struct_size=ctypes.sizeof(_Api))
        self._api.version = _Version(struct_size=ctypes.sizeof(_Version), major=_VERSION[0], minor=_VERSION[1])
        own: dict[str, Callable[[int], int | None]] = {
            "Error_Create": self._error_create,
            "Error_GetDetails": self._error_details,
            "Error_Destroy": lambda _: None,
            "Stream_Get": self._stream,
            "DeviceOrdinal_Get": self._ordinal,
            "DeviceMemory_Allocate": self._allocate,
            "DeviceMemory_Free": self._free,
        }
        self._functions = {name: _Function(own.get(name, self._refuse(name))) for name in _FUNCTIONS}
        for name, function in self._functions.items():
            setattr(self._api, name, function)

    def call(self, name: str, arguments: Sequence[Tensor], results: Sequence[Tensor], **attributes: Any) -> None:
        """Run one handler.

        Raises:
            RuntimeError: the handler says what is wrong.
        """
        handler = getattr(self._library, name)
        handler.restype, handler.argtypes = c_void_p, [c_void_p]
        keep: list[Any] = []
        frame = _Frame(
            struct_size=_FRAME_SIZE,
            api=ctypes.pointer(self._api),
            stage=_EXECUTE,
            args=self._buffers(arguments, keep),
            rets=self._buffers(results, keep),
            attrs=self._attributes(attributes, keep),
        )
        with self._lock:
            error = handler(addressof(frame))
            self._scratch.clear()  # PyTorch's allocator hands it out again on the same stream only
            said, self._errors = self._errors, []
        if error is not None:
            raise RuntimeError(f"{name}: {b'; '.join(said).decode(errors='replace') or 'failed'}")

    def _buffers(self, tensors: Sequence[Tensor], keep: list[Any]) -> Any:
        made = []
        for x in tensors:
            assert x.is_contiguous()
            dims = (c_int64 * x.dim())(*x.shape)
            made.append(_Buffer(struct_size=ctypes.sizeof(_Buffer), dtype=_DTYPES[x.dtype], data=x.data_ptr(), rank=x.dim(), dims=dims))  # fmt: skip
        types, items = (c_int * len(made))(*[_BUFFER] * len(made)), (c_void_p * len(made))(*map(addressof, made))
        keep += [made, types, items]
        return _Buffers(struct_size=ctypes.sizeof(_Buffers), size=len(made), types=types, items=items)

    def _attributes(self, attributes: dict[str, Any], keep: list[Any]) -> Any:
        spans, scalars = [], []
        for name, value in sorted(attributes.items()):  # handlers search them by name
            dtype, kind = _SCALARS[type(value)]
            number = kind(value)
            spans.append(ctypes.pointer(_Span(name.encode(), len(name))))
            scalars.append(_Scalar(dtype, addressof(number)))
            keep.append(number)
        count = len(spans)
        types, names = (c_int * count)(*[_SCALAR] * count), (POINTER(_Span) * count)(*spans)
        items = (c_void_p * count)(*map(addressof, scalars))
        keep += [spans, scalars, types, names, items]
        return _Attributes(struct_size=ctypes.sizeof(_Attributes), size=count, types=types, names=names, items=items)

    # -- what a handler calls; an exception must not leave them, and a result that is not None is an error --

    def _fail(self, message: bytes) -> int:
        self._errors.append(message)
        return len(self._errors)

    def _refuse(self, name: str) -> Callable[[int], int]:
        return lambda _: self._fail(f"{name} is not there outside of JAX".encode())

    def _error_create(self, pointer: int) -> int:
        return self._fail(_args(_ErrorArgs, pointer).message or b"")

    def _error_details(self, pointer: int) -> None:
        args = _args(_DetailsArgs, pointer)
        args.message, args.code = self._errors[args.error - 1], 13  # INTERNAL

    def _stream(self, pointer: int) -> None:
        on_gpu = self._device.type == "cuda"
        _args(_StreamArgs, pointer).stream = torch.cuda.current_stream(self._device).cuda_stream if on_gpu else None

    def _ordinal(self, pointer: int) -> None:
        _args(_OrdinalArgs, pointer).ordinal = self._device.index or 0

    def _allocate(self, pointer: int) -> int | None:
        args = _args(_AllocateArgs, pointer)
        try:
            memory = torch.empty(args.size, dtype=torch.uint8, device=self._device)  # aligned to 512 bytes on a GPU
        except RuntimeError as error:
            return self._fail(str(error).encode())
        self._scratch[memory.data_ptr()] = memory
        args.data = memory.data_ptr()
        return None

    def _free(self, pointer: int) -> None:
        self._scratch.pop(_args(_FreeArgs, pointer).data, None)


# -- the contestant --


class FlashAttention3(Peer):
    """Dao-AILab's Hopper kernels.

    Args:
        path: `libdew_flash_attn3.so`, in the package's folder, whose `.dist-info` beside it says the version.
    """

    name = "fa3"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handlers: Handlers | None = None

    def available(self, device: str) -> str | None:
        if not device.startswith("cuda"):
            return "needs a CUDA device"
        if torch.cuda.get_device_capability(device) != (9, 0):
            return "is built for Hopper (sm_90) only"
        try:
            self._load(device)
        except OSError as error:
            return f"cannot be loaded: {error}"
        return None

    def version(self) -> str:
        for found in self._path.resolve().parent.parent.glob("dew_flash_attn*.dist-info"):
            return found.name.removesuffix(".dist-info").replace("-", " ").replace("_", "-")
        return f"{self._path.name} {hashlib.sha256(self._path.read_bytes()).hexdigest()[:12]}"

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        if problem.dtype == "fp32":
            return "takes fp16 and bf16 only"
        if problem.head_dim != problem.head_dim_v or problem.head_dim > 256 or problem.head_dim % 8:
            return "needs equal head dims of q and v, at most 256 and a multiple of 8"
        return bottom_right_only(problem)

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        handlers = self._load(problem.device)
        attributes = {
            "softmax_scale": float(problem.scale),
            "is_causal": problem.causal,
            "window_size_left": -1,
            "window_size_right": -1,
        }

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out, lse = _forward(handlers, q, k, v, attributes)
                ctx.save_for_backward(q, k, v, out, lse)
                return out

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return (*_backward(handlers, attributes, grads[0], *ctx.saved_tensors),)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = Function.apply(q, k, v)  # type: ignore[no-untyped-call]
            return out

        return run

    def _load(self, device: str) -> Handlers:
        if self._handlers is None:
            self._handlers = Handlers(self._path, device)
        return self._handlers


def _forward(handlers: Handlers, q: Tensor, k: Tensor, v: Tensor, attributes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty((batch, heads, rows), dtype=torch.float32)
    # Of keys that are split, which this build never does.
    unused = [q.new_empty((1,) * rank, dtype=torch.float32) for rank in (4, 3)]
    handlers.call("dew_flash3_mha_fwd", [q, k, v], [out, lse, *unused], **attributes)
    return out, lse


def _backward(handlers: Handlers, attributes: dict[str, Any], dout: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    q, k, v, out, lse = kept
    grads = [torch.empty_like(x) for x in (q, k, v)]
    # Rows per head, each sequence's rounded up to the kernel's row block, which is at most 128.
    size = q.shape[2] * (q.shape[0] * q.shape[1] + 128 * (q.shape[0] + 1))
    scratch = [q.new_empty((size,), dtype=torch.float32) for _ in range(2)]
    handlers.call("dew_flash3_mha_bwd", [dout.contiguous(), q, k, v, out, lse], [*grads, *scratch], **attributes)
    return tuple(grads)


__all__ = ["FlashAttention3", "Handlers"]
