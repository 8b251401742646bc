"""Run a rendered kernel on CPU tensors, in the simulator (Gluon) or in Triton's interpreter: slow, for checking.

Interpretation happens in one long-lived worker process that sets TRITON_INTERPRET before importing triton; this process
never imports triton, since interpreting and compiling in one process breaks both. Tensors travel through a shared
anonymous file with their strides. Everything in that file that is no input is NaN before a launch, and what is no
output must be unchanged after it: a kernel that writes where it must not is found out.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashgen.build import write_source
from flashgen.errors import BuildError, InvalidProblemError
from flashgen.interpret_worker import receive, send
from flashgen.render import KernelSource
from flashgen.simulator import simulate
from flashgen.variants import REGISTRY

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    # Bytes are filled and compared by numpy: torch does it in OpenMP threads, which hang in a forked child.
    Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_GUARD_BYTES = 1 << 16  # of NaN before and after each tensor
_POISON = 0xFF  # NaN in every float dtype when it fills an element
_ALIGN = 256
# A tensor whose elements are spread wider than this (a stride test beyond 2^31) is not filled, copied or checked whole.
_SPARSE_BYTES = 1 << 30
_KEEP_BYTES = 1 << 26  # a larger arena is given back after the launch

# Same modules as the parent, whatever put them on its path; `-m` would see only PYTHONPATH.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flashgen.interpret_worker import main; main(*map(int, sys.argv[2:]))"
)


def launch(
    source: KernelSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    **values: Any,
) -> None:
    """Run the `launch` function of a rendered kernel without a GPU.

    A Gluon kernel runs in this process, in the simulator; any other in the interpreting worker, which is started if need be.

    Thread-safe: one launch at a time. The first call of a process takes a second or two for the worker to import torch
    and triton.

    Args:
        source: the rendered kernel.
        q, k, v, o, lse: CPU tensors as the rendered launch takes them; results are copied into o and lse. If the
            kernel leaves an element of them alone it becomes NaN.
        **values: numbers, tunables and further tensors, as the rendered launch takes them.

    Raises:
        InvalidProblemError: a tensor is not on the CPU.
        BuildError: the worker cannot start; the kernel raised (its line is in the message), crashed the worker, or
            wrote outside its outputs. o and lse are untouched then, and the next call works again.
        SimulationError: the simulator found a defect.

    """
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse}
    _run(source, tensors, ("o", "lse"), values)


def launch_backward(
    source: KernelSource,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    **values: Any,
) -> None:
    """Run the `launch` function of a rendered backward in the interpreting worker; as `launch`, into dq, dk and dv.

    Args:
        source: the rendered kernels.
        dout, dlse, q, k, v, out, lse, dq, dk, dv: CPU tensors as the rendered launch takes them.
        **values: numbers, tunables and further tensors, as the rendered launch takes them; dsinks, dbias and
            those of captured tensors are written too.

    Raises:
        InvalidProblemError, BuildError: as `launch`.

    """
    tensors = {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    sums = tuple(name for name in values if name in ("dsinks", "dbias") or name.startswith("dcaptured_"))
    _run(source, tensors, ("dq", "dk", "dv", *sums), values)


def launch_of(source: KernelSource) -> Callable[..., None]:
    """`launch` or `launch_backward`, whichever the rendered kernel is for."""
    return launch_backward if source.spec.op == "attention_bwd" else launch


def _run(
    source: KernelSource, tensors: dict[str, Tensor | None], outputs: tuple[str, ...], values: dict[str, Any]
) -> None:
    import torch

    tensors = tensors | {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}
    values = {name: x for name, x in values.items() if name not in tensors}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise InvalidProblemError(f"{name} is on {tensor.device}: the interpreter takes CPU tensors only.")
    if _in_gluon(source):
        simulate(source, {**tensors, **values})
        return
    path = str(write_source(source))
    with _state.lock:
        worker = _running_worker()
        try:
            worker.launch(source.name, path, tensors, outputs, values)
        except BuildError:
            raise
        except BaseException:  # Ctrl-C among them: an answer nobody waits for must not meet the next question
            worker.stop()
            raise


def _in_gluon(source: KernelSource) -> bool:
    """Whether a file is Gluon's; a text of no known variant is taken for plain Triton."""
    return any(variant.name == source.variant and variant.backend == "gluon" for variant in REGISTRY)


def shutdown() -> None:
    """End the worker process, if there is one; the next launch starts another."""
    with _state.lock:
        if _state.worker is not None:
            _state.worker.stop()
            _state.worker = None


def worker_pid() -> int | None:
    """Process id of the running worker, None where there is none."""
    worker = _state.worker
    return worker.process.pid if worker is not None and worker.alive else None


@dataclass(slots=True)
class _Slot:
    """One tensor's place in the arena, in bytes."""

    tensor: Tensor
    offset: int
    nbytes: int
    span: int
    output: bool

    @property
    def sparse(self) -> bool:
        return self.nbytes > _SPARSE_BYTES

    @property
    def message(self) -> dict[str, Any]:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return {
            "dtype": dtype,
            "offset": self.offset,
            "span": self.span,
            "shape": list(self.tensor.shape),
            "stride": list(self.tensor.stride()),
        }


class _Worker:
    """The process, its pipes and the shared arena."""

    def __init__(self) -> None:
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        self._arena, self._crash = _anonymous_file("arena"), _anonymous_file("crash")
        self._map: mmap.mmap | None = None
        theirs = (request_read, reply_write, self._arena, self._crash)
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",  # the worker must not take memory of a GPU
            "OMP_NUM_THREADS": "1",  # products of tile size: threads only cost
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            self._close()
            raise BuildError(
                f"the interpreter's worker process could not be started with {sys.executable}: {error}"
            ) from error
        finally:
            os.close(request_read)
            os.close(reply_write)
        try:
            hello = receive(self._replies)
        except BaseException:
            self.stop()
            raise
        if hello is None or "error" in hello:
            self.stop()
            why = "it ended before it answered" if hello is None else hello["error"]
            raise BuildError(
                f"the interpreter's worker process did not start: {why}. It needs torch, and Triton 3.6 or newer with "
                "a NumPy that Triton supports (3.6: below 2.4)."
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def launch(
        self,
        name: str,
        path: str,
        tensors: dict[str, Tensor | None],
        outputs: tuple[str, ...],
        values: dict[str, Any],
    ) -> None:
        slots, size = _place(tensors, outputs)
        try:
            # What is None stays an argument of the launch.
            message = {key: slots[key].message if key in slots else None for key in tensors}
            self._launch(name, path, slots, size, message, values)
        finally:
            self._trim()

    def _launch(
        self, name: str, path: str, slots: dict[str, _Slot], size: int, message: dict[str, Any], values: dict[str, Any]
    ) -> None:
        memory = self._memory(size)
        _fill(memory, slots, size)
        inputs = {key: _checksum(memory, slot) for key, slot in slots.items() if not slot.output}
        reply = self._ask({"path": path, "size": len(memory), "tensors": message, "values": values}, name)
        if "error" in reply:
            raise BuildError(f"{name} failed in Triton's interpreter: {reply['error']}")
        for key, before in inputs.items():
            if _checksum(memory, slots[key]) != before:
                raise BuildError(f"{name} wrote into its input {key} (or into a gap between its elements).")
        results = {key: _elements(memory, slot).clone() for key, slot in slots.items() if slot.output}
        _check_guards(memory, slots, size, name)
        for key, result in results.items():
            slots[key].tensor.detach().copy_(result)

    def _ask(self, request: dict[str, Any], name: str) -> dict[str, Any]:
        try:
            send(self._requests, request)
            reply = receive(self._replies)
        except BrokenPipeError:
            reply = None
        if reply is not None:
            return reply
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        crash = os.pread(self._crash, 1 << 16, 0).decode(errors="replace")
        where = next((line.strip() for line in crash.splitlines() if request["path"] in line), "")
        self.stop()
        raise BuildError(
            f"the interpreter's worker process died while it ran {name} (exit status {code}"
            f"{', ' + crash.splitlines()[0] if crash else ''}): this launch is lost, the next one starts a new worker. "
            + (f"It was at {where}." if where else "Killed from outside, or out of memory?")
        )

    def _memory(self, size: int) -> Bytes:
        """The arena, at least that large."""
        import numpy as np

        if self._map is None or len(self._map) < size:
            self._map = None
            capacity = max(1 << 20, 1 << (size - 1).bit_length()) if size <= _KEEP_BYTES else size
            os.ftruncate(self._arena, capacity)
            self._map = mmap.mmap(self._arena, capacity)
        return np.frombuffer(self._map, dtype=np.uint8)

    def _trim(self) -> None:
        if self._map is not None and len(self._map) > _KEEP_BYTES:
            self._map = None
            os.ftruncate(self._arena, 0)

    def stop(self) -> None:
        """Kill the process and give everything back; may be called twice."""
        if self._requests < 0:
            return
        self.process.kill()
        self.process.wait()
        self._close()

    def forget(self) -> None:
        """In a forked child: let go of the parent's worker without touching it."""
        self.process.returncode = 0  # it is no child of this process: do not warn that it still runs
        self._close()

    def _close(self) -> None:
        self._map = None
        for fd in (self._requests, self._replies, self._arena, self._crash):
            if fd >= 0:
                os.close(fd)
        self._requests = self._replies = self._arena = self._crash = -1


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: _Worker | None = None
        self.hooked = False


_state = _State()


def _running_worker() -> _Worker:
    worker = _state.worker
    if worker is None or not worker.alive:
        if worker is not None:
            worker.stop()
        _state.worker = None
        if not _state.hooked:
            atexit.register(shutdown)
            os.register_at_fork(after_in_child=_after_fork)
            _state.hooked = True
        _state.worker = _Worker()
    return _state.worker  # type: ignore[return-value]  # mypy cannot see that it was just set


def _after_fork() -> None:
    # The lock may have been held by a thread that does not exist here; the worker answers to the parent.
    worker, _state.worker, _state.lock = _state.worker, None, threading.Lock()
    if worker is not None:
        worker.forget()


def _anonymous_file(name: str) -> int:
    """A file without a name, gone with its last user, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"flashgen-{name}")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# -- the arena: guard, tensor, guard, tensor, ..., guard --


def _place(tensors: dict[str, Tensor | None], outputs: tuple[str, ...]) -> tuple[dict[str, _Slot], int]:
    slots, end = {}, _GUARD_BYTES
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        span = 0
        if tensor.numel():
            span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        # Same alignment as the caller's tensor, so that a kernel sees what it would see in place.
        offset = end + (tensor.data_ptr() % _ALIGN if span else 0)
        slots[name] = _Slot(tensor, offset, span * tensor.element_size(), span, name in outputs)
        end = -(-(offset + slots[name].nbytes + _GUARD_BYTES) // _ALIGN) * _ALIGN
    return slots, end


def _fill(memory: Bytes, slots: dict[str, _Slot], size: int) -> None:
    import torch

    for start, stop in _gaps(slots, size):
        memory[start:stop] = _POISON
    for slot in slots.values():
        tensor = slot.tensor.detach()
        if slot.sparse and not slot.output:
            _elements(memory, slot, unique=True).copy_(_without_repeats(tensor))
        elif slot.sparse:
            _elements(memory, slot).copy_(torch.full((), torch.nan, dtype=tensor.dtype))
        elif slot.output:
            memory[slot.offset : slot.offset + slot.nbytes] = _POISON
        elif slot.span:
            # The whole span, so that what lies between the elements (NaN, in a test) travels too.
            flat = tensor.as_strided((slot.span,), (1,), tensor.storage_offset())
            memory[slot.offset : slot.offset + slot.nbytes] = flat.view(torch.uint8).numpy()


def _check_guards(memory: Bytes, slots: dict[str, _Slot], size: int, name: str) -> None:
    for key, slot in slots.items():
        if slot.output and slot.span and not slot.sparse:
            # Where writing was allowed the poison is put back; whatever differs now was written between elements.
            _bits(memory, slot).fill_(-1)  # all ones
            touched = int((memory[slot.offset : slot.offset + slot.nbytes] != _POISON).sum())
            if touched:
                raise BuildError(f"{name} wrote {touched} bytes between the elements of {key}, outside its rows.")
    edges = list(slots.items())
    for index, (start, stop) in enumerate(_gaps(slots, size)):
        wrong = (memory[start:stop] != _POISON).nonzero()[0]
        if len(wrong):
            after = f"after the end of {edges[index - 1][0]}" if index else ""
            before = f"before the start of {edges[index][0]}" if index < len(edges) else ""
            place = " and ".join(filter(None, (after, before)))
            raise BuildError(
                f"{name} wrote {len(wrong)} bytes outside every tensor, {place} (the first at byte {wrong[0]} there)."
            )


def _gaps(slots: dict[str, _Slot], size: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for slot in slots.values() for edge in (slot.offset, slot.offset + slot.nbytes)), size]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _elements(memory: Bytes, slot: _Slot, *, unique: bool = False) -> Tensor:
    """The tensor as it lies in the arena; `unique`: without its broadcast repetitions."""
    import torch

    tensor = slot.tensor.detach()
    like = _without_repeats(tensor) if unique else tensor
    if not slot.span:
        return torch.empty_like(like)
    flat = torch.from_numpy(memory[slot.offset : slot.offset + slot.nbytes]).view(tensor.dtype)
    return flat.as_strided(like.shape, like.stride())


def _bits(memory: Bytes, slot: _Slot) -> Tensor:
    """The elements as integers."""
    import torch

    kind = torch.int16 if slot.tensor.element_size() == 2 else torch.int32
    flat = torch.from_numpy(memory[slot.offset : slot.offset + slot.nbytes]).view(kind)
    return flat.as_strided(slot.tensor.shape, slot.tensor.stride())


def _without_repeats(tensor: Tensor) -> Tensor:
    for dim, step in enumerate(tensor.stride()):
        if step == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def _checksum(memory: Bytes, slot: _Slot) -> int:
    if slot.sparse:
        return 0
    return zlib.crc32(memory[slot.offset : slot.offset + slot.nbytes].data)
