"""The other end of `measured.GpuWorker`: a process with a CUDA context that checks and times what it is sent."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from typing import Any

from flashgen import gradients
from flashgen.bench import Timer, measure, measure_interleaved
from flashgen.build import build
from flashgen.interpret_worker import receive, send
from flashgen.problem import Problem
from flashgen.render import KernelSource
from flashgen.spec import AttentionSpec
from flashgen.tuner.measured import CENSOR_FACTOR, times_json

# After these a CUDA context answers every call with the same error: the process has to go.
_STICKY = (
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "CUDA error",
    "hardware",
)


@dataclass(slots=True)
class _Case:
    """The inputs and the outputs of one problem, made once."""

    key: str
    launch: Any
    arguments: tuple[Any, ...]
    outputs: tuple[Any, ...]
    scalars: dict[str, Any]
    checked: dict[str, Any]


def main(requests: int, replies: int) -> None:
    """Serve until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        timer = Timer()
    except Exception as error:
        send(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    send(replies, {"pid": os.getpid()})
    case: _Case | None = None
    while (request := receive(requests)) is not None:
        try:
            if case is None or case.key != request["key"]:
                case = _prepare(request)
            reply = _trial(case, timer, request) if request["do"] == "trial" else _final(case, timer, request)
        except Exception as error:
            reply = _failure(error)
        try:
            send(replies, reply)
        except BrokenPipeError:
            return  # the parent is gone


def _failure(error: Exception) -> dict[str, Any]:
    text = f"{type(error).__name__}: {error}"
    module = type(error).__module__
    status = "crashed"
    if type(error).__name__ == "OutOfResources" or "out of memory" in text.lower():
        status = "out_of_resources"
    elif module.startswith("triton") or type(error).__name__ in ("BuildError", "CompilationError"):
        status = "compile_error"
    sticky = any(word in text for word in _STICKY) and status == "crashed"
    return {"status": status, "message": text[:500], "sticky": sticky}


def _prepare(request: dict[str, Any]) -> _Case:
    import torch

    fields = dict(request["problem"])
    fields |= {"window_size": tuple(fields["window_size"]), "copies": tuple(fields["copies"])}
    problem = Problem(**fields)
    source = KernelSource(
        text=request["text"], spec=AttentionSpec.from_key(request["spec"]), variant=request["variant"]
    )
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[problem.dtype]
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(seqlen: int, heads: int, head_dim: int) -> Any:
        # Normal data: zeros draw less power and clock higher than what users run.
        return torch.randn((problem.batch, seqlen, heads, head_dim), dtype=dtype, device="cuda", generator=generator)

    q = draw(problem.seqlen_q, problem.num_heads_q, problem.head_dim)
    k = draw(problem.seqlen_k, problem.num_heads_kv, problem.head_dim)
    v = draw(problem.seqlen_k, problem.num_heads_kv, problem.head_dim_v)
    if source.spec.op == "attention_bwd":
        return _Case(
            request["key"], build(source).launch, *_backward(problem, q, k, v, generator), {"spec": source.spec}
        )
    out = torch.empty((*q.shape[:3], problem.head_dim_v), dtype=dtype, device="cuda")
    lse = None
    if problem.spec.has_lse:
        lse = torch.empty((problem.batch, problem.num_heads_q, problem.seqlen_q), dtype=torch.float32, device="cuda")
    scalars = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset}
    return _Case(request["key"], build(source).launch, (q, k, v, out, lse), (out,), scalars, {"spec": source.spec})


def _backward(
    problem: Problem, q: Any, k: Any, v: Any, generator: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Arguments, outputs and scalars of a backward; out and lse are those of the blocked torch forward."""
    import torch

    from flashgen import torch_blocked

    out = torch.empty((*q.shape[:3], problem.head_dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((problem.batch, problem.num_heads_q, problem.seqlen_q), dtype=torch.float32, device=q.device)
    scalars = {"sm_scale": problem.scale, "causal_offset": problem.causal_offset}
    options = torch_blocked.Options(sm_scale=problem.scale, causal=problem.causal, offset=problem.causal_offset)
    torch_blocked.forward(q, k, v, options, out, lse)
    dout = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    return (dout, None, q, k, v, out, lse, *gradients), gradients, scalars


def _runner(case: _Case, config: dict[str, Any]) -> Any:
    return partial(case.launch, *case.arguments, **case.scalars, **config)


def _trial(case: _Case, timer: Timer, request: dict[str, Any]) -> dict[str, Any]:
    import torch

    # Dense strides are what is timed; every other kind of stride would compile the candidate once more.
    launch = partial(case.launch, **request["config"])
    report = gradients.check_launch(launch, case.checked["spec"], device="cuda", strides=("dense",))
    verdict = {"max_abs_error": report.max_error, "error_ratio": report.ratio}
    if not report.ok:
        return {"status": "wrong_result", "message": report.message[:500], **verdict}
    run = _runner(case, request["config"])
    run()
    torch.cuda.synchronize()
    before = [out.clone() for out in case.outputs]
    screen = timer.once(run)
    best = request["best_ms"]
    if best is not None and screen > CENSOR_FACTOR * best:
        return {
            "status": "censored",
            "message": f"one launch took {screen:.4g} ms, over {CENSOR_FACTOR:g} times the best so far",
            **verdict,
        }
    for out in case.outputs:
        out.fill_(float("nan"))
    times = measure(run, once=timer.once)
    if not all(torch.equal(out, old) for out, old in zip(case.outputs, before, strict=True)):
        return {"status": "wrong_result", "message": "launches of the same inputs differ", **verdict}
    return {"status": "ok", **verdict, **times_json(times)}


def _final(case: _Case, timer: Timer, request: dict[str, Any]) -> dict[str, Any]:
    runs = {str(index): _runner(case, config) for index, config in enumerate(request["configs"])}
    times = measure_interleaved(runs, once=timer.once)
    return {"status": "ok", "times": [times_json(times[name]) for name in runs]}
