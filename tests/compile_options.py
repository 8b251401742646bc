"""Compile the default backward of every option and of every two together, with whatever Triton is first on the path: no GPU.

    python tests/compile_options.py [--targets h100] [--head-dims 128 64] [--alone] [--record FILE.csv] [OPTION+OPTION ...]

Goldens hold a few kernels with options; here each option and each pair is compiled in the configuration that dispatch takes where nothing is tuned,
and a line says how many spill instructions stand in its loop. Exit code 1, with the names, where one option alone spills more than stands in OPEN, or
any kernel reads a register that nothing wrote or is serialised. What two options spill is told, and kept by --record: at head dim 128 the tile that
spills nothing is slower (benchmarks/results/h200_backward_option_tiles.csv). What was compiled once is kept, by its text, configuration and Triton, in
.cache: the first run takes half an hour, the next one seconds.
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
from compile_goldens import record

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
# (Triton, padded head dim, option) -> spill instructions at most: addresses of a whole kernel that a step reads back. Beside `by_head`, whose masked loop is
# counted, they are 12 and 9 in the other one; with a stride that no contiguous table has, of which calls make a constant, it had been 25 and 51.
OPEN: dict[tuple[str, int, str], int] = {
    ("3.6.0", 64, "varlen"): 1,
    ("3.6.0", 128, "bias"): 5,
    ("3.6.0", 128, "by_head"): 34,
    ("3.9.0", 64, "alibi"): 1,
    ("3.9.0", 64, "block_mask"): 3,
    ("3.9.0", 64, "by_key_and_row"): 11,
    ("3.9.0", 64, "varlen"): 3,
    ("3.9.0", 64, "window"): 1,
    ("3.9.0", 128, "block_mask"): 3,
    ("3.9.0", 128, "by_head"): 54,
    ("3.9.0", 128, "capped"): 22,
    ("3.9.0", 128, "documents"): 8,
    ("3.9.0", 128, "softcap"): 1,
}
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
    for pair in itertools.combinations(PAIRED, 2):
        if pair != ("varlen", "block_mask"):  # BlockMasks have no packed sequences
            yield pair


def chosen(variant: Variant, spec: AttentionSpec, target: Target) -> KernelConfig:
    """What dispatch takes where nothing is tuned."""
    return dispatch.portfolio_first(variant, spec, target) or variant.default(spec, target)


def compile_one(
    names: tuple[str, ...],
    head_dim: int,
    dtype: str,
    causal: bool,
    variant_name: str,
    target_name: str,
    given: str = "",
) -> tuple[str, int, str]:
    """(configuration and instructions of its loop, spill instructions in it, what else is wrong or "")."""
    variant, target = by_name(variant_name), Target.named(target_name)
    spec = spec_of(names, head_dim, dtype, causal)
    config = chosen(variant, spec, target)
    if given:
        values: list[Any] = [
            bool(int(x)) if isinstance(config[knob.name], bool) else int(x)
            for knob, x in zip(variant.knobs, given.split(","), strict=True)
        ]
        config = variant.config(**dict(zip((knob.name for knob in variant.knobs), values, strict=True)))
    try:
        facts = inspect(render(spec, variant), target, config)
    except FlashgenError as error:
        return config.label, 0, str(error)[:300]
    wrong = [f"{facts.undefined_registers} instructions read what nothing wrote"] if facts.undefined_registers else []
    wrong += ["its products are serialised"] if facts.serialised and variant.backend == "gluon" else []
    wrong += ["no main loop was found"] if not facts.loop else []
    return f"{config.label}, {facts.loop.get('total', 0)} instructions", facts.loop_spill_ops, "; ".join(wrong)


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="options, joined by + for several at once; all and all pairs when left out"
    )
    parser.add_argument("--targets", nargs="+", default=["h100"], help="GPUs, see `flashgen show targets`")
    parser.add_argument("--variant", default="gluon_bwd_sm90")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"])
    parser.add_argument("--full", action="store_true", help="without a causal mask, too")
    parser.add_argument("--alone", action="store_true", help="each option alone, no pairs")
    parser.add_argument(
        "--record", type=Path, metavar="FILE.csv", help="keep the spills in the loop of each kernel there"
    )
    parser.add_argument("--config", default="", help="values of the knobs in their order, instead of the default")
    arguments = parser.parse_args()
    todo = [tuple(name.split("+")) for name in arguments.names] or [
        names for names in groups() if len(names) == 1 or not arguments.alone
    ]
    unknown = {name for names in todo for name in names} - set(OPTIONS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no option; there are {', '.join(OPTIONS)}")
    causal = (True, False) if arguments.full else (True,)
    sizes = itertools.product(causal, arguments.head_dims, arguments.dtypes, arguments.targets, todo)
    jobs = [(names, dim, dtype, is_causal, arguments.variant, target) for is_causal, dim, dtype, target, names in sizes]
    failed, start = [], time.monotonic()
    os.environ["FLASHGEN_CACHE_DIR"] = str(CACHE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for job in jobs:
            names, head_dim, dtype, is_causal, _, target = job
            what = f"{target} {dtype} d{head_dim} {'causal ' if is_causal else ''}{'+'.join(names)}"
            with ProcessPoolExecutor(1) as pool:  # a compiler that dies takes its process with it
                try:
                    label, spills, wrong = pool.submit(compile_one, *job, arguments.config).result()
                except BrokenProcessPool as error:
                    label, spills, wrong = "", 0, str(error)
            known = len(names) > 1 or spills <= OPEN.get(
                (triton.__version__, 64 if head_dim <= 64 else 128, names[0]), 0
            )
            if arguments.record and not wrong and not arguments.config:
                kernel = f"{arguments.variant} {dtype} d{head_dim}{' causal' if is_causal else ''} {'+'.join(names)}"
                record(arguments.record, (triton.__version__, Target.named(target).arch, kernel, str(spills)))
            state = "FAILED" if wrong or not known else "known" if spills else "ok"
            print(f"{state:6} {spills:4} {what} [{label}] {wrong}".rstrip(), flush=True)
            failed += [f"{what}: {wrong or f'{spills} spill instructions'}"] if state == "FAILED" else []
    seconds = time.monotonic() - start
    print(
        f"Triton {triton.__version__}: {len(jobs) - len(failed)} of {len(jobs)} as they should be, in {seconds:.0f} s"
    )
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
