"""The interpreting worker as its parent holds it: one process, its pipes, the arena; started when it is needed, ended with this one."""

from __future__ import annotations

import atexit
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any

from flashgen.errors import BuildError
from flashgen.interpret.arena import Slot, check_guards, checksum, elements, fill, place
from flashgen.interpret_worker import receive, send

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.interpret.arena import Bytes

_KEEP_BYTES = 1 << 26  # a larger arena is given back after the launch

# Same modules as the parent, whatever put them on its path; `-m` would see only PYTHONPATH.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flashgen.interpret_worker import main; main(*map(int, sys.argv[2:]))"
)


class Worker:
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
        slots, size = place(tensors, outputs)
        try:
            # What is None stays an argument of the launch.
            message = {key: slots[key].message if key in slots else None for key in tensors}
            self._launch(name, path, slots, size, message, values)
        finally:
            self._trim()

    def _launch(
        self, name: str, path: str, slots: dict[str, Slot], size: int, message: dict[str, Any], values: dict[str, Any]
    ) -> None:
        memory = self._memory(size)
        fill(memory, slots, size)
        inputs = {key: checksum(memory, slot) for key, slot in slots.items() if not slot.output}
        reply = self._ask({"path": path, "size": len(memory), "tensors": message, "values": values}, name)
        if "error" in reply:
            raise BuildError(f"{name} failed in Triton's interpreter: {reply['error']}")
        for key, before in inputs.items():
            if checksum(memory, slots[key]) != before:
                raise BuildError(f"{name} wrote into its input {key} (or into a gap between its elements).")
        results = {key: elements(memory, slot).clone() for key, slot in slots.items() if slot.output}
        check_guards(memory, slots, size, name)
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
        self.worker: Worker | None = None
        self.hooked = False


state = _State()


def running_worker() -> Worker:
    """The worker, started if there is none; hold `state.lock`.

    Raises:
        BuildError: it does not start.
    """
    worker = state.worker
    if worker is None or not worker.alive:
        if worker is not None:
            worker.stop()
        state.worker = None
        if not state.hooked:
            atexit.register(shutdown)
            os.register_at_fork(after_in_child=_after_fork)
            state.hooked = True
        state.worker = Worker()
    return state.worker  # type: ignore[return-value]  # mypy cannot see that it was just set


def _after_fork() -> None:
    # The lock may have been held by a thread that does not exist here; the worker answers to the parent.
    worker, state.worker, state.lock = state.worker, None, threading.Lock()
    if worker is not None:
        worker.forget()


def _anonymous_file(name: str) -> int:
    """A file without a name, gone with its last user, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"flashgen-{name}")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def shutdown() -> None:
    """End the worker process, if there is one; the next launch starts another."""
    with state.lock:
        if state.worker is not None:
            state.worker.stop()
            state.worker = None


def worker_pid() -> int | None:
    """Process id of the running worker, None where there is none."""
    worker = state.worker
    return worker.process.pid if worker is not None and worker.alive else None
