"""The FlashAttention packages: 2 (`flash_attn`), 3 (`flash_attn_interface` or `flash_attn_3`), 4 (`flash_attn.cute`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashgen.bench.environment import version
from flashgen.peers.base import BenchOp, Peer, bottom_right_only
from flashgen.problem import Problem


class _FlashAttn(Peer):
    modules: ClassVar[tuple[str, ...]]  # where `flash_attn_func` may live, in order
    packages: ClassVar[tuple[str, ...]]  # what it is called when installed
    capability: ClassVar[tuple[int, int]]  # the least that its kernels are built for
    largest_head_dim: ClassVar[int] = 256

    def available(self, device: str) -> str | None:
        if not device.startswith("cuda"):
            return "needs a CUDA device"
        found = torch.cuda.get_device_capability(device)
        if found < self.capability:
            return (
                f"is built for sm_{self.capability[0]}{self.capability[1]} and newer; this is sm_{found[0]}{found[1]}"
            )
        try:
            self._function()
        except Exception as error:  # an import of a compiled extension fails in many ways, and all mean: not here
            return f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    def _function(self) -> Callable[..., Any]:
        first: Exception | None = None
        for module in self.modules:
            try:
                function: Callable[..., Any] = importlib.import_module(module).flash_attn_func
                return function
            except (ImportError, AttributeError) as error:
                first = first or error
        raise first or ImportError(self.modules[0])

    def version(self) -> str:
        for package in self.packages:
            if (found := version(package)) is not None:
                return f"{package} {found}"
        module = importlib.import_module(self.modules[0])
        return f"{self.modules[0]} {getattr(module, '__version__', 'of unknown version')}"

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        if problem.dtype == "fp32":
            return "takes fp16 and bf16 only"
        if problem.head_dim > self.largest_head_dim or problem.head_dim % 8:
            return f"needs a head dim of at most {self.largest_head_dim} and a multiple of 8"
        if problem.head_dim != problem.head_dim_v:
            return "is compared for equal head dims of q and v only"
        return bottom_right_only(problem)

    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        function, causal, scale = self._function(), problem.causal, problem.softmax_scale

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v, softmax_scale=scale, causal=causal)
            # Versions 3 and 4 return (out, lse), or out alone, depending on the release.
            result: Tensor = out[0] if isinstance(out, tuple) else out
            return result

        return run


class FlashAttention2(_FlashAttn):
    """Dao-AILab's flash-attention 2."""

    name = "fa2"
    modules = ("flash_attn",)
    packages = ("flash-attn", "flash_attn")
    capability = (8, 0)


class FlashAttention3(_FlashAttn):
    """Its Hopper version."""

    name = "fa3"
    modules = ("flash_attn_interface", "flash_attn_3.flash_attn_interface", "flash_attn_3")
    packages = ("flash-attn-3", "flash_attn_3", "flash_attn_interface")
    capability = (9, 0)

    def available(self, device: str) -> str | None:
        reason = super().available(device)
        if reason is None and torch.cuda.get_device_capability(device)[0] != 9:
            return "is built for Hopper (sm_90) only"
        return reason


class FlashAttention4(_FlashAttn):
    """Its CuTe DSL version."""

    name = "fa4"
    modules = ("flash_attn.cute", "flash_attn.cute.interface")
    packages = ("flash-attn-4", "flash_attn_4")
    capability = (8, 0)

    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        if op == "attention_bwd" and torch.cuda.get_device_capability(problem.device) < (9, 0):
            return "has no backward below sm_90"
        return super().supports(problem, op)
