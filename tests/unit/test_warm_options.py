"""Warm calls with operands and mods: bound anew at each call, told apart by meaning, and never stale."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_support
from torch import Tensor
from warm_support import ROOT, K, Q, V, draw

import flashgen
from flashgen import InvalidProblemError, dispatch, warm

gpu, short = warm_support.gpu, warm_support.short

BIAS, HIDE = draw(4, 24, 30, dtype=torch.float32), draw(24, 30, dtype=torch.float32) > -1
IDS, TABLE, WIDTH = torch.arange(40, dtype=torch.int32) // 7, draw(4, 64, dtype=torch.float32), 9


def document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (IDS[i] == IDS[j]) | (j < 1)


def width(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() < WIDTH


def table(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + TABLE[h, i - j + 30]


WITH: dict[str, dict[str, Any]] = {
    "bias": {"bias": BIAS},
    "attn_mask": {"attn_mask": HIDE},
    "sinks": {"sinks": draw(4, dtype=torch.float32)},
    "alibi": {"alibi_slopes": torch.rand(2, 4)},
    "mask_mod": {"mask_mod": width},
    "document": {"mask_mod": document},
    "score_mod": {"score_mod": table},
    "all": {
        "bias": BIAS,
        "attn_mask": HIDE,
        "sinks": draw(4, dtype=torch.float32),
        "mask_mod": document,
        "score_mod": table,
    },
    "config": {"config": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}},
}


@pytest.mark.parametrize("options", WITH.values(), ids=list(WITH))
def test_calls_with_options_are_warm_too(gpu: list[dict[str, Any]], short: list[int], options: dict[str, Any]) -> None:
    first = flashgen.attention(Q, K, V, backend="triton", **options)
    again = flashgen.attention(Q, K, V, backend="triton", **options)
    assert len(short) == 1 and len(gpu) == 2 and gpu[0].keys() == gpu[1].keys()
    assert isinstance(first, Tensor) and isinstance(again, Tensor) and torch.equal(first, again)
    expected = flashgen.attention(Q, K, V, backend="torch", **{k: x for k, x in options.items() if k != "config"})
    torch.testing.assert_close(again, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["bias", "sinks", "alibi_slopes"])
def test_new_operands_are_taken_not_remembered(gpu: list[dict[str, Any]], short: list[int], name: str) -> None:
    value = {"bias": BIAS, "sinks": draw(4, dtype=torch.float32), "alibi_slopes": torch.rand(4)}[name]
    flashgen.attention(Q, K, V, backend="triton", **{name: value})
    other = value + 1
    flashgen.attention(Q, K, V, backend="triton", **{name: other})
    assert short and gpu[0][name] is value and gpu[1][name] is other
    # Of another shape, stride or alignment it is another kind.
    for changed in (value[None].expand(1, *value.shape)[0][::1].clone().repeat_interleave(2, -1)[..., ::2],):
        flashgen.attention(Q, K, V, backend="triton", **{name: changed})
    assert len(short) == 1


def test_one_tensor_in_two_places_is_bound_by_name(gpu: list[dict[str, Any]], short: list[int]) -> None:
    both = torch.rand(4)
    flashgen.attention(Q, K, V, backend="triton", sinks=both, alibi_slopes=both)
    flashgen.attention(Q, K, V, backend="triton", sinks=both + 1, alibi_slopes=both + 2)
    assert short and torch.equal(gpu[1]["sinks"], both + 1) and torch.equal(gpu[1]["alibi_slopes"], both + 2)


def test_a_changed_mod_is_never_stale(gpu: list[dict[str, Any]], short: list[int]) -> None:
    def made(limit: int) -> Any:
        return lambda b, h, i, j: (i - j).abs() < limit

    def expected(limit: int) -> Any:
        return flashgen.attention(Q, K, V, backend="torch", mask_mod=made(limit))

    for limit, warm_calls in ((9, 0), (9, 1), (4, 1), (4, 2), (9, 3)):  # a new lambda of the same meaning is warm
        out = flashgen.attention(Q, K, V, backend="triton", mask_mod=made(limit))
        assert len(short) == warm_calls and isinstance(out, Tensor)
        torch.testing.assert_close(out, expected(limit), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("how", ["in place", "uncounted", "another tensor", "another dtype"])
def test_captured_tensors_are_read_anew(gpu: list[dict[str, Any]], short: list[int], how: str) -> None:
    held = {"ids": IDS.clone()}

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return held["ids"][i] == held["ids"][j]

    def run(backend: str) -> Any:
        return flashgen.attention(Q, K, V, backend=backend, mask_mod=mod)  # type: ignore[arg-type]

    run("triton")
    first = gpu[-1]["mask_ranges"].clone()
    if how == "in place":
        held["ids"].copy_(torch.arange(40) // 3)
    elif how == "uncounted":
        held["ids"].numpy()[:] = np.arange(40) // 3
    else:
        held["ids"] = (torch.arange(40) // 3).to(torch.int64 if how == "another dtype" else torch.int32)
    out = run("triton")
    assert len(short) == (how != "another dtype")
    torch.testing.assert_close(out, run("torch"), atol=2e-2, rtol=2e-2)
    assert gpu[-1]["captured_ids"] is held["ids"]
    visible = flashgen.torch_blocked.Options(sm_scale=1.0, mask_mod=mod)
    assert visible.mask_mod is not None
    rows, keys = torch.arange(24)[:, None], torch.arange(30)[None, :]
    seen = visible.mask_mod(0, 0, rows, keys)
    first_block, _, _, last_block = gpu[-1]["mask_ranges"][0, 0, 0].tolist()
    block = int(gpu[-1]["BLOCK_N"])
    assert not seen[:, : first_block * block].any() and not seen[:, last_block * block :].any()
    assert first.shape == gpu[-1]["mask_ranges"].shape


def test_a_mod_that_cannot_be_told_by_value_goes_the_long_way(gpu: list[dict[str, Any]], short: list[int]) -> None:
    class Settings:
        limit = 9

    settings = Settings

    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() < settings.limit

    flashgen.attention(Q, K, V, backend="triton", mask_mod=mod)
    settings.limit = 4
    out = flashgen.attention(Q, K, V, backend="triton", mask_mod=mod)
    assert not short
    torch.testing.assert_close(out, flashgen.attention(Q, K, V, backend="torch", mask_mod=mod), atol=2e-2, rtol=2e-2)


def test_gradients_of_operands_go_the_long_way(gpu: list[dict[str, Any]], short: list[int]) -> None:
    for name, value in (("bias", BIAS.clone()), ("sinks", torch.zeros(4))):
        flashgen.attention(Q, K, V, **{name: value})
        with torch.no_grad():
            flashgen.attention(Q, K, V, **{name: value.requires_grad_()})
        taken = len(short)
        out = flashgen.attention(Q, K, V, **{name: value})
        assert len(short) == taken and isinstance(out, Tensor) and out.requires_grad
    assert len(short) == 2


def test_dropout_draws_anew_from_its_generator(gpu: list[dict[str, Any]], short: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    runs = [flashgen.attention(Q, K, V, dropout_p=0.5, generator=generator, backend="triton") for _ in range(3)]
    assert len(short) == 2 and len({tuple(one["philox"].tolist()) for one in gpu}) == 3
    assert not torch.equal(runs[1], runs[2])  # type: ignore[arg-type]
    generator.manual_seed(3)
    again = [flashgen.attention(Q, K, V, dropout_p=0.5, generator=generator, backend="triton") for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(runs, again, strict=True))  # type: ignore[arg-type]
    with pytest.raises(InvalidProblemError, match="generator"):
        flashgen.attention(Q, K, V, dropout_p=0.5, generator=3, backend="triton")  # type: ignore[arg-type]


def test_packed_sequences_are_warm(gpu: list[dict[str, Any]], short: list[int]) -> None:
    q, k, v = Q[0], K[0], V[0]
    for ends in ([0, 7, 24], [0, 20, 24]):
        cu_q, cu_k = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 12, 30], dtype=torch.int32)
        out, lse = flashgen.varlen_attention(q, k, v, cu_q, cu_k, 24, 30, causal=True, return_lse=True)
        expected, expected_lse = flashgen.varlen_attention(
            q, k, v, cu_q, cu_k, 24, 30, causal=True, return_lse=True, backend="torch"
        )
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=0)
    assert len(short) == 1


def test_a_warm_launch_takes_what_its_variant_adds(
    gpu: list[dict[str, Any]], short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashgen.variants import by_name

    kind = type(by_name("triton_fwd"))
    monkeypatch.setattr(kind, "launch_options", lambda self, problem: {"extra": 7})
    flashgen.attention(Q, K, V, backend="triton")
    flashgen.attention(Q, K, V, backend="triton")
    assert short and gpu[0]["extra"] == gpu[1]["extra"] == 7


@pytest.mark.parametrize(
    "options", [{"softmax_scale": [1.0]}, {"window_size": "ab"}, {"layout": "sbhd"}, {"backend": "cuda"}]
)
def test_wrong_arguments_are_refused_every_time(gpu: list[dict[str, Any]], options: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(InvalidProblemError):
            flashgen.attention(Q, K, V, **options)


def test_more_kinds_than_are_kept(gpu: list[dict[str, Any]], short: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_MOST", 2)
    for scale in (0.1, 0.2, 0.3, 0.4):
        flashgen.attention(Q, K, V, softmax_scale=scale)
        flashgen.attention(Q, K, V, softmax_scale=scale)
    assert len(warm.table()) <= 2 and len(short) == 4


def test_torch_calls_are_not_bound() -> None:
    dispatch.forget()
    flashgen.attention(Q, K, V)
    flashgen.attention(Q, K, V)
    assert list(warm.table().values()) == [None]
    dispatch.forget()


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    spec = importlib.util.spec_from_file_location("host_overhead", ROOT / "benchmarks" / "host_overhead.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    figures = benchmark.run(batches=2)
    # No bound on time: a shared machine may be slow. The short way is far shorter than the long one on any.
    assert (
        figures["attention(q, k, v, causal=True)"] * 3 < figures["... through the operator (what a traced call takes)"]
    )
