"""Warm calls: the short way gives what the long way gives, is taken where it may be, and nowhere else."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flashgen
from flashgen import InvalidProblemError, Target, UnsupportedProblemError, build, dispatch, mods, warm
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


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_alignment": "top-left"},
    "scale": {"softmax_scale": 0.3},
    "lse": {"return_lse": True},
    "lse, causal": {"return_lse": True, "causal": True},
    "explicit backend": {"backend": "triton"},
}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", CALLS.values(), ids=list(CALLS))
def test_both_ways_agree(gpu: list[dict[str, Any]], short: list[int], options: dict[str, Any], layout: str) -> None:
    tensors = [x if layout == "bshd" else x.transpose(1, 2) for x in (Q, K, V)]
    first = flashgen.attention(*tensors, layout=layout, **options)
    assert not short and len(gpu) == 1
    again = flashgen.attention(*tensors, layout=layout, **options)
    assert len(short) == 1 and len(gpu) == 2 and gpu[0] == gpu[1]
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (first, again)), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    # And new values are computed, not remembered.
    other = flashgen.attention(tensors[0] + 1, *tensors[1:], layout=layout, **options)
    assert not torch.equal(
        other[0] if isinstance(other, tuple) else other, again[0] if isinstance(again, tuple) else again
    )


def test_what_changes_the_call_changes_the_kind(gpu: list[dict[str, Any]], short: list[int]) -> None:
    flashgen.attention(Q, K, V)
    spread = torch.zeros(2 * 4096, dtype=torch.bfloat16).as_strided(Q.shape, (4096, 128, 32, 1))
    variations: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((Q[:1], K[:1], V[:1]), {}),
        ((Q[:, :20], K, V), {}),
        ((spread, K, V), {}),
        ((Q.half(), K.half(), V.half()), {}),
        ((Q, K, V), {"causal": True}),
        ((Q, K, V), {"softmax_scale": 0.5}),
        ((Q, K, V), {"return_lse": True}),
        ((Q, K, V), {"backend": "triton"}),
    ]
    for tensors, options in variations:
        flashgen.attention(*tensors, **options)
    assert not short


def test_alignment_is_part_of_the_kind(gpu: list[dict[str, Any]], short: list[int]) -> None:
    """A kernel compiled for addresses that are multiples of 16 must not meet another."""
    flashgen.attention(Q, K, V)
    moved = torch.empty(Q.numel() + 1, dtype=Q.dtype)[1:].view(Q.shape).copy_(Q)
    assert moved.stride() == Q.stride() and moved.data_ptr() % 16
    flashgen.attention(moved, K, V)
    assert not short
    # Nor is one of the three another: what was compiled for an odd q takes k in words of 16 bytes.
    moved = torch.empty(K.numel() + 1, dtype=K.dtype)[1:].view(K.shape).copy_(K)
    flashgen.attention(Q, moved, V)
    assert not short


def test_a_changed_setting_is_seen(
    gpu: list[dict[str, Any]], short: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flashgen.attention(Q, K, V)
    flashgen.attention(Q, K, V)
    assert len(short) == 1
    monkeypatch.setenv("FLASHGEN_BACKEND", "torch")
    flashgen.attention(Q, K, V)
    assert len(short) == 1 and len(gpu) == 2
    monkeypatch.delenv("FLASHGEN_BACKEND")
    flashgen.attention(Q, K, V)
    assert len(short) == 2


def test_forgotten_plans_are_forgotten_here(gpu: list[dict[str, Any]], short: list[int]) -> None:
    flashgen.attention(Q, K, V)
    dispatch.forget()
    flashgen.attention(Q, K, V)
    assert not short


def test_what_autograd_records_is_a_kind_of_its_own(gpu: list[dict[str, Any]], short: list[int]) -> None:
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        flashgen.attention(q, K, V)
        flashgen.attention(q, K, V)
    assert len(short) == 1
    out = flashgen.attention(q, K, V)  # test_recorded.py has what comes next
    assert len(short) == 1 and isinstance(out, Tensor) and out.requires_grad
    out.float().sum().backward()
    assert q.grad is not None
    with torch.inference_mode():
        flashgen.attention(Q, K, V)
    assert len(short) == 2


def test_views_and_duals_that_hold_other_values_go_the_long_way(gpu: list[dict[str, Any]], short: list[int]) -> None:
    q = torch.randn(2, 24, 4, 32)
    k, v = K.float(), V.float()
    flashgen.attention(q, k, v)
    negated = torch.complex(q, q).conj().imag  # -q, lazily
    assert negated.is_neg()
    out = flashgen.attention(negated.contiguous() if negated.stride(-1) != 1 else negated, k, v)
    plain = flashgen.attention(-q, k, v)
    assert isinstance(out, Tensor) and isinstance(plain, Tensor) and torch.equal(out, plain)
    taken = len(short)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedProblemError, match="forward-mode derivative"):
            flashgen.attention(dual, k, v)
    with pytest.raises(UnsupportedProblemError, match="forward-mode derivative"):
        torch.func.jvp(lambda x: flashgen.attention(x, k, v), (q,), (torch.ones_like(q),))
    assert len(short) == taken
    with pytest.raises(InvalidProblemError, match=r"q has layout torch\.sparse_coo"):
        flashgen.attention(q.to_sparse(), k, v)


class Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_whoever_listens_sees_the_operator(gpu: list[dict[str, Any]], short: list[int]) -> None:
    flashgen.attention(Q, K, V)
    with Listener() as listener:
        flashgen.attention(Q, K, V)
    assert "flashgen.attention_fwd.default" in listener.names and not short
    flashgen.attention(Q.as_subclass(Subclass), K, V)
    assert not short
    with FakeTensorMode() as mode:
        fake = flashgen.attention(*(mode.from_tensor(x) for x in (Q, K, V)))
    assert isinstance(fake, Tensor) and fake.shape == (2, 24, 4, 16) and not short
    compiled = torch.compile(lambda q, k, v: flashgen.attention(q, k, v), backend="eager", fullgraph=True)
    assert torch.equal(compiled(Q, K, V), flashgen.attention(Q, K, V)) and len(short) == 1


# -- calls with operands and mods --

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
