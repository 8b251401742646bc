"""What one warm call of `flashgen.attention` costs the host, without a GPU: everything but the launch itself.

    python benchmarks/host_overhead.py [--check | --launched] [--json]

The tensors are on the CPU and the target is a fake h100, so that a call takes the GPU's path: checks, dispatch, allocation; the rendered
kernel's `launch` is replaced by a no-op. Neither the torch backend nor the interpreter runs. Printed are microseconds a call (the median
of many batches), beside `torch.empty_like(q)` of the same run, since machines differ. --check exits 1 where a warm call takes over
12 us or over 15 times `torch.empty_like(q)`.

--launched times calls with their launches instead, up to a driver that does nothing (`idle_driver.py`; needs a C compiler and compiles the
kernels first): the causal problem of `launch_overhead.py` without autograd, recorded, and with its gradients. Contestants take turns, in the
thread's CPU time, and the least and the median of 40 batches are printed: what else runs on the machine moves the median, not the least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

import flashgen
from flashgen import build, dispatch, warm
from flashgen.target import Target

LIMIT_US, LIMIT_RATIO = 12.0, 15.0
H100 = Target.named("h100")


@contextmanager
def fake_h100() -> Iterator[list[int]]:
    """CPU tensors count as on an h100, and launches as done; yields a counter of launches."""
    launches = [0]

    def no_launch(*_: Any, **__: Any) -> None:
        launches[0] += 1

    real = build.build

    def built(source: Any) -> Any:
        from dataclasses import replace

        return replace(real(source), launch=no_launch)

    dispatch.forget()
    with (
        mock.patch.object(Target, "detect", classmethod(lambda cls, device=None: H100)),
        mock.patch("flashgen.execution.build", built),
        mock.patch("flashgen.warm.build", built),
        mock.patch("flashgen.torch_blocked.forward", side_effect=AssertionError("the torch backend ran")),
        mock.patch("flashgen.interpret.launch", side_effect=AssertionError("the interpreter ran")),
    ):
        yield launches
    dispatch.forget()


def microseconds(call: Callable[[], object], *, batch: int = 200, batches: int = 60) -> float:
    """Median over batches of the mean of a batch."""
    for _ in range(batch):
        call()
    means = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(batch):
            call()
        means.append((time.perf_counter() - start) / batch * 1e6)
    return statistics.median(means)


def run(batches: int = 60) -> dict[str, float]:
    """The figures, in microseconds."""
    q = torch.randn(1, 128, 8, 64, dtype=torch.bfloat16)
    k = torch.randn(1, 128, 2, 64, dtype=torch.bfloat16)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, k)]
    trained = [x.clone().requires_grad_() for x in (q, k, k)]
    figures = {"torch.empty_like(q)": microseconds(lambda: torch.empty_like(q), batches=batches)}
    bias, hidden = torch.randn(8, 128, 128), torch.rand(128, 128) > 0.5
    ids, table = torch.arange(128, dtype=torch.int32) // 40, torch.randn(8, 256)
    ends = torch.tensor([0, 60, 128], dtype=torch.int32)
    mods: dict[str, Any] = {"backend": "triton"}  # by name: for CPU tensors nothing else traces a mod
    calls: dict[str, Callable[[], object]] = {
        "attention(q, k, v, causal=True)": lambda: flashgen.attention(q, k, k, causal=True),
        "... with return_lse": lambda: flashgen.attention(q, k, k, causal=True, return_lse=True),
        "... layout bhsd": lambda: flashgen.attention(*heads_first, causal=True, layout="bhsd"),
        "attention(q, k, v, bias=)": lambda: flashgen.attention(q, k, k, bias=bias),
        "... attn_mask=": lambda: flashgen.attention(q, k, k, attn_mask=hidden),
        "... dropout_p=0.1": lambda: flashgen.attention(q, k, k, dropout_p=0.1),
        "... mask_mod= of numbers, a new lambda each time": lambda: flashgen.attention(
            q, k, k, mask_mod=lambda b, h, i, j: (i - j < 40) & (i >= j), **mods
        ),
        "... mask_mod= that reads document ids": lambda: flashgen.attention(
            q, k, k, mask_mod=lambda b, h, i, j: ids[i] == ids[j], **mods
        ),
        "... score_mod= that reads a table": lambda: flashgen.attention(
            q, k, k, score_mod=lambda s, b, h, i, j: s + table[h, i - j + 128], **mods
        ),
        "varlen_attention(q, k, v, cu_seqlens)": lambda: flashgen.varlen_attention(
            q[0], k[0], k[0], ends, ends, 68, 68
        ),
    }
    with fake_h100() as launches, torch.no_grad():
        for name, call in calls.items():
            before = launches[0]
            figures[name] = microseconds(call, batches=batches)
            if launches[0] - before != 200 * (batches + 1):
                raise SystemExit(f"{name}: {launches[0] - before} launches, not one a call")
        warm.forget()
        with mock.patch.object(warm, "key_of", lambda *_: None):
            figures["... through the operator (what a traced call takes)"] = microseconds(
                calls["attention(q, k, v, causal=True)"], batches=max(3, batches // 6)
            )
    with fake_h100(), mock.patch.dict("os.environ", {"FLASHGEN_ON_FALLBACK": "silent"}):
        figures["... recorded by autograd"] = microseconds(
            lambda: flashgen.attention(*trained, causal=True), batches=max(3, batches // 6)
        )
        dout = torch.ones_like(q)
        figures["... with its gradients"] = microseconds(
            lambda: torch.autograd.grad(flashgen.attention(*trained, causal=True), trained, dout),  # type: ignore[arg-type]
            batches=max(3, batches // 6),
        )
    return figures


def run_launched(batch: int = 200, batches: int = 40) -> dict[str, tuple[float, float]]:
    """Least and median microseconds of calls with their launches."""
    from idle_driver import idle_driver

    q, k, v = (torch.randn(1, 128, 4, 64, dtype=torch.bfloat16) for _ in range(3))
    leaves, dout = [x.clone().requires_grad_() for x in (q, k, v)], torch.ones_like(q)

    def plain(backend: Any) -> Any:
        with torch.no_grad():
            return flashgen.attention(q, k, v, causal=True, backend=backend)

    def recorded(backend: Any) -> Any:
        return flashgen.attention(*leaves, causal=True, backend=backend)

    calls: dict[str, Callable[[], object]] = {"torch.empty_like(q)": lambda: torch.empty_like(q)}
    for backend in ("gluon", "triton"):
        calls[f"{backend}: attention(q, k, v, causal=True)"] = partial(plain, backend)
        calls[f"{backend}: ... recorded by autograd"] = partial(recorded, backend)
        calls[f"{backend}: ... with its gradients"] = lambda backend=backend: torch.autograd.grad(  # type: ignore[misc]
            recorded(backend), leaves, dout
        )
    means: dict[str, list[float]] = {name: [] for name in calls}
    settings = {"FLASHGEN_ON_FALLBACK": "error", "FLASHGEN_STAND_INS": "0", "FLASHGEN_LOG": "error"}
    with (
        mock.patch.object(Target, "detect", classmethod(lambda cls, device=None: H100)),
        mock.patch.dict("os.environ", settings),
        idle_driver() as launches,
    ):
        for name, call in calls.items():
            for _ in range(60):
                call()
            before = launches()
            call()
            wanted = 0 if "empty" in name else 4 if "gradients" in name else 1
            if launches() - before != wanted:
                raise SystemExit(f"{name}: {launches() - before} launches, not {wanted}")
        for _ in range(batches):
            for name, call in calls.items():
                start = time.thread_time()
                for _ in range(batch):
                    call()
                means[name].append((time.thread_time() - start) / batch * 1e6)
    dispatch.forget()
    return {name: (min(values), statistics.median(values)) for name, values in means.items()}


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 over the limits")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--launched", action="store_true", help="with launches, up to a driver that does nothing")
    arguments = parser.parse_args()
    if arguments.launched:
        found = run_launched()
        print(
            json.dumps({"us": found})
            if arguments.json
            else "\n".join(f"{a:9.2f} {b:9.2f} us  {n}" for n, (a, b) in found.items())
        )
        return 0
    figures = run()
    call, empty = figures["attention(q, k, v, causal=True)"], figures["torch.empty_like(q)"]
    ok = call <= LIMIT_US and call <= LIMIT_RATIO * empty
    if arguments.json:
        print(
            json.dumps(
                {"us": figures, "limit_us": LIMIT_US, "limit_ratio": LIMIT_RATIO, "ratio": call / empty, "ok": ok}
            )
        )
    else:
        for name, value in figures.items():
            print(f"{value:9.2f} us  {name}")
        print(
            f"a warm call is {call / empty:.1f} times torch.empty_like(q); wanted: at most {LIMIT_US:g} us and {LIMIT_RATIO:g} times"
        )
    return 0 if ok or not arguments.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
