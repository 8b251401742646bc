"""Host time of one eager call on a GPU, in microseconds: what a small problem waits for. `host_overhead.py` needs no GPU.

    python benchmarks/launch_overhead.py [--json] [--label TEXT]

A problem whose kernel takes less than its launch (batch 1, 128 tokens, 4 heads of 64, bf16); calls are made one after the other without
waiting for the GPU, 500 a batch, and the median of 15 batches is shown, contestants in turns. `launch` is the rendered file's own
function, `attention` the public call around it; `recorded` is the call with inputs that want gradients, `with its gradients` that and the backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import flashgen
from flashgen import Target
from flashgen.build import build
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name


def microseconds(calls: dict[str, Callable[[], object]], *, batch: int = 500, batches: int = 15) -> dict[str, float]:
    """Median over batches of the mean of a batch."""
    means: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(50):
            call()
    for _ in range(batches):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(batch):
                call()
            means[name].append((time.perf_counter() - start) / batch * 1e6)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in means.items()}


def recorded(*plain: Tensor) -> dict[str, Callable[[], object]]:
    """Calls that autograd records, alone and with the backward that follows; of q, k, v as (batch, seqlen, heads, head_dim)."""
    ours = [x.clone().requires_grad_() for x in plain]
    theirs = [x.transpose(1, 2).clone().requires_grad_() for x in plain]

    def sdpa() -> Tensor:
        q, k, v = theirs
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def own() -> Tensor:
        q, k, v = ours
        return flashgen.attention(q, k, v, causal=True)  # type: ignore[return-value]  # no lse is asked for

    douts = torch.ones_like(theirs[0]), torch.ones_like(ours[0])
    return {
        "scaled_dot_product_attention, recorded": sdpa,
        "attention, recorded": own,
        "scaled_dot_product_attention, with its gradients": lambda: torch.autograd.grad(sdpa(), theirs, douts[0]),
        "attention, with its gradients": lambda: torch.autograd.grad(own(), ours, douts[1]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--label", default="", help="said with the figures, e.g. before or after")
    arguments = parser.parse_args()
    target = Target.detect()
    spec = AttentionSpec.from_key("attention_fwd-bf16-d64-causal")
    q, k, v = (torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, heads_first = torch.empty_like(q), [x.transpose(1, 2) for x in (q, k, v)]
    calls: dict[str, Callable[[], object]] = {
        "scaled_dot_product_attention": partial(F.scaled_dot_product_attention, *heads_first, is_causal=True),
        "torch.empty_like": partial(torch.empty_like, q),
    }
    for name in ("gluon_fwd_sm90", "triton_fwd"):
        variant = by_name(name)
        if variant.supports(spec, target) is None:
            launch = build(render(spec, variant)).launch
            config = dict(variant.default(spec, target))
            calls[f"{name} launch"] = partial(launch, q, k, v, out, None, sm_scale=0.125, causal_offset=0, **config)
            calls[f"{name} attention"] = partial(flashgen.attention, q, k, v, causal=True, backend=variant.backend)
    with torch.no_grad():
        figures = microseconds(calls)
    figures |= microseconds(recorded(q, k, v), batch=200)
    if arguments.json:
        print(
            json.dumps(
                {
                    "gpu": torch.cuda.get_device_name(),
                    "triton": triton.__version__,
                    "label": arguments.label,
                    "us": figures,
                }
            )
        )
        return 0
    for name, value in figures.items():
        print(f"{value:9.2f} us  {name}")
    print(
        f"{arguments.label} {torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}".strip()
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
