"""A pool of worker processes that compile candidates: a compiler that hangs or dies costs one candidate, not the run.

Workers are plain subprocesses with framed pipes, not multiprocessing's spawn, which would import the user's __main__
again. Nothing here imports triton; the workers do.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from flashgen import patience
from flashgen.config import KernelConfig
from flashgen.errors import BuildError
from flashgen.facts import CompiledFacts, Strides, cached
from flashgen.interpret_worker import receive, send
from flashgen.render import KernelSource
from flashgen.target import Target

# The parent's module path, whatever put it there; `-m` would see only PYTHONPATH.
_BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from flashgen.compile_worker import main; main(*map(int, sys.argv[2:]))"
_START_TIMEOUT_S = 60.0

STOPPED = "compiling was stopped"  # what `close` makes of candidates that still compile: no verdict on them

Result = CompiledFacts | BuildError


class CompilePool:
    """Compiles configurations side by side. Its processes live until it is closed, so that one `map` after another is cheap.

    Args:
        workers: processes; None for one per core.
        timeout_s: of one candidate; what takes longer is killed and counts as failed.
    """

    def __init__(self, workers: int | None = None, *, timeout_s: float = 60.0) -> None:
        self._workers = max(1, workers or os.cpu_count() or 1)
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still compiles, wait for the threads, and end the idle processes."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        while (worker := self._waiting()) is not None:
            worker.kill()

    def _waiting(self) -> _Worker | None:
        """An idle process that lives, or None."""
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return None
            if worker.alive:
                return worker
            worker.kill()

    def map(
        self, source: KernelSource, target: Target, configs: Sequence[KernelConfig], strides: Strides | None = None
    ) -> Iterator[tuple[KernelConfig, Result]]:
        """Facts, or the reason why there are none, per configuration, as they become known; cached ones first.

        Args:
            source: the rendered kernel.
            target: for which architecture.
            configs: what to compile; each once.
            strides: see `facts.inspect`.

        Yields:
            (config, facts) or (config, BuildError).
        """
        todo: queue.Queue[KernelConfig] = queue.Queue()
        for config in configs:
            known = cached(source, target, config, strides)
            if known is None:
                todo.put(config)
            else:
                yield config, known
        left = todo.qsize()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        done: queue.Queue[tuple[KernelConfig, Result]] = queue.Queue()
        for _ in range(min(self._workers, left)):
            thread = threading.Thread(target=self._serve, args=(source, target, strides, todo, done), daemon=True)
            thread.start()
            self._threads.append(thread)
        for _ in range(left):
            yield done.get()

    def _serve(
        self,
        source: KernelSource,
        target: Target,
        strides: Strides | None,
        todo: queue.Queue[KernelConfig],
        done: queue.Queue[tuple[KernelConfig, Result]],
    ) -> None:
        """One thread per worker process: it feeds the process and replaces it when it dies."""
        while not self._stop.is_set():
            try:
                config = todo.get_nowait()
            except queue.Empty:
                return
            try:
                worker = self._waiting() or _Worker(self._stop)
            except BuildError as error:
                done.put((config, error))
                continue
            try:
                result: Result = worker.compile(source, target, config, strides, self._timeout_s)
            except BuildError as error:
                result = error
            # Idle before the answer is known: whoever asks for the next one finds it. A dead one is sorted out there.
            self._idle.put(worker)
            done.put((config, result))


class _Worker:
    """One compiling process and its pipes."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), str(request_read), str(reply_write)],
                pass_fds=(request_read, reply_write),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            )
        except OSError as error:
            raise BuildError(f"a compiling worker could not be started with {sys.executable}: {error}") from error
        finally:
            os.close(request_read)
            os.close(reply_write)
        hello = self._receive(_START_TIMEOUT_S, "did not start")
        if "error" in hello:
            raise BuildError(f"a compiling worker did not start: {hello['error']}. It needs Triton 3.6 or newer.")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def compile(
        self, source: KernelSource, target: Target, config: KernelConfig, strides: Strides | None, timeout_s: float
    ) -> CompiledFacts:
        request = {
            "spec": source.spec.key,
            "digest": source.digest,
            "target": target.name,
            "arch": target.arch,
            "backend": target.backend,
            "warp_size": target.warp_size,
            "variant": config.variant,
            "config": config.to_dict(),
            "strides": None if strides is None else dict(strides),
        }
        if source.spec.mods is not None:
            from flashgen.mods import transport  # a program is there, and so is what it imports

            request["mods"] = transport.to_json(source.spec.mods.program, ())
        what = f"died while it compiled {config.label} for {target.arch}"
        try:
            send(self._requests, {**request, "text": source.text})
        except BrokenPipeError:
            raise BuildError(f"a compiling worker {what}") from None
        reply = self._receive(timeout_s, what)
        if "error" in reply:
            raise BuildError(reply["error"])
        return CompiledFacts.from_json(reply)

    def _receive(self, timeout_s: float, what: str) -> dict[str, Any]:
        if not patience.readable(self._replies, timeout_s, self._stop.is_set):
            self.kill()
            if self._stop.is_set():
                raise BuildError(STOPPED)
            raise BuildError(f"a compiling worker was killed after {timeout_s:g} s (timeout): it {what}")
        reply = receive(self._replies)
        if reply is None:
            code = self._process.wait()
            raise BuildError(f"a compiling worker {what} (exit status {code})")
        return reply

    def kill(self) -> None:
        """End it; may be called twice."""
        self._process.kill()
        self._process.wait()
        for name in ("_requests", "_replies"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)
