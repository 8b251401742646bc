"""The backward beside its peers on a Hopper GPU: bf16, 16k tokens, hidden size 2048, through the harness of `flashgen bench`.

    python benchmarks/hopper_backward.py --dry-run
    python benchmarks/hopper_backward.py --csv benchmarks/results/h200_backward.csv --budget-s 540
    python benchmarks/hopper_backward.py --csv benchmarks/results/h200_backward_portable.csv --backend triton --lengths 2048,8192

Head dims 64, 128, 256 x lengths 2k to 16k x full and causal, then 192/128 at two lengths: 28 cells. Every contestant computes dq, dk and dv of one
output through autograd; flashgen twice, `flashgen` in its fastest order of sums and `flashgen-ordered` with `deterministic=True`, whose bits repeat.
Cells and budget are `hopper_forward.py`'s, `--compile` too. Exit code 0 done, 1 something is wrong or cells are left, 130 Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import side_by_side
from fa3_library import FlashAttention3

from flashgen.peers import NAMES, Flashgen, choose
from flashgen.problem import Problem

TOKENS, HIDDEN = 16384, 2048
WIDTHS = ((128, 128), (64, 64), (256, 256))
LENGTHS = (4096, 8192, 2048, 16384)
UNEQUAL, UNEQUAL_LENGTHS = (192, 128), (8192, 2048)


def cells(device: str, lengths: Sequence[int] = LENGTHS) -> Iterator[Problem]:
    """All problems, the most telling first; unequal head dims last, since few peers take them."""
    plain = [(length, widths) for length in LENGTHS for widths in WIDTHS]
    for length, (head_dim, head_dim_v) in (*plain, *((length, UNEQUAL) for length in UNEQUAL_LENGTHS)):
        if length not in lengths:
            continue
        for causal in (True, False):
            heads = HIDDEN // head_dim_v
            yield Problem(
                dtype="bf16",
                batch=TOKENS // length,
                seqlen_q=length,
                seqlen_k=length,
                num_heads_q=heads,
                num_heads_kv=heads,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                causal=causal,
                device=device,
            )


@click.command()
@click.option(
    "--csv", "path", type=click.Path(path_type=Path), help="Append to this file; its cells are not run again."
)
@click.option("--budget-s", type=click.FloatRange(min=1), default=540.0, show_default=True, help="Wall-clock seconds.")
@click.option("--peers", default="fa4,sdpa-cudnn,sdpa-flash", show_default=True, help=f"Of {', '.join(NAMES)}, or all.")
@click.option(
    "--fa3-library",
    type=click.Path(path_type=Path, exists=True),
    help="FlashAttention 3's shared library (fa3_library.py), one more peer.",
)
@click.option("--backend", default="auto", show_default=True, help="Of flashgen.")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--head-dim", type=click.Choice(["64", "128", "192", "256"]), help="Cells of this one alone.")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, help="Cells of these alone.")
@click.option("--dry-run", is_flag=True, help="List the cells that would run, and run none.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the list as JSON.")
@click.option("--compile", "ahead", is_flag=True, help="Compile alone, all kernels side by side.")
@click.option("--prepare", "shard", type=int, hidden=True, help="One kernel's cells, called once.")
def main(
    path: Path | None,
    budget_s: float,
    peers: str,
    fa3_library: Path | None,
    backend: str,
    rounds: int,
    head_dim: str | None,
    lengths: str,
    dry_run: bool,
    as_json: bool,
    ahead: bool,
    shard: int | None,
) -> int:
    """Time the backward of 28 cells beside every installed peer."""
    chosen = [int(length) for length in lengths.split(",")]
    if odd := sorted(set(chosen) - set(LENGTHS)):
        raise click.BadParameter(
            f"{odd[0]} is no length of this table, which has {', '.join(map(str, sorted(LENGTHS)))}."
        )
    todo = side_by_side.missing(list(cells("cuda", chosen)), "attention_bwd", path)
    todo = [problem for problem in todo if head_dim in (None, str(problem.head_dim))]
    if dry_run:
        side_by_side.show(todo, as_json)
        return 0
    side_by_side.need_gpu()
    own = [Flashgen(backend), Flashgen(backend, deterministic=True)]
    contestants = [
        *(own[:1] if backend == "triton" else own),
        *choose(peers.split(",")),
    ]  # triton's has one order of sums
    if fa3_library is not None:
        contestants.append(FlashAttention3(fa3_library))
    if shard is not None:
        side_by_side.prepare(side_by_side.shards(todo)[shard], "attention_bwd", contestants)
        return 0
    if ahead:
        return side_by_side.prepare_apart(len(side_by_side.shards(todo)))
    return side_by_side.run(todo, "attention_bwd", contestants, path=path, budget_s=budget_s, rounds=rounds)


if __name__ == "__main__":
    raise SystemExit(side_by_side.exit_code(main))
