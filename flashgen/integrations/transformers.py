"""flashgen as an attention implementation of Hugging Face transformers, through its own registry.

    from flashgen.integrations.transformers import register
    register()
    model = AutoModel.from_pretrained(..., attn_implementation="flashgen")

transformers hands over `bhsd` tensors and, where more is hidden than causality hides, a boolean mask of its own making; an
unpadded batch gets none. Whatever flashgen cannot do with what it is handed raises; nothing is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgen.api import BackendName, attention
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.settings import BACKENDS

_backends: dict[str, BackendName] = {}


def register(name: str = "flashgen", backend: BackendName = "auto") -> None:
    """Register flashgen under a name for `attn_implementation=`; calling it again changes the backend.

    Args:
        name: what models will name.
        backend: as in `flashgen.attention`.

    Raises:
        InvalidProblemError: the backend is not known, or the name is one of transformers' own.
        UnsupportedProblemError: transformers is not installed, or too old to have a registry.
    """
    if backend not in BACKENDS:
        raise InvalidProblemError(f"backend={backend!r} is not known: allowed are {', '.join(BACKENDS)}.")
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise UnsupportedProblemError(
            f"transformers cannot be used: {error}. It needs version 5 or newer: pip install 'flashgen[quickstart]'"
        ) from error
    if name not in _backends and name in ("eager", *AttentionInterface().valid_keys()):
        raise InvalidProblemError(
            f"name={name!r} is taken: transformers has an implementation of that name. Choose another, e.g. 'flashgen'."
        )
    _backends[name] = backend

    def forward(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        return attention_forward(module, query, key, value, attention_mask, backend=_backends[name], **kwargs)

    _keep_from_flash_attn_loader()
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, attention_mask_for)


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


# -- masks --


def attention_mask_for(**kwargs: Any) -> Tensor | None:
    """Transformers' mask function: a boolean mask, or None where causality (bottom-right) or nothing says the same.

    That of `sdpa` leaves the mask out in one case more, the first step into a static cache, since PyTorch aligns causality
    top-left: there the cache's unused end would count here. And it builds a mask for several tokens behind a filled cache,
    where bottom-right causality needs none.

    Args:
        **kwargs: as transformers passes them; lengths, offsets, the pattern and the padding.

    Returns:
        bool (batch, 1, seqlen_q, seqlen_k), True where a query may attend, or None.
    """
    from transformers.masking_utils import sdpa_mask

    if kwargs.get("allow_is_causal_skip", True):
        if not _ends_together(kwargs):
            kwargs["allow_is_causal_skip"] = False
        elif not _is_windowed(kwargs) and not _is_padded(kwargs):
            return None
    mask: Tensor | None = sdpa_mask(**kwargs)
    return mask


def _ends_together(kwargs: dict[str, Any]) -> bool:
    """Whether the last query stands at the last key, which is what bottom-right alignment says."""
    if "q_length" in kwargs:
        length, offset = kwargs["q_length"], kwargs.get("q_offset", 0)
    else:  # older versions pass the positions themselves
        positions = kwargs["cache_position"]
        length, offset = positions.shape[0], positions[0]
    if isinstance(offset, Tensor):
        if torch.compiler.is_compiling():
            return False  # reading it would break the graph: the mask says it all
        offset = int(offset)
    return bool(offset + length == kwargs.get("kv_offset", 0) + kwargs["kv_length"])


def _is_windowed(kwargs: dict[str, Any]) -> bool:
    local = kwargs.get("local_size")
    return local is not None and kwargs["kv_length"] >= local


def _is_padded(kwargs: dict[str, Any]) -> bool:
    """Whether a key is padding; unknown, so yes, while a graph is being compiled."""
    given = kwargs.get("attention_mask")
    if given is None:
        return False
    first, length = kwargs.get("kv_offset", 0), kwargs["kv_length"]
    if torch.compiler.is_compiling() or given.shape[-1] < first + length:
        return True
    return not bool(given[:, first : first + length].all())


# -- attention --

# What a model may hand over besides, and what dropping it would do. Names that only other parts of a model read (positions,
# caches) pass by.
_REFUSED = {
    "cu_seq_lens_q": "packed sequences would see one another",
    "cu_seq_lens_k": "packed sequences would see one another",
    "cu_seqlens_q": "packed sequences would see one another",
    "cu_seqlens_k": "packed sequences would see one another",
    "sinks": "these sinks are one per query, flashgen's are one per head",
    "indices": "keys that are not selected would be seen",
    "block_indices": "keys that are not selected would be seen",
    "head_mask": "heads that are switched off would count",
}


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
        attention_mask: None, or broadcastable to (batch, heads, seqlen_q, seqlen_k), causality included: bool, or a float
            that is added.
        backend, scaling, dropout, is_causal, softcap, s_aux, position_bias, sliding_window: as transformers names them.
        output_attentions: refused: the probabilities are never materialised.
        **kwargs: what concerns other parts of a model (position ids, caches).

    Returns:
        (batch, seqlen_q, heads, head_dim) and None for the attention weights.

    Raises:
        UnsupportedProblemError: something is asked for that no variant covers.
    """
    _refuse(output_attentions, kwargs)
    seqlen_k = key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and attention_mask is None
    options: dict[str, Any] = {}
    if attention_mask is not None:
        options |= _mask_options(attention_mask, position_bias, query, seqlen_k)
    else:
        if sliding_window is not None and sliding_window < seqlen_k:
            if not causal:
                raise UnsupportedProblemError(
                    f"sliding_window={sliding_window} without causality and without a mask is not supported: models differ in "
                    "what it means. Use attn_implementation='sdpa'."
                )
            options["window_size"] = (sliding_window - 1, -1)
        options |= {} if position_bias is None else {"bias": position_bias}
    options |= {} if softcap is None else {"softcap": softcap}
    options |= {} if s_aux is None else {"sinks": s_aux}
    options |= {"dropout_p": dropout} if dropout else {}
    out = attention(query, key, value, causal=causal, softmax_scale=scaling, layout="bhsd", backend=backend, **options)
    assert isinstance(out, Tensor)  # return_lse was not asked for
    return out.transpose(1, 2).contiguous(), None


def _refuse(output_attentions: bool, kwargs: dict[str, Any]) -> None:
    if output_attentions:
        raise UnsupportedProblemError(
            "output_attentions=True is not supported: exact attention in tiles never holds the probabilities. Use attn_implementation='eager'."
        )
    found = {name: why for name, why in _REFUSED.items() if kwargs.get(name) is not None}
    if found:
        raise UnsupportedProblemError(
            "this model's attention is not supported by flashgen's integration (attn_implementation='sdpa' may do):",
            found,
        )


def _mask_options(mask: Tensor, position_bias: Tensor | None, query: Tensor, seqlen_k: int) -> dict[str, Any]:
    """A mask as `attention()` takes it: none where all is visible, `attn_mask` where bool, else `bias`."""
    if mask.dim() != 4:
        raise UnsupportedProblemError(
            f"attention_mask of shape {tuple(mask.shape)} is not supported: it must be 4-dimensional, broadcastable to "
            f"(batch, heads, seqlen_q, seqlen_k) = {(*query.shape[:3], seqlen_k)}."
        )
    mask = mask[..., :seqlen_k]  # a static cache's mask may be longer than the keys
    if mask.dtype != torch.bool:
        return {"bias": mask if position_bias is None else mask + position_bias}
    options: dict[str, Any] = {} if position_bias is None else {"bias": position_bias}
    # While compiling nothing is read from the device.
    if torch.compiler.is_compiling() or not bool(mask.all()):
        options["attn_mask"] = mask
    return options
