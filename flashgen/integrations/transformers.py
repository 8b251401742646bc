"""flashgen as an attention implementation of Hugging Face transformers, through its own registry.

    from flashgen.integrations.transformers import register
    register()
    model = AutoModel.from_pretrained(..., attn_implementation="flashgen")

transformers hands over `bhsd` tensors and, where something is masked beyond causality, a boolean mask of its own making (as for
`sdpa`); an unpadded batch gets none. Whatever flashgen cannot do with what it is handed raises; nothing is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgen.api import BackendName, attention
from flashgen.errors import InvalidProblemError, UnsupportedProblemError

_backends: dict[str, BackendName] = {}


def register(name: str = "flashgen", *, backend: BackendName = "auto") -> None:
    """Register flashgen under a name for `attn_implementation=`; calling it again changes the backend.

    Args:
        name: what models will name.
        backend: as in `flashgen.attention`.

    Raises:
        InvalidProblemError: transformers is not installed, or too old to have a registry.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise InvalidProblemError(
            f"transformers cannot be used: {error}. It needs version 5 or newer: pip install 'flashgen[quickstart]'"
        ) from error
    _backends[name] = backend

    def forward(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        return attention_forward(module, query, key, value, attention_mask, backend=_backends[name], **kwargs)

    _keep_from_flash_attn_loader()
    AttentionInterface.register(name, forward)
    # Boolean masks, and None where nothing but causality is masked: exactly what attention() takes.
    AttentionMaskInterface.register(name, sdpa_mask)


def _keep_from_flash_attn_loader() -> None:
    """Transformers takes every name with "flash" in it for a flash-attn package and tries to load that.

    Registered names are kept from its loader. To be removed when `is_flash_attention_requested` (transformers.utils.generic) stops
    matching by substring.
    """
    from transformers import modeling_utils

    load = modeling_utils.lazy_import_flash_attention
    if hasattr(load, "flashgen_wraps"):
        return

    def load_others(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        return None if implementation in _backends else load(implementation, *args, **kwargs)

    load_others.flashgen_wraps = load  # type: ignore[attr-defined]
    modeling_utils.lazy_import_flash_attention = load_others


# What transformers hands to flash-attn where a batch is packed: dropping it would let sequences see one another.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: BackendName = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function.

    Args:
        module: the calling layer; its `is_causal` counts where the argument is None.
        query: (batch, heads, seqlen_q, head_dim).
        key, value: (batch, kv_heads, seqlen_k, head_dim).
        attention_mask: None, or bool and broadcastable to (batch, heads, seqlen_q, seqlen_k), causality included.
        backend, scaling, dropout, is_causal, softcap, s_aux, position_bias, sliding_window: as transformers names them.
        output_attentions: refused: the probabilities are never materialised.
        **kwargs: what concerns other parts of a model (position ids, caches).

    Returns:
        (batch, seqlen_q, heads, head_dim) and None for the attention weights.

    Raises:
        UnsupportedProblemError: something is asked for that no variant covers.
    """
    if output_attentions:
        raise UnsupportedProblemError(
            "output_attentions=True is not supported: exact attention in tiles never holds the probabilities. Use attn_implementation='eager'."
        )
    packed = [argument for argument in _PACKED if kwargs.get(argument) is not None]
    if packed:
        raise UnsupportedProblemError(
            f"packed sequences ({', '.join(packed)}) are not supported by this integration yet: pass unpacked batches."
        )
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and attention_mask is None
    options: dict[str, Any] = {}
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            options["bias"] = attention_mask
        elif not bool(attention_mask.all()):
            options["attn_mask"] = attention_mask[..., :seqlen_k]
    elif sliding_window is not None and sliding_window < seqlen_k and seqlen_q > 1:
        options["window_size"] = (sliding_window - 1, -1)
    options |= {} if softcap is None else {"softcap": softcap}
    options |= {} if s_aux is None else {"sinks": s_aux}
    options |= {} if position_bias is None else {"bias": position_bias}
    options |= {"dropout_p": dropout} if dropout else {}
    out = attention(query, key, value, causal=causal, softmax_scale=scaling, layout="bhsd", backend=backend, **options)
    assert isinstance(out, Tensor)  # return_lse was not asked for
    return out.transpose(1, 2).contiguous(), None
