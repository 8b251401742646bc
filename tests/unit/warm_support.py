"""What tests of warm calls share: CPU tensors that count as on a GPU, and who counts the short ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import flashgen
from flashgen import Target, build, dispatch, mods, warm
from flashgen.mods import semantics

ROOT = Path(__file__).resolve().parents[2]
H100 = Target.named("h100")


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Q, K, V = draw(2, 24, 4, 32), draw(2, 30, 2, 32, seed=1), draw(2, 30, 2, 16, seed=2)


def others(source: Any, scalars: dict[str, Any]) -> dict[str, Any]:
    """Operands and mods of a launch as options of the torch backend; mods are those of the rendered program, by NumPy."""
    names = {"alibi_slopes": "alibi", "sinks": "sinks", "bias": "bias", "attn_mask": "attn_mask", "philox": "philox"}
    found = {option: scalars[name] for name, option in names.items() if name in scalars}
    found |= {"softcap": scalars.get("softcap", 0.0), "dropout_p": scalars.get("dropout_p", 0.0)}
    if "alibi" in found:
        found["alibi_shift"] = K.shape[1] - Q.shape[1]
    if source.spec.mods is None:
        return found
    program = source.spec.mods.program
    tables = mods.arrays_of([scalars[f"captured_{row.name}"] for row in program.captures])

    def evaluated(root: Any, names: tuple[str, ...]) -> Any:
        def mod(*arguments: Tensor) -> Tensor:
            values = np.broadcast_arrays(*(x.numpy() for x in arguments))
            return torch.from_numpy(np.array(semantics.evaluate(root, dict(zip(names, values, strict=True)), tables)))

        return mod

    indices = ("b", "h", "q_idx", "kv_idx")
    if program.score is not None:
        found["score_mod"] = evaluated(program.score, ("score", *indices))
    if program.mask is not None:
        found["mask_mod"] = evaluated(program.mask, indices)
    return found


def packed(
    source: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, scalars: dict[str, Any]
) -> None:
    ends = (scalars["cu_seqlens_q"], scalars["cu_seqlens_k"], scalars["seqused_k"])
    packing = flashgen.torch_blocked.Packing.make(
        *ends,
        scalars["bottom_right"],
        totals=(q.shape[0], k.shape[0]),
        longest=(scalars["max_seqlen_q"], scalars["max_seqlen_k"]),
    )
    options = flashgen.torch_blocked.Options(sm_scale=scalars["sm_scale"], causal=source.spec.causal)
    flashgen.torch_blocked.packed_forward(q, k, v, packing, options, o, lse)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """CPU tensors count as on an h100; `launch` records its arguments and computes with the torch backend."""
    seen: list[dict[str, Any]] = []
    real = build.build

    def built(source: Any) -> Any:
        from dataclasses import replace

        def launch(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, **scalars: Any) -> Any:
            seen.append(scalars)
            if source.spec.varlen:
                return packed(source, q, k, v, o, lse, scalars)
            options = flashgen.torch_blocked.Options(
                sm_scale=scalars["sm_scale"],
                causal=source.spec.causal,
                offset=scalars["causal_offset"],
                **others(source, scalars),
            )
            return flashgen.torch_blocked.forward(q, k, v, options, o, lse)

        def launch_backward(*tensors: Any, sm_scale: float, causal_offset: int, **tunables: Any) -> None:
            options = flashgen.torch_blocked.Options(sm_scale=sm_scale, causal=source.spec.causal, offset=causal_offset)
            *inputs, dq, dk, dv = tensors
            for into, gradient in zip((dq, dk, dv), flashgen.torch_blocked.backward(*inputs, options), strict=False):
                into.copy_(gradient)

        return replace(real(source), launch=launch if source.spec.op == "attention_fwd" else launch_backward)

    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHGEN_ON_FALLBACK", "silent")
    dispatch.forget()
    with (
        mock.patch.object(Target, "detect", classmethod(lambda cls, device=None: H100)),
        mock.patch("flashgen.execution.build", built),
        mock.patch("flashgen.warm.build", built),
    ):
        yield seen
    dispatch.forget()


@pytest.fixture
def short(gpu: list[dict[str, Any]]) -> Iterator[list[int]]:
    """How often the short way was taken."""
    taken: list[int] = []
    real = warm.find

    def find(key: Any) -> Any:
        bound = real(key)
        if bound is not None:
            taken.append(1)
        return bound

    with mock.patch.object(warm, "find", find):
        yield taken
