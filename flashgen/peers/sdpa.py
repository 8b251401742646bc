"""PyTorch's `scaled_dot_product_attention`, one contestant per backend, each forced by `sdpa_kernel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from flashgen.bench.environment import free_bytes
from flashgen.peers.base import BenchOp, Peer, top_left_only
from flashgen.peers.options import dense_mask
from flashgen.problem import Problem


class _Sdpa(Peer):
    layout = "bhsd"
    backend: ClassVar[str]  # the member of torch.nn.attention.SDPBackend

    def available(self, device: str) -> str | None:
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        return None if problem.has_bias or problem.has_attn_mask else top_left_only(problem)

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = [getattr(SDPBackend, self.backend)]
        mask = dense_mask(problem) if self.takes else None
        causal, scale = problem.causal and mask is None, problem.softmax_scale
        grouped = problem.num_heads_q != problem.num_heads_kv

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(chosen):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
                )

        return run


def _gpu_only(device: str, name: str) -> str | None:
    return None if device.startswith("cuda") else f"SDPA's {name} backend needs a CUDA device"


class SdpaFlash(_Sdpa):
    """FlashAttention-2 inside torch; on a CPU torch's own fused kernel."""

    name = "sdpa-flash"
    backend = "FLASH_ATTENTION"

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        if problem.head_dim != problem.head_dim_v:
            return "needs equal head dims of q and v"
        if problem.device.startswith("cuda") and problem.dtype == "fp32":
            return "takes fp16 and bf16 only on a GPU"
        return super().supports(problem, op)


class SdpaCudnn(_Sdpa):
    """NVIDIA's cuDNN inside torch."""

    name = "sdpa-cudnn"
    backend = "CUDNN_ATTENTION"

    def available(self, device: str) -> str | None:
        return _gpu_only(device, "cuDNN")

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        return "takes fp16 and bf16 only" if problem.dtype == "fp32" else super().supports(problem, op)


class SdpaEfficient(_Sdpa):
    """The memory-efficient kernels that came from xFormers."""

    name = "sdpa-efficient"
    takes = frozenset(("has_bias", "has_attn_mask"))
    backend = "EFFICIENT_ATTENTION"

    def available(self, device: str) -> str | None:
        return _gpu_only(device, "memory-efficient")

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        if problem.num_heads_q != problem.num_heads_kv:
            return "has no grouped-query heads"
        return super().supports(problem, op)


class SdpaMath(_Sdpa):
    """Materialised scores, no fusion."""

    name = "sdpa-math"
    takes = frozenset(("has_bias", "has_attn_mask"))
    backend = "MATH"

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        # Scores, probabilities and a mask or a copy in fp32; twice that with gradients. A host that runs out is killed.
        scores = 4 * problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
        wanted, there = scores * (3 if op == "attention_fwd" else 6), free_bytes(problem.device)
        if wanted > there // 2:
            return f"would materialise about {wanted / 2**30:.1f} GiB of scores; {there / 2**30:.1f} GiB are free"
        return super().supports(problem, op)
