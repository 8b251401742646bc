"""Threads that compile beside calls; and the shared kernel that stands in, meanwhile, for the own one of a mask that reads tensors.

A mask's own kernel evaluates pairs where its tensors turn out to hold something else than its tables were made of, by the time it runs. The
shared one cannot: it runs where the tables surely say what the tensors hold, as they do in the call that made them. In calls that follow before
the mask's own is compiled, the host waits for the device to say so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flashgen import jit, shared_masks
from flashgen.dispatch import Plan
from flashgen.operands import Operands
from flashgen.spec import AttentionSpec
from flashgen.stream_capture import capturing, free_stream, relaxed

logger = logging.getLogger("flashgen")

_MOST = 1024  # masks whose own kernel is remembered to be compiled
_own: dict[Any, threading.Thread] = {}  # by the kernel that a thread compiles, or did
_lock = threading.Lock()


def compile_beside(work: Callable[..., None], name: str, *tensors: Tensor | None) -> threading.Thread:
    """A thread that runs `work` on tensors up to its kernels, where they are compiled; not yet started.

    On a stream of its own, for the caller's may be captured before the thread is done. The tensors come without autograd's graph, whose leaves'
    accumulators remember this stream: a capture that begins meanwhile makes its own.
    """
    device = next(x.device for x in tensors if x is not None)
    stream: Any = nullcontext()
    if device.type == "cuda":
        own = free_stream(device)
        own.wait_stream(torch.cuda.current_stream(device))  # mods may read what is being computed there
        stream = torch.cuda.stream(own)

    def compile(stream: AbstractContextManager[None], *given: Tensor | None) -> None:
        try:
            with torch.no_grad(), relaxed(), stream:
                work(*given)
        except Exception as error:  # the launch itself will say so, where somebody asks for it
            logger.debug("%s: nothing was compiled ahead: %s", name, error)

    given = (None if x is None else x.detach() for x in tensors)
    # No daemon: at the end of the process it is waited for.
    return threading.Thread(target=compile, args=(stream, *given), name=name)


def chosen(plan: Plan, operands: Operands, device: torch.device) -> tuple[AttentionSpec | None, dict[str, Any] | None]:
    """The spec of the kernel that stands in for a plan's own in a call, or None; and what `Operands.of_mods` made, where it had to be asked.

    Nothing stands in under capture, nor where PyTorch is to tell of every time that the host waits for the device: what is being compiled is
    waited for instead.
    """
    if not shared_masks.may_stand_in(plan):
        return None, None
    with _lock:
        thread = _own.get(_kernel(plan))
    unseen = thread is None
    if thread is not None and not thread.is_alive():
        return None, None
    if capturing(device) or (thread is not None and _on_a_gpu(device) and torch.cuda.get_sync_debug_mode()):
        if thread is not None:
            thread.join()
        return None, None
    made = operands.of_mods(plan.problem, plan.config, surely=not unseen)
    return shared_masks.stand_in(plan, made), made


def compile_own(
    plan: Plan,
    launch: Callable[[], Callable[..., None]],
    arguments: tuple[Tensor | None, ...],
    values: Mapping[str, Any],
    before: Callable[[], threading.Thread | None],
) -> None:
    """Compile a plan's own kernel in a thread, once.

    Args:
        plan: what another kernel stands in for.
        launch: builds the rendered launch.
        arguments, values: what it takes.
        before: what compiles something that is needed sooner, if anything does.
    """

    def work(*given: Tensor | None) -> None:
        if sooner is not None:
            sooner.join()
        with jit.compiling_only():
            launch()(*given, **values)

    with _lock:
        if _kernel(plan) in _own:
            return
        if len(_own) >= _MOST:
            _own.clear()
        sooner = before()
        thread = _own[_kernel(plan)] = compile_beside(work, "flashgen-own", *arguments)
        thread.start()


def _on_a_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _kernel(plan: Plan) -> tuple[Any, ...]:
    return plan.problem.spec, plan.config, plan.target.name
