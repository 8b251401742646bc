"""The measuring process of one device as the tuner holds it: started when needed, killed when it hangs, started again when it died.

It is the leader of a process group of its own, so that a kill takes along whatever a compiler or a driver started, and Ctrl-C is the
tuner's alone to handle. When the tuner dies, the process sees its pipe end and goes too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from flashgen import patience
from flashgen.errors import TuningError
from flashgen.interpret_worker import receive, send

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flashgen.tuner.measure_worker import main; main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
)
_START_TIMEOUT_S = 120.0


class DeviceLostError(TuningError):
    """No measuring process can be started on the device (any more)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a worker measures.

    Attributes:
        kind: a provider's name, `cuda` or `cpu`.
        visible: what CUDA_VISIBLE_DEVICES is to be in the worker; None leaves it as it is.
    """

    kind: str = "cuda"
    visible: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The worker's."""
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return kept if self.visible is None else {**kept, "CUDA_VISIBLE_DEVICES": self.visible}


@dataclass(slots=True)
class MeasuringWorker:
    """One device's process.

    Attributes:
        device: where it measures.
        hello: what the process said of the device when it started: name, and uuid and driver where there are.
        starts: how many processes there were.
    """

    device: Device = field(default_factory=Device)
    hello: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    _aborted: bool = False
    _greeted: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _requests: int = -1
    _replies: int = -1

    def spawn(self) -> None:
        """Start the process unless it runs, and do not wait for it: torch and a device take seconds to come up.

        Raises:
            DeviceLostError: it cannot be started.
            KeyboardInterrupt: `abort` was called.
        """
        if self._aborted:
            raise KeyboardInterrupt
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        words = [json.dumps(sys.path), str(request_read), str(reply_write), self.device.kind]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, *words],
                pass_fds=(request_read, reply_write),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self.device.environment,
                start_new_session=True,
            )
        except OSError as error:
            raise DeviceLostError(f"the measuring process did not start with {sys.executable}: {error}") from error
        finally:
            os.close(request_read)
            os.close(reply_write)
        self.starts += 1
        self._greeted = False

    def start(self) -> None:
        """Start the process unless it runs, and wait until it can measure.

        Raises:
            DeviceLostError: it cannot be started.
            KeyboardInterrupt: `abort` was called.
        """
        if self._greeted or self._process is None:
            self.spawn()
        if self._greeted:
            return
        try:
            hello = self._receive(_START_TIMEOUT_S)
        except TimeoutError:
            hello = {"error": f"it gave no answer within {_START_TIMEOUT_S:g} s"}
        if self._aborted:
            raise KeyboardInterrupt
        if hello is None or "error" in hello:
            why = "it ended before it answered" if hello is None else hello["error"]
            self.close()
            raise DeviceLostError(f"the measuring process did not start: {why}")
        self.hello = {name: str(hello[name]) for name in ("name", "uuid", "driver") if hello.get(name)}
        self._greeted = True

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait; a process that does not answer is killed, and that is the trial's status.

        After a death or a kill a new process is started at once: where that fails it was the device, not the candidate.

        Raises:
            DeviceLostError: no process can be started.
        """
        self.start()
        try:
            send(self._requests, request)
            reply = self._receive(timeout_s)
        except BrokenPipeError:
            reply = None
        except TimeoutError:
            self.close()
            reply = {"status": "timeout", "message": f"gave no answer within {timeout_s:g} s and was killed"}
        if self._aborted:
            raise KeyboardInterrupt
        if reply is None:
            code = self._process.wait() if self._process is not None else None
            reply = {"status": "crashed", "message": f"the measuring process died ({_ending(code)})"}
            self.close()
        if reply.get("sticky"):
            self.close()
        self.start()
        return reply

    def abort(self) -> None:
        """From another thread: end the process; whoever waits for it gets a KeyboardInterrupt."""
        self._aborted = True
        self._kill(self._process)

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        if not patience.readable(self._replies, timeout_s):
            raise TimeoutError
        return receive(self._replies)

    def close(self) -> None:
        """Kill the process and its children; may be called twice."""
        process, self._process, self._greeted = self._process, None, False
        self._kill(process)
        if process is not None:
            process.wait()
        for fd in (self._requests, self._replies):
            if fd >= 0:
                os.close(fd)
        self._requests = self._replies = -1

    @staticmethod
    def _kill(process: subprocess.Popen[bytes] | None) -> None:
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
