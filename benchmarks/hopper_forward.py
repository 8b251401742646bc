"""The forward beside its peers on a Hopper GPU: bf16, 16k tokens, hidden size 2048, through the harness of `flashgen bench`.

    python benchmarks/hopper_forward.py --dry-run
    python benchmarks/hopper_forward.py --csv benchmarks/results/h200_forward.csv --budget-s 540
    python benchmarks/hopper_forward.py --peers sdpa-flash,flex --flex-tiles FOLDER --fa3-library FILE --compile     # and without --compile, with --csv

Head dims 64, 128, 256 x lengths 1k to 16k x full and causal, and head dim 128 again with 4 query heads per key/value head: 40 cells.
Cells run from the one that says most to the one that says least, each as a whole, until the budget is spent; a second run with the
same CSV goes on with the cells that are missing. `--compile` first fills the compilers' caches, a process a kernel, and times nothing.
FlexAttention is autotuned in each cell, or, with `--flex-tiles`, once for the lengths of a kernel, at the first of them, by `--compile`.
Exit code 0 done, 1 something is wrong or cells are left, 130 Ctrl-C.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import hopper_freeform
import side_by_side
from fa3_library import FlashAttention3

from flashgen.peers import NAMES, BenchOp, Flashgen, Peer, choose
from flashgen.peers.flex import Flex
from flashgen.peers.inputs import Inputs
from flashgen.problem import Problem

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (128, 64, 256)
LENGTHS = (4096, 8192, 2048, 16384, 1024)
GROUP = 4


def cells(device: str) -> Iterator[Problem]:
    """All problems, the most telling first: middle lengths and head dim 128 before extremes."""
    for length in LENGTHS:
        for head_dim, group in ((HEAD_DIMS[0], 1), (HEAD_DIMS[0], GROUP), *((dim, 1) for dim in HEAD_DIMS[1:])):
            for causal in (True, False):
                heads = HIDDEN // head_dim
                yield Problem(
                    dtype="bf16",
                    batch=TOKENS // length,
                    seqlen_q=length,
                    seqlen_k=length,
                    num_heads_q=heads,
                    num_heads_kv=heads // group,
                    head_dim=head_dim,
                    head_dim_v=head_dim,
                    causal=causal,
                    device=device,
                )


class TunedFlex(Flex):
    """FlexAttention with a tile per kernel, whatever the length.

    Args:
        folder: of the tiles, a file a kernel; what has none is autotuned in each cell.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _file(self, problem: Problem) -> Path:
        return self._folder / f"{problem.spec.key}-{problem.num_heads_q // problem.num_heads_kv}.json"

    def tile(self, problem: Problem) -> dict[str, Any] | None:
        file = self._file(problem)
        return json.loads(file.read_text()) if file.exists() else None

    def detail(self, problem: Problem, op: BenchOp) -> str:
        tile = self.tile(problem)
        if tile is None:
            return "max-autotune-no-cudagraphs"
        return ", ".join(f"{name.removeprefix('fwd_')} {value}" for name, value in tile.items())

    def tune(self, problem: Problem) -> None:
        """max-autotune one problem and keep the winner."""
        import torch
        from torch._inductor.select_algorithm import add_feedback_saver

        if self.tile(problem) is not None:
            return
        found: list[dict[str, Any]] = []
        add_feedback_saver(lambda timings, name, *_, **__: found.append(hopper_freeform.choice_of(timings, name)))
        self.prepare(problem, "attention_fwd", Inputs(problem, "attention_fwd", cache=0, memory=0).of("bhsd")[:1])[0]()
        torch.cuda.synchronize()
        if tile := hopper_freeform.options_of(found):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file(problem).write_text(json.dumps(tile) + "\n")


def contestants(backend: str, peers: str, flex_tiles: Path | None, fa3: Path | None) -> list[Peer]:
    """flashgen, then its peers."""
    found = [Flashgen(backend), *choose(peers.split(","))]
    if flex_tiles is not None:
        found = [TunedFlex(flex_tiles) if isinstance(peer, Flex) else peer for peer in found]
    return [*found, FlashAttention3(fa3)] if fa3 is not None else found


def tune_flex(todo: Sequence[Problem], peers: Sequence[Peer]) -> None:
    """Tiles of one kernel, if FlexAttention is asked to have them."""
    for peer in peers:
        if isinstance(peer, TunedFlex):
            try:
                peer.tune(todo[0])
            except Exception as error:  # its cells say it again, and are autotuned one by one
                click.echo(f"{todo[0]}: {peer.name} was not tuned: {type(error).__name__}: {error}"[:300])


@click.command()
@click.option(
    "--csv", "path", type=click.Path(path_type=Path), help="Append to this file; its cells are not run again."
)
@click.option("--budget-s", type=click.FloatRange(min=1), default=540.0, show_default=True, help="Wall-clock seconds.")
@click.option(
    "--peers",
    default="sdpa-flash,sdpa-cudnn,flex,fa2,fa3,fa4",
    show_default=True,
    help=f"Of {', '.join(NAMES)}, or all.",
)
@click.option(
    "--flex-tiles", type=click.Path(path_type=Path), help="Folder of FlexAttention's tiles; --compile fills it."
)
@click.option(
    "--fa3-library",
    type=click.Path(path_type=Path, exists=True),
    help="FlashAttention 3's shared library (fa3_library.py), one more peer.",
)
@click.option("--backend", default="auto", show_default=True, help="Of flashgen.")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--cuda-graph", is_flag=True, help="Time replays: host time vanishes.")
@click.option("--head-dim", type=click.Choice([str(dim) for dim in HEAD_DIMS]), help="Cells of this one alone.")
@click.option("--dry-run", is_flag=True, help="List the cells that would run, and run none.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the list as JSON.")
@click.option("--compile", "ahead", is_flag=True, help="Compile alone, all kernels side by side.")
@click.option("--prepare", "shard", type=int, hidden=True, help="One kernel's cells, called once.")
def main(
    path: Path | None,
    budget_s: float,
    peers: str,
    flex_tiles: Path | None,
    fa3_library: Path | None,
    backend: str,
    rounds: int,
    cuda_graph: bool,
    head_dim: str | None,
    dry_run: bool,
    as_json: bool,
    ahead: bool,
    shard: int | None,
) -> int:
    """Time the forward of 40 cells beside every installed peer."""
    todo = side_by_side.missing(list(cells("cuda")), "attention_fwd", path)
    todo = [problem for problem in todo if head_dim in (None, str(problem.head_dim))]
    if dry_run:
        side_by_side.show(todo, as_json)
        return 0
    side_by_side.need_gpu()
    entrants = contestants(backend, peers, flex_tiles, fa3_library)
    if shard is not None:
        some = side_by_side.shards(todo)[shard]
        tune_flex(some, entrants)
        side_by_side.prepare(some, "attention_fwd", entrants)
        return 0
    if ahead:
        return side_by_side.prepare_apart(len(side_by_side.shards(todo)))
    return side_by_side.run(
        todo, "attention_fwd", entrants, path=path, budget_s=budget_s, rounds=rounds, cuda_graph=cuda_graph
    )


if __name__ == "__main__":
    raise SystemExit(side_by_side.exit_code(main))
