"""Threads that compile beside calls; and the shared kernel that stands in, meanwhile, for the own one of a mask that reads tensors.

A mask's own kernel evaluates pairs where its tensors turn out to hold something else than its tables were made of, by the time it runs. The
shared one cannot: it runs where the tables surely say what the tensors hold, as they do in the call that made them. In other calls before the
mask's own is compiled, a model's next layers, the host waits for the device to say so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from flashgen import jit, shared_masks
from flashgen.dispatch import Plan
from flashgen.operands import Operands
from flashgen.spec import AttentionSpec
from flashgen.stream_capture import capturing, free_stream, relaxed

logger = logging.getLogger("flashgen")

_MOST = 1024  # masks whose own kernel is remembered to be compiled


class _Own(NamedTuple):
    """What compiles a mask's own kernel, or did.

    Attributes:
        thread: at work on it.
        queries: of the calls meanwhile.
    """

    thread: threading.Thread
    queries: set[StorageWeakRef]


_own: dict[Any, _Own] = {}
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


def chosen(plan: Plan, operands: Operands, q: Tensor | None) -> tuple[AttentionSpec | None, dict[str, Any] | None]:
    """The spec of the kernel that stands in for a plan's own in a call, or None; and what `Operands.of_mods` made, where it had to be asked.

    While a mask's own kernel is being compiled, other calls have another stand in. It is waited for under capture; where PyTorch is to tell
    of every time that the host waits for the device; and by a call on the very queries of an earlier one, since that is how times are taken.
    """
    if q is None or not shared_masks.may_stand_in(plan):
        return None, None
    with _lock:
        own = _own.get(_kernel(plan))
    if own is not None:
        if not own.thread.is_alive():
            return None, None
        query = StorageWeakRef(q.untyped_storage())
        if capturing(q.device) or query in own.queries or (_on_a_gpu(q.device) and torch.cuda.get_sync_debug_mode()):
            own.thread.join()
            return None, None
        own.queries.add(query)
    elif capturing(q.device):
        return None, None
    made = operands.of_mods(plan.problem, plan.config, surely=own is not None)
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
        thread = compile_beside(work, "flashgen-own", *arguments)
        queries = {StorageWeakRef(x.untyped_storage()) for x in arguments[:1] if x is not None}
        _own[_kernel(plan)] = _Own(thread, queries)
        thread.start()


def _on_a_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _kernel(plan: Plan) -> tuple[Any, ...]:
    return plan.problem.spec, plan.config, plan.target.name
