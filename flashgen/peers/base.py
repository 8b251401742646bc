"""What a contestant of `flashgen bench` is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from flashgen.problem import Layout, Problem

if TYPE_CHECKING:
    from flashgen.peers.judge import Judge

BenchOp = Literal["attention_fwd", "attention_bwd"]
OPS: tuple[BenchOp, ...] = ("attention_fwd", "attention_bwd")
Call = Callable[[], Any]
BACKWARD_FLOPS = 2.5  # five products to the forward's two, FlashAttention-2, section 4.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """One copy of the inputs, each of its own memory, in the layout of the contestant that gets it.

    Attributes:
        q, k, v: the inputs, contiguous.
        dout: gradient of the output; None for a forward.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None = None


class Peer(ABC):
    """An implementation of attention that is installed, or not.

    A new one overrides `forward`, and says in `available` and `supports` what it cannot do: a reason in a user's words,
    never an exception from the middle of a measurement.
    """

    name: str
    layout: ClassVar[Layout] = "bshd"
    takes: ClassVar[frozenset[str]] = frozenset()  # the flags of options beyond causality that it computes
    computes: Hashable = None  # which function of the inputs; peers of one function share their references

    @abstractmethod
    def available(self, device: str) -> str | None:
        """None where it can be loaded for this device, else why not."""

    @abstractmethod
    def supports(self, problem: Problem, op: BenchOp) -> str | None:
        """None where it computes this problem (whose device says where), else why not."""

    @abstractmethod
    def version(self) -> str:
        """Of the library, as its package names it."""

    @abstractmethod
    def forward(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of q, k and v in the peer's layout; whatever can be prepared is prepared here."""

    def detail(self, problem: Problem, op: BenchOp) -> str:
        """What runs inside, where there is a choice, e.g. the configuration."""
        return ""

    def judge(self, problem: Problem, op: BenchOp, tensors: Tensors) -> Judge:
        """What holds results on one copy of the inputs (layout bshd) against fp64: the problem's own attention, if not overridden."""
        from flashgen.peers.options import judge_of

        return judge_of(problem, op, tensors)

    def flops(self, problem: Problem, op: BenchOp) -> float:
        """Of one call: products over visible pairs."""
        return flops_of(problem, op)

    def prepare(self, problem: Problem, op: BenchOp, copies: list[Tensors]) -> list[Call]:
        """One call per copy of the inputs.

        A forward's call returns out. A backward's returns the gradients (dq, dk, dv) of a fixed dout; its forward is run
        here, once, and kept, so that the call is the backward alone.
        """
        function = self.forward(replace(problem, requires_grad=op == "attention_bwd"))
        make = _forward_call if op == "attention_fwd" else _backward_call
        return [make(function, tensors) for tensors in copies]


def _forward_call(function: Callable[..., Tensor], tensors: Tensors) -> Call:
    import torch

    q, k, v = tensors.q, tensors.k, tensors.v

    def call() -> Tensor:
        with torch.no_grad():
            return function(q, k, v)

    return call


def _backward_call(function: Callable[..., Tensor], tensors: Tensors) -> Call:
    import torch

    leaves = [x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    out = function(*leaves)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True)

    return call


def flops_of(problem: Problem, op: BenchOp) -> float:
    """Of one call: products over visible pairs, with options counted over all masks."""
    from flashgen.peers import options

    pairs = options.visible_pairs(problem) if options.has_options(problem) else problem.visible_pairs
    forward = 2.0 * problem.batch * problem.num_heads_q * pairs * (problem.head_dim + problem.head_dim_v)
    return forward * (1.0 if op == "attention_fwd" else BACKWARD_FLOPS)


def top_left_only(problem: Problem) -> str | None:
    """For libraries whose causal mask starts at the first key."""
    if problem.causal and problem.causal_offset != 0:
        return "its causal mask is top-left aligned, and this problem's diagonal ends elsewhere (seqlen_q != seqlen_k)"
    return None


def bottom_right_only(problem: Problem) -> str | None:
    """For libraries whose causal mask ends at the last key."""
    if problem.causal and problem.causal_offset != problem.seqlen_k - problem.seqlen_q:
        return "its causal mask is bottom-right aligned, this problem's is top-left"
    return None
