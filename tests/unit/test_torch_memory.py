"""Memory of the torch backend at 32k tokens: peak of a process over what it had before, in units of q + k + v + out.

Every option, one long sequence and many short ones. Windows keep a run short: scores outside them are never made, so they
cannot lower the peak of a step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

FORWARD, WITH_BACKWARD = 4.0, 8.0

# One process imports torch once and forks for each case; a fork's peak starts at what it holds then.
PROBE = """
import json, os, resource, sys
import torch, flashgen

torch.set_num_threads(1)
W = dict(window_size=(128, 0))
HEADS, DIM = 2, 64
STRIPES = lambda b, h, i, j: (i + j) % 3 != 0
SLOPED = lambda s, b, h, i, j: s * (1 + 0.001 * (i - j))
SMALL = dict(batch=64, heads_kv=2, dtype=torch.bfloat16)
CASES = {
    "window": W,
    "causal, window": dict(causal=True, **W),
    "top-left causal, fused": dict(batch=16, causal=True),
    "softcap, alibi": dict(softcap=20.0, alibi_slopes=torch.rand(HEADS), **W),
    "dropout": dict(dropout_p=0.1, **W),
    "score_mod": dict(score_mod=SLOPED, **W),
    "mask_mod": dict(mask_mod=STRIPES, **W),
    "bias, sinks": dict(bias=torch.randn(1, HEADS, 1, 32768).requires_grad_(), sinks=torch.randn(HEADS).requires_grad_(), **W),
    "packed": dict(packed=True, **W),
    "short, plain": dict(SMALL, softcap=20.0),
    "short, all": dict(SMALL, softcap=20.0, alibi_slopes=torch.rand(HEADS), dropout_p=0.1, score_mod=SLOPED, mask_mod=STRIPES),
}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(q, k, v, packed=False, **options):
    if packed:
        ends = torch.tensor([0, len(q) // 2, len(q) // 2, len(q)], dtype=torch.int32)
        return flashgen.varlen_attention(q, k, v, ends, ends, len(q), len(q), **options)
    if "bias" in options:
        options["bias"] = options["bias"][..., : k.shape[1]]
    return flashgen.attention(q, k, v, **options)


def measure(batch=1, heads_kv=1, dtype=torch.float32, packed=False, **options):
    shapes = [(batch, 32768 // batch, heads, DIM) for heads in (HEADS, heads_kv, heads_kv)]
    small = [torch.randn(1, 64, *shape[2:], dtype=dtype, requires_grad=True) for shape in shapes]
    large = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    if packed:
        small, large = ([x.detach()[0].requires_grad_() for x in given] for given in (small, large))
    run(*small, packed=packed, **options).sum().backward()
    sizes = [x.numel() * x.element_size() for x in large]
    # What the process holds now, without the inputs.
    base = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") - sum(sizes)
    with torch.no_grad():
        run(*large, packed=packed, **options)
    forward = peak() - base
    out = run(*large, packed=packed, **options)
    out.backward(torch.ones_like(out))
    unit = sum(sizes) + sizes[0]
    return forward / unit, (peak() - base) / unit


found = {}
for name in sys.argv[1:] or CASES:
    case = CASES[name]
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(measure(**case)).encode())
        os._exit(0)
    os.close(write)
    found[name] = json.loads(os.read(read, 1000) or "null")
    os.wait()
print(json.dumps(found))
"""


# One long sequence and many short ones.
SAMPLE = ("causal, window", "short, plain")


@pytest.mark.parametrize("names", [SAMPLE, pytest.param((), marks=pytest.mark.long)], ids=["a sample", "all"])
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_at_32k_tokens(names: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert len(found) == (len(names) or 11) and all(found.values()), found
    # Both measures must at least hold q, k, v and out: a smaller one would mean that nothing was measured.
    wrong = {name: x for name, x in found.items() if not (1.0 <= x[0] < FORWARD and x[0] <= x[1] < WITH_BACKWARD)}
    assert not wrong, (wrong, found)
    print({name: tuple(round(value, 2) for value in x) for name, x in found.items()})
