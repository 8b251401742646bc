"""What each option of `attention()` hands to the functions of the Hopper forward: names, in the order in which they stand.

The arguments of the kernel and of `launch` are the portable kernel's (`features.signature`); only what is cut differently stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from flashgen.errors import RenderError
from flashgen.spec import AttentionSpec
from flashgen.variants.features import Signature, has_ranges, signature

# Options that differ from one query head to the next, so that heads of a group cannot share a tile; or lengths that nobody knows.
_PER_HEAD = (
    "has_alibi",
    "has_bias",
    "has_attn_mask",
    "has_score_mod",
    "has_mask_mod",
    "has_block_mask",
    "dropout",
    "varlen",
)
_LISTING = (
    *("key_blocks_ptr", "key_counts_ptr"),
    *(f"stride_{name}_{letter}" for name in ("key_blocks", "key_counts") for letter in "bhm"),
)
_PACKED = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_k_ptr")
_WORDS = ("mask_words_ptr", "slot")
_LISTS = ("mask_lists_ptr", "stride_lists_b", "stride_lists_h", "stride_lists_m")
_PLAIN = ("causal", "has_lse")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Names that the options of one spec add; a plain spec adds none.

    Attributes:
        any: whether there is an option at all.
        signature: arguments of the kernel and of `launch`.
        score: what `modify_scores` takes beside the scores and where they are.
        mask: what `mask_scores` takes.
        operands: what tiles of bias and attn_mask are loaded by, which both of them take.
        dropout: what `keep` takes beside the block of keys.
        ranges: what `key_range` takes.
        listing: what finds a tile's list in a block mask.
        varlen: whether sequences are packed, whose offsets and lengths each tile looks up.
        pack: whether heads of a group may share a tile.
        hides: whether a key may be hidden from all rows of a tile that loads it, and hold anything.
        masked_when: in which steps over keys the mask is applied: `True`, `IS_MASKED` (a compile-time flag of the step), or none where it is empty.
    """

    any: bool
    signature: Signature
    score: tuple[str, ...]
    mask: tuple[str, ...]
    operands: tuple[str, ...]
    dropout: tuple[str, ...]
    ranges: tuple[str, ...]
    listing: tuple[str, ...]
    varlen: bool
    pack: bool
    hides: bool
    masked_when: str
    by_bits: bool
    linear: bool
    capped: bool
    evaluated: tuple[str, ...]
    tabled: bool
    reads: bool

    @property
    def first_masked_when(self) -> str:
        """The same of the last block of keys, which a tile begins with: it may be ragged, too."""
        return "True" if self.masked_when else "not EVEN_K"

    @property
    def late(self) -> bool:
        """Whether scores may be changed before they are scaled, so that the scale still folds into the exponentials."""
        return self.linear or self.capped

    @property
    def lists(self) -> tuple[str, ...]:
        """What finds a tile's list of blocks of a mask_mod that leaves them scattered."""
        return _LISTS if self.tabled else ()

    @property
    def bits(self) -> tuple[str, ...]:
        """What makes the bits of a block of keys by mask_mod."""
        return (*self.evaluated, *_WORDS) if self.tabled else self.evaluated

    @property
    def bits_alone(self) -> bool:
        """Whether those bits say all of what a row sees."""
        return self.by_bits and not self.mask

    @property
    def inner(self) -> tuple[str, ...]:
        """What one step over keys takes."""
        return tuple(dict.fromkeys((*self.score, *self.mask, *self.operands, *self.bits, *self.dropout)))

    @property
    def afresh(self) -> tuple[str, ...]:
        """Of these what scores take that are computed once more, without the words of a mask."""
        return tuple(name for name in self.inner if name not in ("seqlen_q", "seqlen_k", *_WORDS))

    @property
    def looks_at_batch(self) -> bool:
        """Whether a consumer of packed sequences needs the number of its sequence."""
        names = {*self.inner, *self.ranges}
        return not names.isdisjoint(("off_b", "slope", "bias_head", "attn_mask_head", "off_bh"))

    @property
    def arguments(self) -> dict[str, str]:
        """Parameters of the kernel for options -> what `launch` passes."""
        added, found = self.signature, {}
        if "sm_scale" in self.score:
            found["sm_scale"] = "sm_scale"
        if "alibi_shift" in self.score and not self.varlen:
            found["alibi_shift"] = "alibi_shift"
        # What `recompute` reads, and what the end of a packed sequence is written by, without TMA.
        plain = "kv" * self.hides + "o" * self.varlen
        found |= {f"{x}_ptr": x for x in plain}
        found |= {**added.pointers, **added.scalars, **added.strides}
        for x in plain:
            letters = ("b", "m" if x in "qo" else "n", "h")
            dims = range(1, 3) if self.varlen else range(3)
            found |= {f"stride_{x}{letters[dim]}": f"{x}.stride({dim})" for dim in dims}
        return found

    @property
    def kernel(self) -> tuple[str, ...]:
        """What the kernel takes for options, and hands to its consumers."""
        return tuple(self.arguments)

    @property
    def passed(self) -> tuple[str, ...]:
        """What `launch` passes for them."""
        return tuple(self.arguments.values())

    @property
    def unspecialised(self) -> tuple[str, ...]:
        """Integers that change from call to call: a kernel compiled for one value would be compiled again for the next."""
        return tuple(name for name in ("alibi_shift", *self.signature.unspecialised) if name in self.arguments)

    @property
    def loader(self) -> tuple[str, ...]:
        """What the kernel hands to its producer, beside the offset."""
        if self.listing:
            return self.listing
        packed = [*_PACKED, *(["bottom_right"] if "causal_offset" in self.ranges else [])] if self.varlen else []
        return (
            *packed,
            *(name for name in self.ranges if name not in ("off_b", "off_h", "causal_offset")),
            *self.lists,
        )


@lru_cache(maxsize=64)  # asked for some ten times a kernel, and mods are written out each time
def options(spec: AttentionSpec) -> Options:
    """The names of a spec."""
    return Options(
        any=any(flag not in _PLAIN for flag in spec.flags),
        signature=signature_of(spec),
        score=_score(spec),
        mask=_mask(spec),
        operands=_operands(spec),
        dropout=("philox_seed", "philox_offset", "off_bh", "start_m", "dropout_threshold") if spec.dropout else (),
        ranges=_ranges(spec),
        listing=_LISTING if spec.has_block_mask else (),
        varlen=spec.varlen,
        pack=not any(getattr(spec, flag) for flag in _PER_HEAD),
        hides=spec.varlen or spec.window or spec.has_free_mask,
        linear=spec.has_alibi and spec.causal and not (spec.softcap or spec.has_score_mod or spec.has_bias),
        capped=spec.softcap and not (spec.has_alibi or spec.has_score_mod or spec.has_bias),
        by_bits=spec.has_mask_mod and not spec.has_block_mask,
        evaluated=tuple(_evaluated(spec)),
        tabled=has_words(spec),
        reads=has_words(spec) and bool(spec.mods and spec.mods.program.mask_reads and not spec.mods.program.looked_up),
        masked_when="True" if spec.has_attn_mask else "IS_MASKED" if spec.has_diagonal or spec.has_free_mask else "",
    )


def _score(spec: AttentionSpec) -> tuple[str, ...]:
    names = ["sm_scale"] if spec.modifies_scores else []
    names += ["softcap"] if spec.softcap else []
    names += _captured(spec, "score") if spec.has_score_mod else []
    names += ["slope", "alibi_shift"] if spec.has_alibi else []
    return tuple(dict.fromkeys(names))


def _mask(spec: AttentionSpec) -> tuple[str, ...]:
    names = ["causal_offset"] if spec.has_diagonal else []
    names += ["window_left", "window_right"] if spec.window else []
    if spec.has_block_mask:
        names += _captured(spec, "mask") if spec.has_mask_mod else []
        names += ["start_m", "block_kinds_head", "stride_block_kinds_m", "block_size_q", "block_size_k", "seqlen_q"]
        names += _captured(spec, "block")
    return tuple(dict.fromkeys(names))


def _operands(spec: AttentionSpec) -> tuple[str, ...]:
    names = [name for name in ("bias", "attn_mask") if getattr(spec, f"has_{name}")]
    return (*(word for name in names for word in _matrix(name)), "seqlen_q") if names else ()


def signature_of(spec: AttentionSpec) -> Signature:
    """What options add to the kernel and to `launch`: the portable kernel's, and the words of a mask."""
    found = signature(spec)
    if not has_words(spec):
        return found
    strides = {
        f"stride_lists_{x}": f"0 if mask_lists is None else mask_lists.stride({dim})" for dim, x in enumerate("bhm")
    }
    return replace(
        found,
        launch=(*found.launch, "mask_words", "mask_lists"),
        pointers={**found.pointers, "mask_words_ptr": "mask_words", "mask_lists_ptr": "mask_lists"},
        strides={**found.strides, **strides},
    )


def _evaluated(spec: AttentionSpec) -> list[str]:
    return _captured(spec, "mask") if spec.has_mask_mod and not spec.has_block_mask else []


def has_words(spec: AttentionSpec) -> bool:
    """Whether masked blocks of a mask_mod may be looked up."""
    return has_ranges(spec) and not spec.varlen


def _ranges(spec: AttentionSpec) -> tuple[str, ...]:
    names = ["causal_offset"] if spec.has_diagonal else []
    names += ["window_left", "window_right"] if spec.window else []
    if has_ranges(spec):
        names += ["mask_ranges_ptr", "stride_ranges_b", "stride_ranges_h", "off_b", "off_h"]
    return tuple(names)


def _matrix(name: str) -> list[str]:
    return [f"{name}_head", f"stride_{name}_m", f"stride_{name}_n"]


def words(spec: AttentionSpec, kind: str) -> frozenset[str]:
    """The names in the text of a mod; none where the spec has no such mod."""
    given = {"score": spec.has_score_mod, "mask": spec.has_mask_mod, "block": spec.has_block_mask}
    if spec.mods is None or not given[kind]:
        return frozenset()
    text = emission(spec, kind)
    lines = " ".join((*text.statements, *text.results))
    return frozenset("".join(c if c.isalnum() or c == "_" else " " for c in lines).split())


def _captured(spec: AttentionSpec, kind: str) -> list[str]:
    """What the text of a mod reads: where it stands, and the tensors that it captured."""
    if spec.mods is None:
        return []
    found = words(spec, kind)
    return [name for name in ("off_b", "off_h", *spec.mods.program.parameters) if name in found]


@lru_cache(maxsize=64)
def emission(spec: AttentionSpec, kind: str) -> Any:
    """The text of a spec's `score`, `mask` or `block`, a `mods.Emission`."""
    from flashgen import mods  # imports torch: only where a mod was given, which needed it already

    if spec.mods is None:
        raise RenderError(f"{spec.key} has mods that were not traced: nothing can be rendered for them.")
    program = spec.mods.program
    names = mods.Names(score="qk", b="off_b", h="off_h", q_idx="q_idx", kv_idx="kv_idx", apart="apart")
    emit = {"score": program.emit_score, "mask": program.emit_mask, "block": program.emit_block}[kind]
    return emit(dialect=mods.GLUON, names=names, like="qk")
