"""What contestants say of themselves: what they cannot do, why they are not there, and how their packages are called."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgen import peers
from flashgen.errors import InvalidProblemError
from flashgen.peers import Peer
from flashgen.peers.flash_attn import FlashAttention2, FlashAttention3, FlashAttention4
from flashgen.peers.flex import Flex
from flashgen.peers.sdpa import SdpaCudnn, SdpaEfficient, SdpaFlash, SdpaMath
from flashgen.problem import Problem

SMALL = Problem(
    dtype="fp32",
    batch=2,
    seqlen_q=40,
    seqlen_k=40,
    num_heads_q=4,
    num_heads_kv=2,
    head_dim=16,
    head_dim_v=16,
    causal=True,
)
CUDA = replace(SMALL, dtype="bf16", head_dim=64, head_dim_v=64, device="cuda")

LOWER = replace(SMALL, seqlen_k=60)
REFUSALS: list[tuple[Peer, Problem, str]] = [
    (SdpaMath(), LOWER, "top-left"),
    (SdpaFlash(), replace(SMALL, head_dim_v=8), "equal head dims"),
    (SdpaFlash(), replace(CUDA, dtype="fp32"), "fp16 and bf16"),
    (SdpaCudnn(), replace(CUDA, dtype="fp32"), "fp16 and bf16"),
    (SdpaEfficient(), CUDA, "grouped"),
    (SdpaMath(), replace(SMALL, seqlen_q=1 << 20, seqlen_k=1 << 20), "materialise"),
    (Flex(), replace(SMALL, head_dim=8), "16 or more"),
    (FlashAttention2(), replace(CUDA, dtype="fp32"), "fp16 and bf16"),
    (FlashAttention2(), replace(CUDA, head_dim=60), "multiple of 8"),
    (FlashAttention3(), replace(CUDA, seqlen_k=50, causal_alignment="top-left"), "bottom-right"),
    (FlashAttention4(), replace(CUDA, head_dim_v=32), "equal head dims"),
]


@pytest.mark.parametrize(("peer", "problem", "why"), REFUSALS, ids=lambda x: getattr(x, "name", None))
def test_refusals_give_their_reason(peer: Peer, problem: Problem, why: str) -> None:
    reason = peer.supports(problem, "attention_fwd")
    assert reason is not None and why in reason


def test_what_is_supported_is_not_refused() -> None:
    assert SdpaFlash().supports(SMALL, "attention_fwd") is None
    assert SdpaMath().supports(replace(LOWER, causal=False), "attention_fwd") is None
    assert SdpaMath().supports(replace(LOWER, causal_alignment="top-left"), "attention_fwd") is None
    assert SdpaCudnn().supports(CUDA, "attention_fwd") is None
    assert Flex().supports(LOWER, "attention_fwd") is None
    for peer in (FlashAttention2(), FlashAttention3(), FlashAttention4()):
        assert peer.supports(replace(CUDA, seqlen_k=99), "attention_fwd") is None


def test_flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no backward" in str(Flex().supports(SMALL, "attention_bwd"))
    assert Flex().supports(CUDA, "attention_bwd") is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "compiler" in str(Flex().available("cpu")) and Flex().available("cuda") is None


@pytest.mark.parametrize("peer", [FlashAttention2(), FlashAttention3(), FlashAttention4()], ids=lambda peer: peer.name)
def test_the_flash_attention_packages(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer.available("cpu") == "needs a CUDA device"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "sm_75" in str(peer.available("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    if peer.modules[0].split(".")[0] not in sys.modules:
        monkeypatch.setitem(sys.modules, peer.modules[0], None)
        assert "cannot be imported" in str(peer.available("cuda"))
    # As the packages lay it out: a function of bshd tensors that returns out, or (out, lse).
    asked: dict[str, Any] = {}

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        asked.update(options)
        return q + 1, None

    module = types.ModuleType(peer.modules[0])
    module.flash_attn_func, module.__version__ = flash_attn_func, "9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, peer.modules[0].split(".")[0], types.ModuleType("parent"))
    monkeypatch.setitem(sys.modules, peer.modules[0], module)
    assert peer.available("cuda") is None and "9.9" in peer.version()
    out = peer.forward(replace(CUDA, softmax_scale=0.3))(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert float(out) == 1.0 and asked == {"softmax_scale": 0.3, "causal": True}


def test_peers_by_name() -> None:
    assert [peer.name for peer in peers.choose(["all"])] == list(peers.NAMES)
    assert [peer.name for peer in peers.choose(["flex", "sdpa-math"])] == ["sdpa-math", "flex"]
    with pytest.raises(InvalidProblemError, match=r"'fa9'.*sdpa-flash"):
        peers.choose(["fa9"])


def test_loading_the_peers_loads_no_library() -> None:
    assert not {"flash_attn", "flash_attn_interface", "flash_attn_3"} & {name.split(".")[0] for name in sys.modules}
