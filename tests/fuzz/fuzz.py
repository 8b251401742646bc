"""Random calls over every option at once, judged against the oracle; a failure is shrunk and can be repeated.

    python tests/fuzz/fuzz.py --seeds 1000:500        500 cases from seed 1000 on
    python tests/fuzz/fuzz.py --seconds 600           as many as fit
    python tests/fuzz/fuzz.py --case '{"causal": true}'   exactly this one
    python tests/fuzz/fuzz.py --device cuda --seconds 300 --seeds 0:0   on a GPU, by the Hopper kernel where one covers the case, every third by the portable one
    python tests/fuzz/fuzz.py --device cuda --only backward --seconds 300 --seeds 0:0 --json run.json   gradients alone; counts by kernel and option: `tally.py`

Exit code 1 when a case fails; its last line is the command that repeats the shrunken case. 3: a case left the device unusable, and the rest did not run.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
    if not Path("/proc/driver/nvidia/version").exists():
        # One thread: those of BLAS spin for each other on a machine that others use, and take thirty times as long.
        os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}

from cases import Case, draw
from edges import EDGES
from judge import covered, judge
from tally import Tally

GPU_LENGTHS = (1, 17, 63, 64, 65, 127, 128, 129, 190, 193, 256, 257, 300)
Judge = Callable[[Case], str | None]


def verdict(case: Case, judge: Judge = judge) -> str | None:
    """As `judge`; what a backend raises that it should not raise is a failure too."""
    try:
        return judge(case)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"


def simpler(case: Case) -> Iterator[Case]:
    """Cases one step simpler, the largest steps first: an option away, a size halved, a size less one."""
    plain = Case()
    for field in fields(Case):
        value, simplest = getattr(case, field.name), getattr(plain, field.name)
        if field.name in ("backend", "seed") or value == simplest:
            continue
        yield replace(case, **{field.name: simplest})
    for index in range(len(case.lengths)):
        if len(case.lengths) > 1:
            yield replace(case, lengths=case.lengths[:index] + case.lengths[index + 1 :])
        for axis, size in enumerate(case.lengths[index]):
            for less in _less(size, 0):
                row = list(case.lengths[index])
                row[axis] = less
                row[2] = min(row[1], row[2])
                yield replace(case, lengths=(*case.lengths[:index], tuple(row), *case.lengths[index + 1 :]))  # type: ignore[arg-type]
    for name in ("batch", "seqlen_q", "seqlen_k", "heads_kv", "group", "head_dim", "head_dim_v"):
        for less in _less(getattr(case, name), 1):
            yield replace(case, **{name: less})


def _less(size: int, least: int) -> list[int]:
    return [value for value in dict.fromkeys((size // 2, size - 1)) if least <= value < size]


def shrink(case: Case, judge: Judge = judge, *, seconds: float = 60.0) -> tuple[Case, str]:
    """The simplest case found that still fails in the same tensor or the same way, and what is said of it.

    Raises:
        ValueError: the case does not fail.
    """
    said = verdict(case, judge)
    if said is None:
        raise ValueError(f"there is nothing to shrink, this case passes: {case.dumps()}")
    end, moved = time.monotonic() + seconds, True
    while moved and time.monotonic() < end:
        moved = False
        for candidate in simpler(case):
            found = verdict(candidate, judge)
            if found is not None and found.partition(": ")[0] == said.partition(": ")[0]:  # the same failure
                case, said, moved = candidate, found, True
                break
    return case, said


def for_gpu(seed: int, only: str | None = None) -> Case:
    """A case of more and longer rows, most with head dims that every kernel takes, for the first of gluon, triton, torch that covers it.

    Args:
        seed: every third is for triton first.
        only: `forward` or `backward`; None for what the seed draws.
    """
    case, r = draw(seed), random.Random(seed)
    wide = {"head_dim": r.choice((64, 64, 128, 72, 40, 192, 256)), "strides": r.choice(("dense", "sbhd", "dense"))}
    wide |= {
        "head_dim_v": wide["head_dim"] if r.random() < 0.8 else r.choice((64, 128)),
        "dtype": r.choice(("fp16", "bf16")),
    }
    if max(wide["head_dim"], wide["head_dim_v"]) > 64:
        wide["tile"] = (
            64,
            64,
        )  # the default: a tile was drawn for other head dims, and what they take does not fit these
    longer = {} if case.lengths else {"seqlen_q": r.choice(GPU_LENGTHS), "seqlen_k": r.choice(GPU_LENGTHS)}
    fewer = {"heads_kv": min(2, case.heads_kv), "group": min(2, case.group)}
    case = replace(case, **longer, **fewer, **(wide if r.random() < 0.75 else {}))
    if r.random() < 0.4:  # plain: what the most specialised kernels take
        plain = Case()
        names = ("window", "softcap", "alibi", "sinks", "bias", "bias_inf", "attn_mask", "score_mod", "mask_mod", "block_mask", "dropout_p", "lengths", "seqused")  # fmt: skip
        case = replace(case, **{name: getattr(plain, name) for name in names}, batch=max(1, case.batch))
    grads = dict.fromkeys((case.grad, False)) if only is None else (only == "backward",)
    return first_of(case, ("triton", "gluon") if seed % 3 == 2 else ("gluon", "triton"), grads, seed % 2 == 0)


def first_of(case: Case, backends: Iterable[str], grads: Iterable[bool], ordered: bool) -> Case:
    """The case for the first kernel that covers it on a GPU; for torch where none does."""
    candidates = (
        replace(case, backend=name, grad=grad, deterministic=grad and ordered) for name in backends for grad in grads
    )
    return next((one for one in candidates if covered(one, "cuda")), replace(case, backend="torch"))


def edges_for_gpu(only: str | None) -> list[Case]:
    """The edge cases, for every kernel that covers them; for the Hopper kernels of a head dim, a type and strides that they take."""
    found: dict[Case, None] = {}
    for case, backend in product(EDGES.values(), ("gluon", "triton")):
        if backend == "gluon":
            dtype = "bf16" if case.dtype == "fp32" else case.dtype
            case = replace(case, dtype=dtype, head_dim=64, head_dim_v=64, strides="dense")
        grads = dict.fromkeys((case.grad, False)) if only is None else (only == "backward",)
        one = first_of(case, (backend,), grads, case.deterministic)
        if one.backend != "torch":
            found[one] = None
    return list(found)


def settled(case: Case) -> Case:
    """The case for the first kernel that covers it: a Hopper one with its gradients, then without, then the portable one's."""
    if case.backend != "gluon":
        return case
    candidates = [
        replace(case, backend=name, grad=grad)
        for name in ("gluon", "triton")
        for grad in dict.fromkeys((case.grad, False))
    ]
    return next((one for one in candidates if covered(one)), replace(case, backend="torch"))


def command(case: Case) -> str:
    """What repeats exactly this case, in the root of the checkout."""
    return f"python tests/fuzz/fuzz.py --case {shlex.quote(case.dumps())}"


def report(case: Case, said: str, judge: Judge = judge) -> str:
    """A failure, shrunk, with the command that repeats it as the last line."""
    small, small_said = shrink(case, judge)
    return f"seed {case.seed} failed: {said}\nshrunk: {small_said}\n{command(small)}"


def main(arguments: list[str]) -> int:
    """Run the cases of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", help="one case as JSON")
    parser.add_argument("--seeds", default="0:200", help="first:count")
    parser.add_argument("--seconds", type=float, help="stop after so long; with no --seeds, from seed 0 on")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--only", choices=["forward", "backward"], help="with --device cuda: kernels of this pass alone"
    )
    parser.add_argument(
        "--edges", metavar="N:OF", help="with --device cuda: first this share of the edge cases, 0:1 for all"
    )
    parser.add_argument("--json", type=Path, help="counts and failures into this file, after every case")
    given: Any = parser.parse_args(arguments)
    on = partial(judge, device=given.device)
    if given.case is not None:
        case = Case.loads(given.case)
        said = verdict(case, on)
        print("passed" if said is None else f"failed: {said}\n{command(case)}")
        return 0 if said is None else 1
    first, count = map(int, given.seeds.split(":"))
    end = None if given.seconds is None else time.monotonic() + given.seconds
    tally, failures = Tally(given.json, **about(given.device)), 0
    seeds = range(first, first + (count if end is None else sys.maxsize // 2))
    if given.device == "cpu":
        cases: Iterator[Case] = (settled(draw(seed)) for seed in seeds)
    else:
        share, shares = map(int, (given.edges or "0:0").split(":"))
        edges = edges_for_gpu(given.only)[share::shares] if shares else []
        cases = chain(edges, (for_gpu(seed, given.only) for seed in seeds))
    for case in cases:
        if end is not None and time.monotonic() > end:
            break
        tally.begin(case)
        said = verdict(case, on)
        tally.end(case, said)
        if said is None:
            continue
        failures += 1
        # A step of shrinking is seconds of compiling on a GPU: the case is told as it is.
        text = (
            report(case, said)
            if given.device == "cpu"
            else f"seed {case.seed} failed: {said}\n{command(case)} --device cuda"
        )
        print(text, flush=True)
        if given.device == "cuda" and not usable():
            return 3
    counts = ", ".join(f"{count} {name}" for name, count in sorted(tally.kernels.items()))
    print(f"{tally.kernels.total()} cases, {failures} failed; {counts}")
    return 1 if failures else 0


def about(device: str) -> dict[str, str]:
    """Which card a run was on."""
    if device == "cpu":
        return {"device": device}
    import torch
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def usable() -> bool:
    """Whether the GPU still answers this process: after an illegal access nothing does."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
