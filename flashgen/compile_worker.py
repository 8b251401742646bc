"""The other end of `compile_pool.py`: a process that compiles what it is sent and does nothing else."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

from flashgen.config import KernelConfig
from flashgen.facts import inspect
from flashgen.interpret_worker import receive, send
from flashgen.render import KernelSource
from flashgen.spec import AttentionSpec, Mods
from flashgen.target import TARGETS, Target


def main(requests: int, replies: int) -> None:
    """Serve until the parent is gone."""
    # Ctrl-C reaches the whole group: the parent decides what it means and kills this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import triton
    except Exception as error:
        send(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    send(replies, {"triton": triton.__version__, "pid": os.getpid()})
    while (request := receive(requests)) is not None:
        try:
            send(replies, _answer(request))
        except BrokenPipeError:
            return  # the parent is gone


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        spec = AttentionSpec.from_key(request["spec"])
        if request.get("mods") is not None:
            from flashgen.mods import transport  # loads torch: only where there is a program

            program, _ = transport.from_json(request["mods"])
            spec = replace(spec, mods=Mods(digest=program.digest, program=program))
        source = KernelSource(text=request["text"], spec=spec, variant=request["variant"])
        config = KernelConfig(variant=request["variant"], **request["config"])
        return inspect(source, _target(request), config, request["strides"]).to_json()
    except Exception as error:
        return {"error": f"{error}" if str(error) else type(error).__name__}


def _target(request: dict[str, Any]) -> Target:
    """What matters to the compiler; the rest of a target that this process may not know is some GPU's."""
    what = {name: request[name] for name in ("arch", "backend", "warp_size")}
    return replace(next(iter(TARGETS.values())), name=request["target"], **what)
