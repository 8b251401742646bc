"""Compile the default backward of every option and of every two together, with whatever Triton is first on the path: no GPU.

    python tests/compile_options.py [--targets h100] [--head-dims 64 128] [--jobs 1] [NAME ...]

Goldens hold a few kernels with options; here each option and each pair of them is compiled in the configuration that dispatch takes where nothing is
tuned, and a line says how many spill instructions stand in the loops. Exit code 1, with the names, where one spills, is miscompiled or serialised up to
head dim 128 in 16 bit. What was compiled once is kept by its text, configuration and Triton: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from flashgen import dispatch, mods
from flashgen.config import KernelConfig
from flashgen.errors import FlashgenError
from flashgen.facts import inspect
from flashgen.render import render
from flashgen.spec import AttentionSpec, Mods
from flashgen.target import Target
from flashgen.variants import by_name
from flashgen.variants.base import Variant

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "compile_options"
LENGTH, HEADS = 4096, 16
DOCUMENT = torch.arange(LENGTH, dtype=torch.int32) // 500
OF_DISTANCE = torch.zeros(HEADS, 2 * LENGTH, requires_grad=True)
OF_KEY, OF_ROW = (torch.zeros(HEADS, LENGTH, requires_grad=True) for _ in range(2))
OF_HEAD, OF_PAIR = torch.ones(HEADS, requires_grad=True), torch.zeros(LENGTH, LENGTH, requires_grad=True)

# score_mods, most with gradients of what they capture: by distance, key, row, head and pair
SCORES: dict[str, Callable[..., Any]] = {
    "by_distance": lambda s, b, h, i, j: s + OF_DISTANCE[h, i - j + LENGTH],
    "by_key": lambda s, b, h, i, j: s + OF_KEY[h, j],
    "by_row": lambda s, b, h, i, j: s + OF_ROW[h, i],
    "by_head": lambda s, b, h, i, j: s * OF_HEAD[h],
    "by_pair": lambda s, b, h, i, j: s + OF_PAIR[i, j],
    "by_key_and_row": lambda s, b, h, i, j: s * OF_KEY[h, j] + OF_ROW[h, i],
    "capped": lambda s, b, h, i, j: 20.0 * torch.tanh(s / 20.0),
    "sloped": lambda s, b, h, i, j: s - 0.1 * (i - j).abs(),
}
FIELDS = ("window", "softcap", "has_alibi", "has_bias", "has_attn_mask", "dropout", "varlen")
OPTIONS = (*(name.removeprefix("has_") for name in FIELDS), "documents", "block_mask", *SCORES)
# In pairs one score_mod stands for all: the one that leaves least registers.
PAIRED = (*(name for name in OPTIONS if name not in SCORES), "by_distance")


def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A mask of documents: sorted ids of rows and of keys."""
    return (i >= j) & (DOCUMENT[i] == DOCUMENT[j])


@functools.cache
def traced(names: frozenset[str]) -> Mods | None:
    """What the free-form options among these become."""
    score = next((SCORES[name] for name in names if name in SCORES), None)
    masks = {"mask_mod": seen} if "documents" in names else {}
    block = seen if "block_mask" in names else None
    if score is None and not masks and block is None:
        return None
    program, _ = mods.program(score, masks, torch.device("cpu"), block)
    return Mods(digest=program.digest, program=program)


def spec_of(names: tuple[str, ...], head_dim: int, dtype: str, causal: bool) -> AttentionSpec:
    """The backward of a call with these options."""
    fields = {field: True for field in FIELDS if field.removeprefix("has_") in names}
    score = any(name in SCORES for name in names)
    return AttentionSpec(
        op="attention_bwd", dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, causal=causal,  # type: ignore[arg-type]
        has_score_mod=score, has_mask_mod="documents" in names, has_block_mask="block_mask" in names,
        mods=traced(frozenset(names)), **fields,
    )  # fmt: skip


def groups() -> Iterator[tuple[str, ...]]:
    """Every option, and every two."""
    yield from ((name,) for name in OPTIONS)
    yield from itertools.combinations(PAIRED, 2)


def chosen(variant: Variant, spec: AttentionSpec, target: Target) -> KernelConfig:
    """What dispatch takes where nothing is tuned."""
    return dispatch.portfolio_first(variant, spec, target) or variant.default(spec, target)


def compile_one(
    names: tuple[str, ...], head_dim: int, dtype: str, causal: bool, variant_name: str, target_name: str, given: tuple[Any, ...] = ()
) -> tuple[str, int, str]:
    """(configuration, spill instructions in the loops, what else is wrong or "")."""
    variant, target, spec = by_name(variant_name), Target.named(target_name), spec_of(names, head_dim, dtype, causal)
    config = chosen(variant, spec, target)
    if given:
        config = variant.config(**dict(zip((knob.name for knob in variant.knobs), given, strict=True)))
    try:
        facts = inspect(render(spec, variant), target, config)
    except FlashgenError as error:
        return config.label, -1, str(error)[:300]
    wrong = [f"{facts.undefined_registers} registers that nothing wrote"] if facts.undefined_registers else []
    wrong += ["serialised"] if facts.serialised and variant.backend == "gluon" else []
    wrong += ["no main loop"] if not facts.loop else []
    return config.label + f" total={facts.loop.get('total')}", facts.loop_spill_ops, "; ".join(wrong)


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="options, joined by + for two at once; all when left out")
    parser.add_argument("--targets", nargs="+", default=["h100"])
    parser.add_argument("--variant", default="gluon_bwd_sm90")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"])
    parser.add_argument("--causal", nargs="+", type=int, default=[1, 0])
    parser.add_argument("--config", help="tile")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["FLASHGEN_CACHE_DIR"] = str(CACHE)
    given: tuple[Any, ...] = ()
    if arguments.config:
        given = tuple(bool(int(x)) if number > 5 else int(x) for number, x in enumerate(arguments.config.split(",")))
    todo = [tuple(name.split("+")) for name in arguments.names] or list(groups())
    failed, start = [], time.monotonic()
    jobs = list(itertools.product(todo, arguments.head_dims, arguments.dtypes, map(bool, arguments.causal), [arguments.variant], arguments.targets))
    jobs.sort(key=lambda job: (-job[3], -job[1]))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        pool = ProcessPoolExecutor(arguments.jobs)
        futures = [pool.submit(compile_one, *job, given) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            names, head_dim, dtype, causal, variant, target = job
            what = f"{target} {dtype} d{head_dim} {'causal ' if causal else ''}{'+'.join(names)}"
            try:
                label, spills, wrong = future.result()
            except BrokenProcessPool as error:
                label, spills, wrong = "", -1, str(error)
            except ValueError as error:
                label, spills, wrong = "", -1, str(error)
            print(f"{'ok' if not spills and not wrong else 'SPILLS':6} {spills:4} {what} [{label}] {wrong}", flush=True)
            failed += [what] if spills or wrong else []
    print(f"Triton {triton.__version__}: {len(jobs) - len(failed)} of {len(jobs)} in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
