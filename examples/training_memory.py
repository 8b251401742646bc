"""What a training step holds in memory: the count of `flashgen memory --train`, held to a real transformer, four ways in two precisions.

python examples/training_memory.py                  # a minute on a CPU
python examples/training_memory.py --device cuda --batch 4 --seqlen 2048 --hidden 1024 --heads 16 --vocab 8192 --json memory.json

Saved for the backward is seen by saved-tensor hooks: different storages, parameters apart. The peak of forward and backward is, on a GPU, what
the caching allocator says, and on a CPU the running sum of every allocation and release that torch's profiler records: unlike a process's resident
memory it is exact to the byte, and unlike a dispatch mode it sees what operators allocate inside. Exits 1 where count and measurement differ by more than 5 %.
A file of `--json` from the same machine and model is completed: what it holds is counted again, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import flashgen
from flashgen.memory import Shape, Strategy, fused_kernels, size, step, torch_backend

TOLERANCE = 0.05
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that keeps q, k, v, out and lse."""
    out = flashgen.attention(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    return out


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as eager code writes it: softmax in fp32, its result cast back."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT
    scores = scores * q.shape[-1] ** -0.5
    scores = scores + scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    probabilities = torch.softmax(scores.float(), dim=-1)
    del scores
    return (probabilities.to(v.dtype) @ v).transpose(1, 2)


class Block(nn.Module):
    """Norm, attention, residual; norm, MLP, residual."""

    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = shape.heads_q, attention
        self.norm_1, self.norm_2 = nn.LayerNorm(shape.hidden), nn.LayerNorm(shape.hidden)
        self.qkv = nn.Linear(shape.hidden, shape.qkv_width, bias=False)
        self.proj = nn.Linear(shape.attention_width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.hidden, shape.mlp_width, bias=False)
        self.down = nn.Linear(shape.mlp_width, shape.hidden, bias=False)

    def attend(self, qkv: Tensor) -> Tensor:
        """(batch, seqlen, 3 * hidden) to (batch, seqlen, hidden)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.attention(q, k, v).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, hidden) to the same."""
        x = x + self.proj(self.attend(self.qkv(self.norm_1(x))))
        x = x + self.down(functional.gelu(self.up(self.norm_2(x))))
        return x


class Transformer(nn.Module):
    """A GPT whose layers may keep their input alone."""

    def __init__(self, shape: Shape, strategy: Strategy) -> None:
        super().__init__()
        attention = flash if strategy.attention == "flash" else materialised
        self.checkpoint = strategy.checkpoint
        self.tokens, self.positions = (nn.Embedding(n, shape.hidden) for n in (shape.vocab, shape.positions))
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, seqlen) to logits (batch, seqlen, vocab)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            # Nothing is drawn at random inside, so no generator's state has to be kept.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if self.checkpoint else block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Training:
    """A model, its optimiser and its data."""

    def __init__(self, shape: Shape, strategy: Strategy) -> None:
        torch.manual_seed(0)
        self.device, self.mixed = strategy.device, strategy.precision == "autocast"
        self.model = Transformer(shape, strategy).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, fused=True
        )  # not fused, it needs temporaries
        # A text that is easy to learn: each token follows from the one before.
        start = torch.randint(shape.vocab, (shape.batch, 1))
        self.text = ((start + 7 * torch.arange(shape.seqlen + 1)) % shape.vocab).to(self.device)

    def forward(self) -> Tensor:
        """The loss of one step."""
        tokens, targets = self.text[:, :-1].contiguous(), self.text[:, 1:].contiguous()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.mixed):
            logits = self.model(tokens)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return loss

    def step(self) -> float:
        """One whole step."""
        loss = self.forward()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def saved(self) -> int:
        """Bytes that the forward leaves for the backward."""
        parameters = {x.untyped_storage().data_ptr() for x in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self.forward()
        del loss
        return sum(count for address, count in kept.items() if address not in parameters)

    def peak(self) -> int:
        """The most bytes at once in forward and backward, beyond what lay there before."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.forward().backward()  # type: ignore[no-untyped-call]
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            self.forward().backward()  # type: ignore[no-untyped-call]
        results: Any = seen.profiler
        events = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
        alive = most = 0
        for _, count in sorted(events, key=lambda event: event[0]):
            alive += count
            most = max(most, alive)
        return most


def compare(shape: Shape, strategy: Strategy, steps: int, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Count one way, then run it, unless what was measured is known."""
    if strategy.attention == "flash":
        kernels = fused_kernels(shape) if strategy.device == "cuda" else torch_backend(shape, strategy)
        strategy = replace(strategy, workspace=kernels)
    counted = step(shape, strategy)
    known = known or measure(shape, strategy, steps)
    return {
        "attention": strategy.attention,
        "checkpoint": strategy.checkpoint,
        "precision": strategy.precision,
        "losses": known["losses"],
        "counted": {
            "saved": counted.saved,
            "peak": counted.peak,
            "parameters": counted.parameters,
            "optimizer": counted.optimizer,
        },
        "measured": known["measured"],
        "recomputed_share": counted.recomputed_flops / (3 * counted.flops),
    }


def measure(shape: Shape, strategy: Strategy, steps: int) -> dict[str, Any]:
    """Losses of some steps, then the bytes of one."""
    training = Training(shape, strategy)
    losses = [training.step() for _ in range(steps)]
    saved = training.saved()
    peak = training.peak()
    moments = sum(x.nbytes for state in training.optimizer.state.values() for x in state.values() if x.numel() > 1)
    parameters = sum(x.nbytes for x in training.model.parameters())
    measured = {"saved": saved, "peak": peak, "parameters": parameters, "optimizer": moments}
    return {"losses": losses, "measured": measured}


def way_of(way: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one way from another."""
    return way["precision"], way["checkpoint"], way["attention"]


def held(path: Path | None, head: dict[str, Any], steps: int) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The ways that a file holds of the same machine, release, model and number of steps."""
    if path is None or not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text())
    ways = document.pop("ways")
    if document != head:
        return {}
    return {way_of(way): way for way in ways if len(way["losses"]) == steps}


def main() -> int:
    """Compare all ways and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, default in {
        "batch": 2,
        "seqlen": 512,
        "hidden": 256,
        "heads": 4,
        "layers": 4,
        "vocab": 512,
        "steps": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, in bytes")
    a = parser.parse_args()
    if a.hidden % a.heads or a.steps < 1:
        parser.error(f"--hidden {a.hidden} must be a multiple of --heads {a.heads}, and --steps {a.steps} 1 or more")
    shape = Shape(
        batch=a.batch, seqlen=a.seqlen, hidden=a.hidden, heads_q=a.heads, heads_kv=a.heads, head_dim=a.hidden // a.heads,
        mlp_width=4 * a.hidden, layers=a.layers, causal=True, vocab=a.vocab, positions=a.seqlen,
    )  # fmt: skip

    print("bytes counted / measured (difference); the peak is that of forward and backward, gradients in it")
    print(f"{'':<52}{'saved for the backward':<32}{'peak of a step':<32}again")
    device = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    head = {"device": device, "torch": torch.__version__, "shape": asdict(shape)}
    rows, worst = held(a.json, head, a.steps), 0.0
    for precision, kept, attention in product(("fp32", "autocast"), (False, True), ("materialised", "flash")):
        strategy = Strategy(attention=attention, checkpoint=kept, precision=precision, device=a.device)  # type: ignore[arg-type]
        row = compare(shape, strategy, a.steps, rows.get((precision, kept, attention)))
        rows[way_of(row)] = row
        cells = []
        for figure in ("saved", "peak", "parameters", "optimizer"):
            counted, measured = row["counted"][figure], row["measured"][figure]
            off = counted / measured - 1
            worst = max(worst, abs(off))
            cells.append(f"{size(counted)} / {size(measured)} ({round(100 * off, 1) + 0:+.1f} %)")
        name = f"{attention}{', checkpointed' if kept else ''}, {'bf16 autocast' if precision == 'autocast' else precision}"
        print(f"{name:<52}{cells[0]:<32}{cells[1]:<32}{row['recomputed_share']:.0%}", flush=True)
        if a.json is not None:
            a.json.write_text(json.dumps({**head, "ways": list(rows.values())}, indent=1) + "\n")
    print(f"parameters {cells[2]}, optimiser {cells[3]}; again: FLOPs done twice, of three forwards a step (counted)")
    if worst > TOLERANCE:
        print(f"count and measurement differ by {worst:.1%}, more than {TOLERANCE:.0%}", file=sys.stderr)
        return 1
    print(f"count and measurement agree within {worst:.1%} everywhere")
    return 0


if __name__ == "__main__":
    sys.exit(main())
