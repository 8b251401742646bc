"""The transformers surface: the same results as stock whatever the cache, and no request that is silently dropped."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashgen import InvalidProblemError, UnsupportedProblemError
from flashgen.integrations import flash_attn, flex, sdpa
from flashgen.integrations import transformers as surface

transformers = pytest.importorskip("transformers", reason="needs the quickstart extra")
NAME = "flashgen"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    surface.register()
    yield
    surface.register()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of `attention()` that the surface makes."""
    seen: list[dict[str, Any]] = []
    honest = surface.attention

    def attention(*tensors: Any, **options: Any) -> Any:
        seen.append(options)
        return honest(*tensors, **options)

    monkeypatch.setattr(surface, "attention", attention)
    return seen


def llama(kind: str = "Llama", **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, pad_token_id=0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


TOKENS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(
    model: Any, implementation: str, lengths: tuple[int, ...], cache: Any = None, **options: Any
) -> torch.Tensor:
    """Logits of the tokens, fed in parts."""
    model.set_attn_implementation(implementation)
    parts = TOKENS.split(lengths, 1)
    if len(parts) == 1:
        return model(TOKENS, **options).logits
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return torch.cat([model(part, use_cache=True, **{name: cache}).logits for part in parts], 1)


# -- alignment: the case where the mask may be left out is not sdpa's --


@pytest.mark.parametrize("lengths", [(9,), (8, 1), (4, 5), (3, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_way_through_a_cache_gives_the_same(kind: str, lengths: tuple[int, ...]) -> None:
    model = llama()
    cache = (
        transformers.DynamicCache(config=model.config)
        if kind == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=16)
    )
    expected = logits(model, "eager", (9,))
    assert (logits(model, NAME, lengths, cache) - expected).abs().max() < 1e-5


def test_a_static_cache_generates_the_same() -> None:
    model = llama()
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    model.set_attn_implementation("sdpa")
    expected = model.generate(TOKENS, **options)
    model.set_attn_implementation(NAME)
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **options), expected)


def test_an_unpadded_batch_reaches_the_kernel_without_a_mask(calls: list[dict[str, Any]]) -> None:
    """The generated kernel takes no mask yet: were one built, these would raise."""
    surface.register(backend="triton")
    model = llama()
    expected = logits(model, "eager", (9,))
    cache = transformers.DynamicCache(config=model.config)
    assert (logits(model, NAME, (4, 4, 1), cache) - expected).abs().max() < 1e-5
    assert len(calls) == 3 * 2 and all(call["causal"] and call["backend"] == "triton" for call in calls)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_or_refused(side: str, calls: list[dict[str, Any]]) -> None:
    model = llama()
    mask = torch.ones_like(TOKENS)
    mask[0, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    expected = logits(model, "eager", (9,), attention_mask=mask)
    got = logits(model, NAME, (9,), attention_mask=mask)
    assert (got - expected)[mask.bool()].abs().max() < 1e-5
    assert all(call["attn_mask"].dtype == torch.bool and not call["causal"] for call in calls)
    surface.register(backend="gluon")
    with pytest.raises(UnsupportedProblemError, match="attn_mask"):
        logits(model, NAME, (9,), attention_mask=mask)


def test_a_sliding_window_is_kept(calls: list[dict[str, Any]]) -> None:
    model = llama("Mistral", sliding_window=4)
    cache = transformers.DynamicCache(config=model.config)
    expected = logits(model, "eager", (9,))
    assert (logits(model, NAME, (9,)) - expected).abs().max() < 1e-5
    assert (logits(model, NAME, (6, 2, 1), cache) - expected).abs().max() < 1e-5
    assert (expected - logits(llama("Mistral", sliding_window=64), "eager", (9,))).abs().max() > 1e-3, "it matters"


def mask_of(**changes: Any) -> torch.Tensor | None:
    usual = {"batch_size": 1, "q_length": 4, "kv_length": 4, "q_offset": 0, "kv_offset": 0, "mask_function": causal}
    return surface.attention_mask_for(**{**usual, **changes})


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q


@pytest.mark.parametrize(
    ("changes", "built"),
    [
        ({}, False),
        ({"q_length": 1, "q_offset": 3}, False),
        ({"q_length": 2, "q_offset": 2}, False),  # several tokens behind a filled cache: bottom-right says it
        ({"q_offset": torch.tensor(2), "q_length": 2}, False),
        ({"kv_length": 8}, True),  # into a static cache: its end is unused
        ({"q_length": 1, "q_offset": 2, "kv_length": 8}, True),
        ({"attention_mask": torch.ones(1, 4, dtype=torch.bool)}, False),
        ({"attention_mask": torch.tensor([[False, True, True, True]])}, True),
        ({"attention_mask": torch.ones(1, 3, dtype=torch.bool)}, True),  # what it does not name is padding
        ({"local_size": 4}, True),
        ({"local_size": 5}, False),
        ({"allow_is_causal_skip": False}, True),
    ],
    ids=str,
)
def test_a_mask_is_built_where_causality_does_not_say_it_all(changes: dict[str, Any], built: bool) -> None:
    mask = mask_of(**changes)
    assert (mask is not None) is built
    if mask is not None:
        assert mask.dtype == torch.bool and mask.dim() == 4


# -- nothing is ignored --

Q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def forward(mask: torch.Tensor | None = None, *, backend: Any = "auto", **options: Any) -> torch.Tensor:
    layer = torch.nn.Identity()
    layer.is_causal = options.pop("module_is_causal", False)  # type: ignore[assignment]
    out, weights = surface.attention_forward(layer, Q, Q, Q, mask, backend=backend, **options)
    assert weights is None and out.shape == (2, 6, 4, 8) and out.is_contiguous()
    return out.transpose(1, 2)


def exact(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) @ Q


SCORES = Q @ Q.transpose(2, 3) * 8**-0.5
LOWER = torch.ones(6, 6, dtype=torch.bool).tril()
BIAS = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))

HONOURED: list[tuple[dict[str, Any], torch.Tensor]] = [
    ({}, exact(SCORES)),
    ({"scaling": 0.2}, exact(SCORES * 8**0.5 * 0.2)),
    ({"is_causal": True}, exact(SCORES.masked_fill(~LOWER, -torch.inf))),
    ({"module_is_causal": True}, exact(SCORES.masked_fill(~LOWER, -torch.inf))),
    ({"module_is_causal": True, "is_causal": False}, exact(SCORES)),
    ({"softcap": 2.0}, exact(2 * (SCORES / 2).tanh())),
    ({"position_bias": BIAS}, exact(SCORES + BIAS)),
    ({"position_bias": BIAS, "is_causal": True}, exact((SCORES + BIAS).masked_fill(~LOWER, -torch.inf))),
    ({"mask": LOWER[None, None]}, exact(SCORES.masked_fill(~LOWER, -torch.inf))),
    ({"mask": LOWER[None, None], "position_bias": BIAS}, exact((SCORES + BIAS).masked_fill(~LOWER, -torch.inf))),
    ({"mask": BIAS}, exact(SCORES + BIAS)),
    ({"mask": BIAS, "position_bias": BIAS}, exact(SCORES + 2 * BIAS)),
    ({"mask": torch.ones(2, 1, 6, 9, dtype=torch.bool), "module_is_causal": True}, exact(SCORES)),
    (
        {"is_causal": True, "sliding_window": 2},
        exact(SCORES.masked_fill(~LOWER.triu(-1), -torch.inf)),
    ),
]


@pytest.mark.parametrize(("options", "expected"), HONOURED, ids=[", ".join(row[0]) or "plain" for row in HONOURED])
def test_what_is_asked_for_is_done(options: dict[str, Any], expected: torch.Tensor) -> None:
    assert torch.allclose(forward(**options), expected, atol=1e-5)


def test_sinks_of_a_head_join_the_denominator() -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    weights = torch.cat([SCORES, sinks[None, :, None, None].expand(2, 4, 6, 1)], -1).softmax(-1)[..., :-1]
    assert torch.allclose(forward(s_aux=sinks), weights @ Q, atol=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"output_attentions": True}, "output_attentions"),
    ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q"),
    ({"cu_seq_lens_k": torch.tensor([0, 6])}, "cu_seq_lens_k"),
    ({"sinks": torch.zeros(2, 4, 6, 1)}, "sinks"),
    ({"indices": torch.zeros(2, 6)}, "indices"),
    ({"block_indices": torch.zeros(2, 6)}, "block_indices"),
    ({"head_mask": torch.ones(4)}, "head_mask"),
    ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "attention_mask of shape"),
    ({"sliding_window": 2}, "sliding_window=2"),
    ({"backend": "gluon", "dropout": 0.1}, "dropout"),
    ({"backend": "gluon", "softcap": 2.0}, "softcap"),
    ({"backend": "gluon", "s_aux": torch.zeros(4)}, "sinks"),
    ({"backend": "gluon", "is_causal": True, "sliding_window": 2}, "window"),
    ({"backend": "gluon", "position_bias": BIAS}, "bias"),
    ({"backend": "gluon", "mask": LOWER[None, None]}, "attn_mask"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=[", ".join(row[0]) for row in REFUSED])
def test_what_cannot_be_done_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedProblemError, match=named):
        forward(**options)


def test_what_other_parts_of_a_model_read_passes_by() -> None:
    assert torch.allclose(forward(position_ids=torch.arange(6), use_cache=True), exact(SCORES), atol=1e-5)


# -- registering --


def test_registering_twice_is_once_and_names_are_kept_apart(calls: list[dict[str, Any]]) -> None:
    from transformers import modeling_utils

    surface.register()
    surface.register("flashgen_torch", "torch")
    wrapped = modeling_utils.lazy_import_flash_attention
    surface.register()
    assert modeling_utils.lazy_import_flash_attention is wrapped and not hasattr(
        wrapped.flashgen_wraps, "flashgen_wraps"
    )
    model = llama()
    for name, backend in (("flashgen_torch", "torch"), (NAME, "auto")):
        calls.clear()
        logits(model, name, (9,))
        assert {call["backend"] for call in calls} == {backend}


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_names_of_others_are_not_taken(name: str) -> None:
    with pytest.raises(InvalidProblemError, match=name):
        surface.register(name)


# -- the other surfaces' signatures, and those that are not built --

SIGNATURES = [
    (sdpa.enable, ""),
    (flex.flex_attention, "query key value score_mod block_mask scale enable_gqa return_lse kernel_options return_aux"),
    (flash_attn.flash_attn_func, "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"),
    (flash_attn.flash_attn_varlen_func, "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p"),
    (flash_attn.flash_attn_with_kvcache, "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx"),
    (flash_attn.flash_attn_qkvpacked_func, "qkv dropout_p softmax_scale causal"),
    (flash_attn.flash_attn_kvpacked_func, "q kv dropout_p softmax_scale causal"),
]
NOT_BUILT = (sdpa.enable, flash_attn.flash_attn_with_kvcache)


@pytest.mark.parametrize(("function", "first"), SIGNATURES, ids=[row[0].__name__ for row in SIGNATURES])
def test_the_signatures_are_theirs(function: Any, first: str) -> None:
    assert list(inspect.signature(function).parameters)[: len(first.split())] == first.split()


@pytest.mark.parametrize("function", NOT_BUILT)
def test_what_is_not_built_says_so(function: Any) -> None:
    required = [
        None for row in inspect.signature(function).parameters.values() if row.default is inspect.Parameter.empty
    ]
    with pytest.raises(
        UnsupportedProblemError,
        match=f"flashgen.integrations.{function.__module__.rsplit('.', 1)[1]}.{function.__name__}",
    ):
        function(*required)
