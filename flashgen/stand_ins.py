"""Threads that compile beside calls; and the kernels that stand in, meanwhile, for a call's own.

The brief form of a kernel (`Variant.brief`) does the same sums in the same order, slower, and compiles in a third of the time: it runs where the
own kernel is in no cache. A mask that reads tensors has the shared kernel before, where another mask's call has compiled that. A mask's own
kernel evaluates pairs where its tensors turn out to hold something else than its tables were made of, by the time it runs. The
shared one cannot: it runs where the tables surely say what the tensors hold, as they do in the call that made them. In other calls before the
mask's own is compiled, a model's next layers, the host waits for the device to say so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from flashgen import compiling, garbage, settings, shared_masks
from flashgen.dispatch import Plan
from flashgen.operands import Operands
from flashgen.spec import AttentionSpec
from flashgen.stream_capture import capturing, free_stream, relaxed
from flashgen.variants import by_name

logger = logging.getLogger("flashgen")

_MOST = 1024  # plans whose own kernel is remembered to be compiled
_MOST_TIMES = 8  # that one is, for arguments that Triton specialises on: then calls wait for it


class Way(NamedTuple):
    """A kernel that may run a call.

    Attributes:
        spec: of its text.
        made: what `Operands.of_mods` made for it, where it had to be asked.
        brief: whether its brief form runs (`Variant.brief`).
        refuses: whether it runs where nothing is to be compiled, and else the next way is taken.
        stands_in: for the plan's own.
    """

    spec: AttentionSpec
    made: dict[str, Any] | None = None
    brief: bool = False
    refuses: bool = False
    stands_in: bool = False


@dataclass(slots=True)
class _Own:
    """What compiles a plan's own kernel, or did.

    Attributes:
        thread: at work on it.
        brief: whether the brief form stands in meanwhile, not the shared kernel.
        queries: of the calls meanwhile.
        times: that it was compiled, for arguments that Triton specialises on.
        failed: whether it did not compile.
    """

    thread: threading.Thread
    brief: bool
    queries: set[StorageWeakRef]
    times: int
    failed: bool = False


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
        garbage.leave_alone()
        try:
            with torch.no_grad(), relaxed(), stream:
                work(*given)
        except Exception as error:  # the launch itself will say so, where somebody asks for it
            logger.debug("%s: nothing was compiled ahead: %s", name, error)

    given = (None if x is None else x.detach() for x in tensors)
    # At the end of the process it is waited for. Said, not left out: a thread inherits it, and PyTorch's autograd threads count as daemons.
    return threading.Thread(target=compile, args=(stream, *given), name=name, daemon=False)


def ways(plan: Plan, spec: AttentionSpec, operands: Operands, q: Tensor | None) -> Iterator[Way]:
    """The kernels that may run a plan's call, in the order in which they are to be tried; the last one surely runs.

    First a kernel that is in some cache: the plan's own, the shared one. Where there is none the brief form, which compiles quickly. From
    then on, until its own is compiled, what stood in runs. Its own is waited for under capture; where PyTorch is to tell of every time that the
    host waits for the device; and by a call on the very queries of an earlier one, since that is how times are taken.

    Args:
        plan: of the call.
        spec: of its own kernel.
        operands: of the call.
        q: its queries.
    """
    own = Way(spec)
    # Not where bits are to repeat, which compilers promise of no two kernels; nor a brief form where the caller named the kernel.
    repeats = bool(plan.problem.deterministic)
    share = not repeats and shared_masks.may_stand_in(plan)
    be_brief = not repeats and plan.config_source != "explicit" and _may_be_brief(plan, spec)
    if q is None or not (share or be_brief) or not settings.read().stand_ins:
        yield own
        return
    with _lock:
        known = _own.get(_kernel(plan, spec))
    alive = known is not None and known.thread.is_alive()
    if known is not None and alive:
        query = StorageWeakRef(q.untyped_storage())
        if capturing(q.device) or query in known.queries or (_on_a_gpu(q.device) and torch.cuda.get_sync_debug_mode()):
            with garbage.as_ever():
                known.thread.join()
            yield own
            return
        known.queries.add(query)
        share &= not known.brief
    elif capturing(q.device) or (known is not None and (known.failed or not be_brief or known.times >= _MOST_TIMES)):
        yield own
        return
    # Once for all ways: what a second look finds would have to be compared with this, on the device.
    made = operands.of_mods(plan.problem, plan.config, surely=alive) if share else None
    if be_brief and not alive:
        yield Way(spec, made, refuses=True)
    shared = None if made is None else shared_masks.stand_in(plan, made)
    if shared is not None:
        yield Way(shared, made, refuses=be_brief, stands_in=True)
    yield Way(spec, made, brief=be_brief, stands_in=be_brief)


def _may_be_brief(plan: Plan, spec: AttentionSpec) -> bool:
    """Whether a plan's kernel has a brief form."""
    return plan.target.backend != "cpu" and bool(by_name(plan.variant).brief(spec))


def compile_own(
    plan: Plan,
    way: Way,
    spec: AttentionSpec,
    launch: Callable[[], Callable[..., None]],
    arguments: tuple[Tensor | None, ...],
    values: Mapping[str, Any],
    before: Callable[[], threading.Thread | None],
) -> None:
    """Compile a plan's own kernel in a thread, once for what a call specialises on.

    Args:
        plan: what another kernel stands in for.
        way: that other kernel.
        spec: of its own.
        launch: builds the rendered launch.
        arguments, values: what it takes.
        before: what compiles something that is needed sooner, if anything does.
    """

    def work(*given: Tensor | None) -> None:
        if sooner is not None:
            sooner.join()
        try:
            with compiling.compiling_only():
                launch()(*given, **values)
        except Exception as error:
            own.failed = True
            logger.warning(
                "%s did not compile beside what stands in for it, so the next call waits: %s", spec.key, error
            )

    with _lock:
        known = _own.get(_kernel(plan, spec))
        if known is not None and known.thread.is_alive():
            return
        if len(_own) >= _MOST:
            _own.clear()
        sooner = before()
        thread = compile_beside(work, "flashgen-own", *arguments)
        queries = {StorageWeakRef(x.untyped_storage()) for x in arguments[:1] if x is not None}
        own = _Own(thread, way.brief, queries, 1 if known is None else known.times + 1)
        _own[_kernel(plan, spec)] = own
        thread.start()


def settle() -> None:
    """Wait until nothing stands in for a call's own kernel: who takes times wants the ones of that."""
    for own in list(_own.values()):
        own.thread.join()


def _on_a_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _kernel(plan: Plan, spec: AttentionSpec) -> tuple[Any, ...]:
    return spec, plan.config, plan.target.name
