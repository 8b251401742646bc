"""The other end of `interpret`: a process that runs rendered kernels in Triton's interpreter and does nothing else.

Started as `main(requests, replies, arena, crash)` with four inherited file descriptors and TRITON_INTERPRET=1 in its
environment. A message is a 4-byte length and JSON. Tensors lie in the arena, a shared anonymous file.
"""

from __future__ import annotations

import faulthandler
import io
import json
import mmap
import os
import queue
import signal
import struct
import sys
import threading
import time
import traceback
import types
import warnings
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = struct.Struct("<I")


def send(fd: int, message: dict[str, Any]) -> None:
    """Write one framed message."""
    data = json.dumps(message).encode()
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> dict[str, Any] | None:
    """Read one framed message; None when the other end is gone."""
    header = _read(fd, _LENGTH.size)
    body = None if header is None else _read(fd, _LENGTH.unpack(header)[0])
    return None if body is None else json.loads(body)


def _read(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _end_with_parent(parent: int) -> None:
    """The pipe says so too, unless another process of a killed parent still holds its end."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main(requests: int, replies: int, arena: int, crash: int) -> None:
    """Serve requests until the parent is gone."""
    # Ctrl-C reaches the whole group: the parent decides what it means and kills this process if it must.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # A kernel that reads outside the arena ends in a signal: leave the line it was on where the parent looks.
    faulthandler.enable(file=crash, all_threads=False)
    try:
        import numpy as np
        import torch

        triton = import_module("triton")
        patch_bf16()
        patch_copies()
        patch_conditions()
        patch_repeated_work()
    except Exception as error:
        send(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    # Kernels compute -inf - -inf and 0/0 in lanes that they throw away; on a GPU nobody hears of it.
    np.seterr(all="ignore")
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    # What a kernel prints goes to stderr: stdout is the parent's, which may be writing JSON to it.
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a process that is killed flushes nothing
    send(replies, {"triton": triton.__version__, "pid": os.getpid()})

    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    memory = _Arena(arena)
    while True:
        request = inbox.get()
        try:
            _run(request, memory)
            reply: dict[str, Any] = {"ok": True}
        except Exception as error:
            reply = {"error": describe(error, request["path"])}
        try:
            send(replies, reply)
        except BrokenPipeError:
            return


def _listen(requests: int, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hand requests on; end the process with the parent, even in the middle of a long kernel."""
    while (request := receive(requests)) is not None:
        inbox.put(request)
    os._exit(0)


class _Arena:
    """The shared file, mapped anew when its size changes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None

    def tensor(self, row: dict[str, Any], size: int) -> Tensor:
        import torch

        dtype = getattr(torch, row["dtype"])
        if row["span"] == 0:
            return torch.empty_strided(row["shape"], row["stride"], dtype=dtype)
        if self._map is None or len(self._map) != size:
            self._map = mmap.mmap(self._fd, size)
        flat = torch.frombuffer(self._map, dtype=dtype, count=row["span"], offset=row["offset"])
        return flat.as_strided(row["shape"], row["stride"])


def _run(request: dict[str, Any], memory: _Arena) -> None:
    module = _module(request["path"])
    tensors = {name: row and memory.tensor(row, request["size"]) for name, row in request["tensors"].items()}
    module.launch(**tensors, **request["values"])


@cache
def _module(path: str) -> types.ModuleType:
    from flashgen.build import load_module

    return load_module(Path(path))


def describe(error: BaseException, path: str) -> str:
    """The innermost cause, and the kernel's line that it came from."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    text = f"{type(chain[-1]).__name__}: {chain[-1]}"
    for link in reversed(chain):
        frames = [frame for frame in traceback.extract_tb(link.__traceback__) if frame.filename == path]
        if frames:
            return f"{text}\n  {path}:{frames[-1].lineno}: {frames[-1].line}"
    return text


# -- repairs of Triton's interpreter --


def patch_copies() -> None:
    """Skip the interpreter's copy of every storage onto itself after a launch: the tensors are on the host already.

    It would touch every page of a sparse tensor that is gigabytes long.
    """
    interpreter = import_module("triton.runtime.interpreter")
    interpreter.GridExecutor._restore_args_dev = lambda *args: None


def patch_conditions() -> None:
    """Keep the comparison of two scalars a bool when it meets a block of bools.

    The interpreter spreads it over the block as the type of what was compared (3.6 and 3.9), and `~` of the result or a
    load under it goes wrong.
    """
    import numpy as np

    interpreter = import_module("triton.runtime.interpreter")
    original, handle = interpreter.InterpreterBuilder.create_splat, interpreter.TensorHandle

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if np.asarray(arg.data).dtype != np.bool_:
            return original(self, ret_ty, arg)
        return handle(np.full(ret_ty.shape, np.ravel(arg.data)[0]), arg.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat


def patch_repeated_work() -> None:
    """Spare the interpreter what it does again and again: three quarters of a kernel's time (3.6 and 3.9), none of its results.

    It remaps the whole language at each call of a device function, though the launch has, builds a dictionary of all
    types to look one up, and makes the shape of each value anew, of objects with types of their own. Each sum of 32-bit
    numbers is computed once more in 64 bits, to assert that it fits, and asserted only where `debug` is set, which is
    nowhere here. Operands of one type and shape are searched for a common type and shape, and numbers spread over a block anew.
    """
    import numpy as np

    tl: Any = import_module("triton.language")
    interpreter: Any = import_module("triton.runtime.interpreter")
    semantic: Any = import_module("triton.language.semantic").TritonSemantic
    remap, launch, np_dtype = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    mapped: set[int] = set()  # what the running launch has remapped
    known: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    numbers: dict[tuple[Any, ...], Any] = {}
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    alike, broadcast, equal = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value, tl.dtype.__eq__
    # Of these two operands have their own type in any operation; halves do not when they are divided.
    plain = {x.name for x in (tl.float32, tl.float64, tl.int32, tl.int64, tl.uint32, tl.uint64)}

    def patch_lang(fn: Any) -> Any:
        modules = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
        if modules and modules <= mapped:
            return None  # a device function's: nobody restores it
        mapped.update(modules)
        return remap(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mapped.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            mapped.clear()

    def get_np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.element_ty if isinstance(tt_dtype, tl.block_type) else tt_dtype
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = np_dtype(scalar)
        return known[scalar.name]

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not tl.dtype:  # pointers differ in more than their name
            make_block(self, element_ty, shape)
            return
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def same_type(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        pair = type(lhs) is tl.tensor, type(rhs) is tl.tensor
        if pair == (True, True) and lhs.dtype.name == rhs.dtype.name in plain:
            return same_shape(self, lhs, rhs)
        if pair == (True, False) and (number := constant(self, rhs, lhs)) is not None:
            return lhs, number
        if pair == (False, True) and (number := constant(self, lhs, rhs)) is not None:
            return number, rhs
        return alike(self, lhs, rhs, *args, **kwargs)

    def constant(self: Any, value: Any, beside: Any) -> Any:
        """A number as a block of what it meets; None where it is of another kind, or does not fit, which is an error."""
        dtype, kind = beside.dtype, type(value)
        if dtype.name not in plain or kind not in (int, float) or value != value:
            return None
        if dtype.is_int() and (kind is float or not dtype.get_int_min_value() <= value <= dtype.get_int_max_value()):
            return None
        key = (dtype.name, beside.type.is_block() and beside.handle.data.shape, kind, value, str(value)[:1])
        if key not in numbers:
            if len(numbers) > 1000:
                numbers.clear()
            numbers[key] = broadcast(self, beside, self.scalar_constant(value, dtype=dtype))[1]
            numbers[key].handle.data.flags.writeable = False  # operands are read
        return numbers[key]

    def same_shape(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:  # `tensor_init` makes one of each
            return lhs, rhs
        if lhs.dtype.name == rhs.dtype.name in plain:
            if not rhs.type.is_block():
                return lhs, spread(rhs, lhs)
            if not lhs.type.is_block():
                return spread(lhs, rhs), rhs
        return broadcast(self, lhs, rhs)

    def spread(one: Any, over: Any) -> Any:
        data = np.full(over.handle.data.shape, one.handle.data, dtype=get_np_dtype(one.dtype))
        return tl.tensor(interpreter.TensorHandle(data, one.dtype), over.type)

    tl.dtype.__eq__ = lambda self, other: other is self or equal(self, other)
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = same_type, same_shape
    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
    interpreter._get_np_dtype = get_np_dtype


def patch_bf16() -> None:
    """Make bf16 right in Triton 3.6 and 3.9: the interpreter keeps it as uint16.

    `create_dot` multiplies those integers, and a cast to bf16 truncates (subnormals become garbage). May go when
    tests/interpret/test_bf16.py passes without it on every supported Triton.
    """
    import numpy as np

    tl, interpreter = import_module("triton.language"), import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    original_dot, original_cast, original_fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def widen(data: Any) -> Any:
        return (np.asarray(data, dtype=np.uint32) << np.uint32(16)).view(np.float32)

    def narrow(data: Any) -> Any:
        values = np.asarray(data, dtype=np.float32)
        bits = values.view(np.uint32)
        nearest_even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where(np.isnan(values), quiet_nan, nearest_even).astype(np.uint16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar, d.dtype.scalar):
            return original_dot(self, a, b, d, *rest)
        wide = [handle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b, d)]
        result = original_dot(self, *wide, *rest)
        return handle(narrow(result.data), tl.bfloat16) if d.dtype.scalar == tl.bfloat16 else result

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return original_cast(self, src, dst_type)
        data = widen(src.data) if source == tl.bfloat16 else src.data
        if target == tl.bfloat16:
            return handle(narrow(data), tl.bfloat16)
        return (
            original_cast(self, handle(data, tl.float32), dst_type)
            if target != tl.float32
            else handle(data, tl.float32)
        )

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        toward_zero = rounding_mode is not None and rounding_mode != interpreter._ir.ROUNDING_MODE.RTNE
        eight_bits = min(src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth) == 8
        if toward_zero or eight_bits or tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return original_fp_to_fp(self, src, dst_type, rounding_mode)
        return cast_impl(self, src, dst_type)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
