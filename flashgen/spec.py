"""`AttentionSpec`: everything that changes a kernel's text or its search space, and nothing else.

Sizes, strides, the GQA ratio, the softmax scale, the width of a window and the number of a softcap are
run-time values and live in `Problem`. One spec is one rendered file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, cast

from flashgen.errors import InvalidProblemError, UnsupportedProblemError

Op = Literal["attention_fwd", "attention_bwd", "attention_decode"]
DType = Literal["fp16", "bf16", "fp32"]

OPS: tuple[Op, ...] = ("attention_fwd", "attention_bwd", "attention_decode")
DTYPES: tuple[DType, ...] = ("fp16", "bf16", "fp32")
DTYPE_BYTES: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
MAX_HEAD_DIM = 256

_KEY_HEAD = re.compile(
    r"^(?P<op>[a-z_]+)-(?P<dtype>[a-z0-9]+)-d(?P<head_dim>\d+)(?:-dv(?P<head_dim_v>\d+))?(?P<flags>(?:-[a-z_]+)*?)"
    r"(?:-mods_(?P<mods>[0-9a-f]{16}))?$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mods:
    """score_mod and mask_mod as a kernel has them; equal where the digests are.

    Attributes:
        digest: of all that a kernel's text takes from them.
        program: a `flashgen.mods.Program`, which writes that text.
        samples: what it captures, for instance: tensors for tuning and checks (`Problem.modified`); none in a call.
    """

    digest: str
    program: Any = field(compare=False, repr=False)
    samples: tuple[Any, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What is compiled.

    Attributes:
        op: the operation, also the database's and the command line's word for it.
        dtype: of q, k, v and the output.
        head_dim: of q and k, 1 to 256.
        head_dim_v: of v and the output, 1 to 256.
        causal: a causal mask; its alignment is a run-time offset.
        window: a sliding window on either side.
        softcap: scores pass through softcap * tanh(s / softcap).
        has_alibi: ALiBi slopes.
        has_sinks: sink logits in the denominator.
        has_bias: an additive bias.
        has_attn_mask: a boolean mask.
        has_score_mod: a traced score_mod.
        has_mask_mod: a traced mask_mod.
        has_block_mask: a BlockMask.
        dropout: dropout on the probabilities.
        varlen: packed sequences with cu_seqlens.
        paged: a paged key/value cache.
        has_lse: the log-sum-exp is written too.
        mods: score_mod and mask_mod, once they are traced; from a key alone, by their digest, nothing can be rendered.
    """

    op: Op = "attention_fwd"
    dtype: DType
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: bool = False
    softcap: bool = False
    has_alibi: bool = False
    has_sinks: bool = False
    has_bias: bool = False
    has_attn_mask: bool = False
    has_score_mod: bool = False
    has_mask_mod: bool = False
    has_block_mask: bool = False
    dropout: bool = False
    varlen: bool = False
    paged: bool = False
    has_lse: bool = False
    mods: Mods | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise InvalidProblemError(f"op {self.op!r} is not known: allowed are {', '.join(OPS)}.")
        if self.dtype not in DTYPES:
            raise InvalidProblemError(f"dtype {self.dtype!r} is not known: allowed are {', '.join(DTYPES)}.")
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidProblemError(f"{name} {value} is out of range: allowed are 1 to {MAX_HEAD_DIM}.")
            if value > MAX_HEAD_DIM:
                raise UnsupportedProblemError(
                    f"{name} {value} is not supported by any variant: allowed are 1 to {MAX_HEAD_DIM}."
                )

    @property
    def key(self) -> str:
        """The spec as text, e.g. `attention_fwd-bf16-d128-causal-lse`; built from the fields, defaults omitted."""
        parts = [self.op, self.dtype, f"d{self.head_dim}"]
        if self.head_dim_v != self.head_dim:
            parts.append(f"dv{self.head_dim_v}")
        parts += [_flag_word(name) for name in flag_names() if getattr(self, name)]
        parts += [f"mods_{self.mods.digest}"] if self.mods is not None else []
        return "-".join(parts)

    @classmethod
    def from_key(cls, key: str) -> AttentionSpec:
        """The inverse of `key`.

        Raises:
            InvalidProblemError: the text is no spec key.
        """
        match = _KEY_HEAD.match(key)
        flags = {_flag_word(name): name for name in flag_names()}
        words = match["flags"].split("-")[1:] if match else []
        if match is None or any(word not in flags for word in words):
            raise InvalidProblemError(
                f"{key!r} is not a spec key: expected e.g. attention_fwd-bf16-d128-causal-lse "
                f"(op-dtype-dHEAD_DIM[-dvHEAD_DIM_V][-flags], flags: {', '.join(flags)})."
            )
        values: dict[str, Any] = {flags[word]: True for word in words}
        head_dim = int(match["head_dim"])
        return cls(
            op=cast(Op, match["op"]),
            dtype=cast(DType, match["dtype"]),
            head_dim=head_dim,
            head_dim_v=int(match["head_dim_v"] or head_dim),
            mods=Mods(digest=match["mods"], program=None) if match["mods"] else None,
            **values,
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the boolean fields that are set."""
        return tuple(name for name in flag_names() if getattr(self, name))

    @property
    def has_diagonal(self) -> bool:
        """Whether what a query sees depends on where it stands: a causal mask or a window."""
        return self.causal or self.window

    @property
    def modifies_scores(self) -> bool:
        """Whether scores are changed after scaling: the scale then cannot wait for the softmax."""
        return self.softcap or self.has_alibi or self.has_bias or self.has_score_mod

    @property
    def hides_anywhere(self) -> bool:
        """Whether a key may be hidden (or have a score of -inf) in any block, not only at the ends of a range."""
        return self.has_bias or self.has_score_mod or self.has_attn_mask

    @property
    def has_free_mask(self) -> bool:
        """Whether a mask other than a diagonal may hide a key from every row of a tile that reads it."""
        return self.has_attn_mask or self.has_mask_mod or self.has_block_mask

    @property
    def has_two_ends(self) -> bool:
        """Whether blocks may be hidden before the first key that a tile sees, too."""
        return self.window or self.has_mask_mod

    @property
    def itemsize(self) -> int:
        """Bytes of one element of q."""
        return DTYPE_BYTES[self.dtype]

    @property
    def block_head_dim(self) -> int:
        """`head_dim` padded to what one tile holds: a power of two, at least 16 (the least K of a tensor-core product)."""
        return padded_head_dim(self.head_dim)

    @property
    def block_head_dim_v(self) -> int:
        """`head_dim_v` padded to a power of two; in 16 bit at least 64.

        Triton 3.6's ptxas (12.8) miscompiles narrower value tiles on sm_90 when strides are no multiples of 16: HGMMA reads a
        descriptor from uniform registers that nothing wrote (found by an illegal access on an H100, shown by
        `sass.undefined_registers`; Triton 3.9 is not affected). To be narrowed when 3.6 is no longer supported.
        """
        return max(64 if self.itemsize == 2 else 16, padded_head_dim(self.head_dim_v))

    @property
    def block_head_dim_out(self) -> int:
        """`head_dim` padded for tiles that are results of products too (dq and dk): as `block_head_dim_v`."""
        return max(64 if self.itemsize == 2 else 16, self.block_head_dim)


@cache
def flag_names() -> tuple[str, ...]:
    """The boolean fields of `AttentionSpec`, in the order of the key."""
    return tuple(f.name for f in fields(AttentionSpec) if f.type in ("bool", bool))


def _flag_word(name: str) -> str:
    return name.removeprefix("has_")


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())
