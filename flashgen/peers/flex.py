"""FlexAttention, compiled: the peer that generates its kernels too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgen.peers.base import BenchOp, Call, Peer, Tensors
from flashgen.peers.options import flex_mods
from flashgen.problem import Problem


class Flex(Peer):
    """`torch.compile(flex_attention)`, max-autotuned on a GPU; what compiling takes is told apart from the times."""

    name = "flex"
    layout = "bhsd"
    takes = frozenset(("window", "softcap", "has_alibi", "has_bias", "has_attn_mask", "has_score_mod", "has_mask_mod"))

    def available(self, device: str) -> str | None:
        if device.startswith("cuda"):
            return None
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            return "compiled FlexAttention needs a C++ compiler on a CPU (g++ or clang++)"
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        if op == "attention_bwd" and not problem.device.startswith("cuda"):
            return "compiled FlexAttention has no backward on a CPU"
        return "needs a head dim of 16 or more" if min(problem.head_dim, problem.head_dim_v) < 16 else None

    def tile(self, problem: Problem) -> dict[str, Any] | None:
        """`kernel_options` of a problem that was autotuned before; None autotunes it."""
        return None

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        gpu = problem.device.startswith("cuda")
        # Shapes are fixed here, as a user with one model's shapes would have them; what earlier problems left is dropped.
        torch.compiler.reset()
        tile = self.tile(problem) if gpu else None
        mode = "max-autotune-no-cudagraphs" if gpu and tile is None else None
        compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
        score_mod, keep = flex_mods(problem)
        mask = None
        if keep is not None:
            mask = create_block_mask(keep, None, None, problem.seqlen_q, problem.seqlen_k, device=problem.device)
        options: dict[str, Any] = {
            "score_mod": score_mod,
            "block_mask": mask,
            "scale": problem.softmax_scale,
            "enable_gqa": problem.num_heads_q != problem.num_heads_kv,
            "kernel_options": tile,
        }

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = compiled(q, k, v, **options)
            return out

        return run

    def prepare(self, problem: Problem, op: BenchOp, copies: list[Tensors]) -> list[Call]:
        if op == "attention_fwd":
            return super().prepare(problem, op, copies)
        # A compiled backward frees what it saved, unless told that it will be run again.
        from torch._functorch import config

        with config.patch(donated_buffer=False):
            calls = super().prepare(problem, op, copies)
            calls[0]()
        return calls
