"""Named attention shapes of real models, each with the source of its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from flashgen.errors import InvalidProblemError
from flashgen.spec import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The attention of one model.

    Attributes:
        name: what `--preset` takes.
        num_heads_q: query heads.
        num_heads_kv: key/value heads.
        head_dim: of q, k and v.
        causal: whether the model masks the future.
        dtype: the dtype it is usually run in.
        seqlen: the length tuned for when none is given.
        batch: the batch tuned for when none is given.
        source: where the numbers stand.
    """

    name: str
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    causal: bool
    dtype: DType
    seqlen: int
    batch: int
    source: str


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="llama3-8b",
            num_heads_q=32,
            num_heads_kv=8,
            head_dim=128,
            causal=True,
            dtype="bf16",
            seqlen=8192,
            batch=1,
            source="The Llama 3 Herd of Models (arXiv 2407.21783), table 3: 32 heads, 8 key/value heads, model dimension 4096",
        ),
        Preset(
            name="bert-base",
            num_heads_q=12,
            num_heads_kv=12,
            head_dim=64,
            causal=False,
            dtype="fp16",
            seqlen=512,
            batch=32,
            source="BERT (arXiv 1810.04805), section 3: L=12, H=768, A=12",
        ),
        Preset(
            name="minilm-l6",
            num_heads_q=12,
            num_heads_kv=12,
            head_dim=32,
            causal=False,
            dtype="fp32",
            seqlen=128,
            batch=8,
            source="config.json of all-MiniLM-L6-v2: hidden_size 384, num_attention_heads 12, 6 layers, float32",
        ),
    )
}


def preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        InvalidProblemError: the name is not known; the message lists those that are.
    """
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise InvalidProblemError(
            f"preset {name!r} is not known: allowed are {', '.join(PRESETS)}. See `flashgen show presets`."
        ) from None
