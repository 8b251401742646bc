"""The other end of `worker.MeasuringWorker`: a process with a device of its own that checks and times what it is sent."""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
from typing import Any

from flashgen.interpret_worker import receive, send
from flashgen.tuner import providers
from flashgen.tuner.case import Case, prepare
from flashgen.tuner.faults import failure
from flashgen.tuner.final import run_final
from flashgen.tuner.trial import run_trial


def main(requests: int, replies: int, kind: str) -> None:
    """Serve until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        provider = providers.make(kind)
    except Exception as error:
        send(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    send(replies, {"pid": os.getpid(), **provider.describe()})
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    case: Case | None = None
    while True:
        request = inbox.get()
        try:
            if case is None or case.key != request["key"]:
                case = None  # the old one's memory goes before the new one's comes
                gc.collect()
                case = prepare(request, provider)
            reply = run_trial(case, request) if request["do"] == "trial" else run_final(case, request)
        except Exception as error:
            reply = failure(error)
            error.__traceback__ = None  # it holds on to the candidate's tensors
        try:
            send(replies, reply)
        except BrokenPipeError:
            return  # the parent is gone


def _listen(requests: int, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Hand requests on; end the process with the parent, even in the middle of a launch."""
    while (request := receive(requests)) is not None:
        inbox.put(request)
    os._exit(0)
