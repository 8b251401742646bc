"""Every public name and option exists; what is not built says so by name; bad input is explained."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flashgen
from flashgen import InvalidProblemError, KernelConfig, Target, UnsupportedProblemError, ops

ATTENTION_OPTIONS: dict[str, Any] = {
    "causal": False,
    "causal_alignment": "bottom-right",
    "softmax_scale": None,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "sinks": None,
    "bias": None,
    "attn_mask": None,
    "score_mod": None,
    "mask_mod": None,
    "block_mask": None,
    "dropout_p": 0.0,
    "generator": None,
    "return_lse": False,
    "deterministic": None,
    "layout": "bshd",
    "backend": "auto",
    "config": None,
}


def qkv(
    batch: int = 1, seqlen: int = 4, heads_q: int = 2, heads_kv: int = 2, head_dim: int = 8
) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(batch, seqlen, heads_q, head_dim),
        torch.randn(batch, seqlen, heads_kv, head_dim),
        torch.randn(batch, seqlen, heads_kv, head_dim),
    )


def test_attention_has_the_contracts_signature() -> None:
    parameters = inspect.signature(flashgen.attention).parameters
    assert list(parameters) == ["q", "k", "v", *ATTENTION_OPTIONS]
    assert {name: parameters[name].default for name in ATTENTION_OPTIONS} == ATTENTION_OPTIONS
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ATTENTION_OPTIONS)


def test_all_public_names_load_and_are_documented() -> None:
    for name in flashgen.__all__:
        value = getattr(flashgen, name)
        if name != "__version__":
            assert inspect.getdoc(value), f"{name} has no docstring"
    assert set(flashgen.__all__) <= set(dir(flashgen))
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = flashgen.flash  # type: ignore[attr-defined]


def test_the_error_tree() -> None:
    assert issubclass(InvalidProblemError, ValueError)
    assert issubclass(flashgen.SchemaVersionError, flashgen.DatabaseError)
    for name in flashgen.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(flashgen, name), flashgen.FlashgenError)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window_size", (1, 0)),
        ("softcap", 0.1),
        ("alibi_slopes", torch.ones(2)),
        ("sinks", torch.zeros(2)),
        ("bias", torch.arange(4.0).expand(1, 1, 4, 4)),
        ("attn_mask", torch.ones(4, 4, dtype=torch.bool).tril()),
        ("score_mod", lambda score, b, h, q_idx, kv_idx: score * 3.0),
        ("mask_mod", lambda b, h, q_idx, kv_idx: q_idx >= kv_idx),
        ("block_mask", create_block_mask(lambda b, h, i, j: i >= j, None, None, 4, 4, device="cpu")),
        ("dropout_p", 0.5),
    ],
)
@pytest.mark.parametrize("backend", ["gluon", "triton"])
@pytest.mark.parametrize("function", [flashgen.attention, flashgen.explain])
def test_options_run_in_the_kernel_that_is_asked_for(
    function: Callable[..., Any], backend: str, option: str, value: Any
) -> None:
    """Never ignored, never answered by another backend."""
    inputs = tuple(x.bfloat16() for x in qkv()) if backend == "gluon" else qkv()
    plan = flashgen.explain(*inputs, **{option: value, "backend": backend})
    assert plan.variant == {"gluon": "gluon_fwd_sm90", "triton": "triton_fwd"}[backend]
    if function is flashgen.explain or backend == "triton":  # the interpreter is slow to start
        return
    out = function(*inputs, **{option: value, "backend": backend}).float()
    assert (out - function(*inputs, backend="torch").float()).abs().max() > 2**-6
    if option != "dropout_p":
        assert (out - function(*inputs, **{option: value, "backend": "torch"}).float()).abs().max() <= 2**-6


def test_functions_that_are_not_built_are_named() -> None:
    q, k, v = qkv()
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    calls: dict[str, Callable[[], Any]] = {
        "decode_attention": lambda: flashgen.decode_attention(q, k, v, seqused_k=lengths[1:]),
    }
    for name, call in calls.items():
        with pytest.raises(UnsupportedProblemError, match=name):
            call()
    for module, names in {
        "sdpa": ["enable"],
        "flex": ["flex_attention"],
        "flash_attn": [
            "flash_attn_func",
            "flash_attn_varlen_func",
            "flash_attn_with_kvcache",
            "flash_attn_qkvpacked_func",
            "flash_attn_kvpacked_func",
        ],
        "transformers": ["register"],
    }.items():
        loaded = importlib.import_module(f"flashgen.integrations.{module}")
        assert all(callable(getattr(loaded, name)) for name in names)


def test_gluon_is_refused_with_every_variants_reason() -> None:
    with pytest.raises(UnsupportedProblemError, match="takes fp16 and bf16") as caught:
        flashgen.attention(*qkv(), backend="gluon")
    assert set(caught.value.reasons) == {"gluon_fwd_sm90", "triton_fwd", "torch_blocked"}


def test_gluon_on_cpu_tensors_runs_in_the_simulator() -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    plan = flashgen.explain(q, k, v, backend="gluon", causal=True)
    assert plan.variant == "gluon_fwd_sm90" and any("in the simulator" in note for note in plan.notes)
    out, lse = flashgen.attention(q, k, v, backend="gluon", causal=True, return_lse=True)
    want, want_lse = flashgen.attention(q, k, v, backend="torch", causal=True, return_lse=True)
    assert (out.float() - want.float()).abs().max() <= 2**-7 and (lse - want_lse).abs().max() <= 1e-4


def test_triton_with_gradients_runs_its_own_backward() -> None:
    q, k, v = qkv()
    plan = flashgen.explain(q.requires_grad_(), k, v, backend="triton")
    assert plan.backward is not None and plan.backward.variant == "triton_bwd"
    assert any("the backward runs triton_bwd" in note and "BLOCK_M_DQ" in note for note in plan.notes)


BAD_CALLS: list[tuple[str, Callable[[], Any], str]] = [
    (
        "dtypes",
        lambda: flashgen.attention(qkv()[0].half(), *qkv()[1:]),
        r"k has dtype torch\.float32, q has torch\.float16",
    ),
    (
        "fp64",
        lambda: flashgen.attention(*(x.double() for x in qkv())),
        r"q has dtype torch\.float64: allowed are .*float16",
    ),
    ("device", lambda: flashgen.attention(qkv()[0], qkv()[1].to("meta"), qkv()[2]), "k is on meta, q on cpu"),
    ("head dims", lambda: flashgen.attention(qkv()[0], *qkv(head_dim=16)[1:]), "head_dim of k is 16, but q's is 8"),
    ("head counts", lambda: flashgen.attention(*qkv(heads_q=3, heads_kv=2)), "3 query heads cannot share 2"),
    ("kv heads", lambda: flashgen.attention(*qkv()[:2], qkv(heads_kv=1)[2]), "number of heads of v is 1, but k's is 2"),
    ("kv lengths", lambda: flashgen.attention(*qkv()[:2], qkv(seqlen=5)[2]), "sequence length of v is 5, but k's is 4"),
    ("batch", lambda: flashgen.attention(qkv()[0], *qkv(batch=2)[1:]), "batch of k is 2, but q's is 1"),
    ("dimensions", lambda: flashgen.attention(qkv()[0][0], *qkv()[1:]), "q has shape .* 4 dimensions"),
    ("no tensor", lambda: flashgen.attention([1.0], *qkv()[1:]), "q is a list: it must be a torch.Tensor"),  # type: ignore[arg-type]
    ("scale", lambda: flashgen.attention(*qkv(), softmax_scale=float("nan")), "softmax_scale=nan.*finite"),
    ("scale type", lambda: flashgen.explain(*qkv(), softmax_scale="x"), "softmax_scale='x' is a str"),
    ("window", lambda: flashgen.attention(*qkv(), window_size=(-2, 0)), r"window_size=\(-2, 0\).*-1 \(no limit\)"),
    ("window type", lambda: flashgen.attention(*qkv(), window_size=3), "window_size=3 must be a pair"),  # type: ignore[arg-type]
    ("float mask", lambda: flashgen.attention(*qkv(), attn_mask=torch.zeros(4, 4)), "attn_mask.*torch.bool.*`bias`"),
    ("backend", lambda: flashgen.attention(*qkv(), backend="cuda"), "backend='cuda'.*auto, gluon, triton, torch"),  # type: ignore[arg-type]
    ("layout", lambda: flashgen.attention(*qkv(), layout="sbhd"), "layout='sbhd'.*bshd, bhsd"),  # type: ignore[arg-type]
    ("alignment", lambda: flashgen.attention(*qkv(), causal=True, causal_alignment="top"), "causal_alignment='top'"),  # type: ignore[arg-type]
    (
        "config type",
        lambda: flashgen.attention(*qkv(), config=5),
        "config=5 is a int: it must be a KernelConfig or a dict",
    ),  # type: ignore[arg-type]
    ("softcap type", lambda: flashgen.attention(*qkv(), softcap="x"), "softcap='x' is a str: it must be a number"),  # type: ignore[arg-type]
    ("mod type", lambda: flashgen.attention(*qkv(), score_mod=3), "score_mod is a int: it must be a function"),  # type: ignore[arg-type]
    ("preset", lambda: flashgen.Problem.preset("gpt-9"), "preset 'gpt-9'.*llama3-8b"),
    ("target", lambda: Target.named("tpu"), "target 'tpu'.*h100"),
    (
        "config names",
        lambda: flashgen.attention(*qkv(), backend="triton", config={"BLOCK_Q": 64}),
        "unknown tunables .*BLOCK_Q",
    ),
    (
        "config value",
        lambda: flashgen.attention(
            *qkv(), backend="triton", config={"BLOCK_M": 48, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
        ),
        "BLOCK_M=48 must be a power of two",
    ),
    (
        "config of another variant",
        lambda: flashgen.attention(*qkv(), backend="triton", config=KernelConfig(variant="torch_blocked")),
        "variant 'torch_blocked', which is backend 'torch'",
    ),
    (
        "config beyond the target",
        lambda: flashgen.dispatch.resolve(
            flashgen.Problem.preset("llama3-8b"),
            Target.named("a100"),
            config={"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 5},
        ),
        "not legal for .* on a100: needs at least 262144 bytes of shared memory",
    ),
]


@pytest.mark.parametrize(("call", "match"), [row[1:] for row in BAD_CALLS], ids=[row[0] for row in BAD_CALLS])
def test_bad_input_is_explained(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(InvalidProblemError, match=match):
        call()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLASHGEN_ON_MISS", "maybe"),
        ("FLASHGEN_ON_FALLBACK", "loud"),
        ("FLASHGEN_BACKEND", "cuda"),
        ("FLASHGEN_LOG", "all"),
    ],
)
def test_bad_settings_are_explained(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidProblemError, match=f"{name}='{value}'.*allowed are"):
        flashgen.attention(*qkv())


def test_the_backend_setting_steers_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_BACKEND", "triton")
    assert flashgen.explain(*qkv()).backend == "triton"
    assert flashgen.explain(*qkv(), backend="torch").backend == "torch"


def test_layouts_agree_and_strides_do_not_matter() -> None:
    q, k, v = qkv(batch=2, seqlen=9, heads_q=4, heads_kv=2, head_dim=6)
    want = flashgen.attention(q, k, v, causal=True)
    swapped = flashgen.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, layout="bhsd")
    assert swapped.shape == (2, 4, 9, 6)  # type: ignore[union-attr]
    torch.testing.assert_close(swapped.transpose(1, 2), want)  # type: ignore[union-attr]
    strided = q.transpose(1, 3).contiguous().transpose(1, 3)
    assert strided.stride(-1) != 1
    torch.testing.assert_close(flashgen.attention(strided, k, v, causal=True), want)
    assert any("q is copied" in note for note in flashgen.explain(strided, k, v).notes)


@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_full_graph_with_dynamic_lengths(training: bool) -> None:
    compiled = torch.compile(
        lambda q, k, v: flashgen.attention(q, k, v, causal=True, softmax_scale=0.3),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for seqlen in (5, 9, 12):
        q, k, v = (x.requires_grad_(training) for x in qkv(seqlen=seqlen))
        out, want = compiled(q, k, v), flashgen.attention(q, k, v, causal=True, softmax_scale=0.3)
        torch.testing.assert_close(out, want)
        if training:
            got_grads = torch.autograd.grad(out.sum(), (q, k, v))
            torch.testing.assert_close(got_grads, torch.autograd.grad(want.sum(), (q, k, v)))  # type: ignore[union-attr]


def test_operators_pass_torchs_own_check() -> None:
    q, k, v = qkv()
    operands = flashgen.operands.Operands(bias=torch.randn(1, 2, 1, 4), sinks=torch.randn(2))
    scalars = ops.Scalars(causal=True, return_lse=True, backend="torch")
    flat = ops.flatten(operands, scalars)
    torch.library.opcheck(torch.ops.flashgen.attention_fwd.default, (q, k, v, *flat))
    out, lse = torch.ops.flashgen.attention_fwd(q, k, v, *flat)
    arguments = (torch.ones_like(out), None, q, k, v, out, lse, *flat, True, True)
    torch.library.opcheck(torch.ops.flashgen.attention_bwd.default, arguments)
