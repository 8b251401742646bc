"""What each option of `attention()` adds to a portable kernel: arguments of `launch`, of the kernel, and of its inner loop.

Templates write these lists out and hold the statements; nothing else in a template enumerates options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from flashgen.problem import Problem
from flashgen.spec import AttentionSpec

# Kernels compute tanh(y) as 1 - 2 / (exp(2y) + 1): a score is off by some 1e-7 of the cap, which is to stay below what the dtype
# rounds away. At a cap of 2^20 gradients in bf16 were off by 9 % in the simulator, at 1e5 by no more than without one.
MAX_SOFTCAP = {"fp16": 2.0**16, "bf16": 2.0**16, "fp32": 2.0**10}


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One option, by names.

    Attributes:
        launch: keyword arguments of the rendered `launch`.
        pointers, scalars, strides: parameters of the kernel -> what `launch` passes.
        inner: what the inner loop takes beside q, k and v: parameters or variables of the kernel.
    """

    launch: tuple[str, ...]
    pointers: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=dict)
    strides: Mapping[str, str] = field(default_factory=dict)
    inner: tuple[str, ...] = ()


def _matrix(name: str) -> Feature:
    """An operand of (batch, num_heads_q, seqlen_q, seqlen_k), broadcast by strides of 0."""
    strides = _strides(name, "bhmn")
    inner = (f"{name}_ptr", f"stride_{name}_m", f"stride_{name}_n", "seqlen_q")
    return Feature(launch=(name,), pointers={f"{name}_ptr": name}, strides=strides, inner=inner)


def _strides(name: str, letters: str) -> dict[str, str]:
    return {f"stride_{name}_{letter}": f"{name}.stride({dim})" for dim, letter in enumerate(letters)}


# In the order in which they stand in signatures.
FEATURES: Mapping[str, Feature] = {
    "varlen": Feature(
        launch=("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k", "bottom_right"),
        pointers={name + "_ptr": name for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")},
        scalars={"bottom_right": "int(bottom_right)"},
    ),
    "window": Feature(
        launch=("window_left", "window_right"),
        scalars={"window_left": "window_left", "window_right": "window_right"},
        inner=("kv_start", "window_left", "window_right"),
    ),
    "softcap": Feature(launch=("softcap",), scalars={"softcap": "softcap"}, inner=("softcap",)),
    "has_alibi": Feature(
        launch=("alibi_slopes",),
        pointers={"alibi_slopes_ptr": "alibi_slopes"},
        strides={"stride_alibi_b": "alibi_slopes.stride(0)", "stride_alibi_h": "alibi_slopes.stride(1)"},
        inner=("slope", "seqlen_q", "seqlen_k"),
    ),
    "has_bias": _matrix("bias"),
    "has_attn_mask": _matrix("attn_mask"),
    "dropout": Feature(
        launch=("philox", "dropout_p"),
        pointers={"philox_ptr": "philox"},
        scalars={"dropout_threshold": "dropout_threshold", "dropout_scale": "dropout_scale"},
        inner=("philox_ptr", "off_bh", "start_m", "dropout_threshold"),
    ),
    "has_block_mask": Feature(
        launch=("block_kinds", "block_size_q", "block_size_k", "key_blocks", "key_counts"),
        pointers={f"{name}_ptr": name for name in ("block_kinds", "key_blocks", "key_counts")},
        scalars={name: name for name in ("block_size_q", "block_size_k")},
        strides=_strides("block_kinds", "bhm") | _strides("key_blocks", "bhm") | _strides("key_counts", "bhm"),
        inner=(
            "key_blocks_ptr",
            "start_m",
            "block_kinds_ptr",
            "stride_block_kinds_m",
            "block_size_q",
            "block_size_k",
            "seqlen_q",
            "seqlen_k",
        ),
    ),
    "has_sinks": Feature(
        launch=("sinks",), pointers={"sinks_ptr": "sinks"}, strides={"stride_sinks": "sinks.stride(0)"}
    ),
}

# What the gradients of keys and values walk over.
_LISTED_ROWS = Feature(
    launch=("row_blocks", "row_counts"),
    pointers={f"{name}_ptr": name for name in ("row_blocks", "row_counts")},
    strides=_strides("row_blocks", "bhn") | _strides("row_counts", "bhn"),
)

# What compiling without a launch cannot see: numbers that are floats (Triton never specialises on their values), elements of
# pointers that are not of the spec's dtype, and strides that are 1 in a contiguous operand.
FLOATS = ("sm_scale", "softcap", "dropout_scale")
ELEMENTS: Mapping[str, str] = {
    "cu_seqlens_q_ptr": "i32",
    "cu_seqlens_k_ptr": "i32",
    "seqused_k_ptr": "i32",
    "alibi_slopes_ptr": "fp32",
    "attn_mask_ptr": "u1",  # as Triton calls every bool
    "philox_ptr": "i64",
    "mask_ranges_ptr": "i32",
    "mask_words_ptr": "i32",
    "mask_lists_ptr": "i32",
    "row_ranges_ptr": "i32",
    "block_kinds_ptr": "u8",
    "key_blocks_ptr": "i32",
    "key_counts_ptr": "i32",
    "row_blocks_ptr": "i32",
    "row_counts_ptr": "i32",
    "dbias_ptr": "fp32",
    "largest_ptr": "i32",
}
UNIT_STRIDES = ("stride_alibi_h", "stride_bias_n", "stride_dbias_n", "stride_attn_mask_n", "stride_sinks")


def _mods(spec: AttentionSpec) -> Feature:
    """What score_mod and mask_mod add: the tensors that they capture, and where the mask hides whole blocks."""
    if spec.mods is None:
        return Feature(launch=())
    pointers, scalars, strides = {}, {}, {}
    names = [row.name for row in spec.mods.program.captures]
    for row in spec.mods.program.captures:
        pointers[f"{row.name}_ptr"] = captured(row.name)
        for dim in range(len(row.shape)):
            strides[f"{row.name}_stride{dim}"] = f"{captured(row.name)}.stride({dim})"
            scalars[f"{row.name}_size{dim}"] = f"{captured(row.name)}.shape[{dim}]"
    launch = tuple(map(captured, names))
    tables = {"mask_ranges": "ranges"} | ({"row_ranges": "row_ranges"} if spec.op == "attention_bwd" else {})
    for table, short in tables.items() if has_ranges(spec) else ():
        launch += (table,)
        pointers[f"{table}_ptr"] = table
        strides |= {
            f"stride_{short}_{x}": f"0 if {table} is None else {table}.stride({dim})" for dim, x in enumerate("bh")
        }
    return Feature(
        launch=launch,
        pointers=pointers,
        scalars=scalars,
        strides=strides,
        inner=("b", "h", *(("seqlen_q",) if spec.has_mask_mod else ()), *spec.mods.program.parameters),
    )


def has_ranges(spec: AttentionSpec) -> bool:
    """Whether a mask_mod leaves ranges of blocks; beside a BlockMask it is evaluated in each block that is listed."""
    return spec.has_mask_mod and not spec.has_block_mask


def elements(spec: AttentionSpec) -> Mapping[str, str]:
    """Types of what pointers point to that is not of the spec's dtype, captured tensors among them."""
    if spec.mods is None:
        return ELEMENTS
    rows = spec.mods.program.captures
    own = {f"{row.name}_ptr": _ELEMENT[row.dtype] for row in rows}
    return MappingProxyType({**ELEMENTS, **own, **{f"sum_of_{row.name}_ptr": "fp32" for row in rows}})


_ELEMENT = {
    "bool": "u1", "uint8": "u8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64",
}  # fmt: skip


def captured(name: str) -> str:
    """What `launch` calls a captured tensor; the kernel's own names are left alone."""
    return f"captured_{name}"


@dataclass(frozen=True, slots=True)
class Signature:
    """The names that one spec's options add, each once."""

    launch: tuple[str, ...]
    pointers: Mapping[str, str]
    scalars: Mapping[str, str]
    strides: Mapping[str, str]
    inner: tuple[str, ...]

    @property
    def unspecialised(self) -> tuple[str, ...]:
        """Integers that change from call to call: a kernel compiled for one value would be compiled again for the next."""
        return tuple(name for name in self.scalars if name not in FLOATS)


def signature(spec: AttentionSpec) -> Signature:
    """What the options of a spec add."""
    used = [*(feature for flag, feature in FEATURES.items() if flag in spec.flags), _mods(spec)]
    if spec.op == "attention_bwd" and spec.has_block_mask:
        used.append(_LISTED_ROWS)

    def merged(name: str) -> dict[str, str]:
        return {key: value for feature in used for key, value in getattr(feature, name).items()}

    inner = dict.fromkeys(name for feature in used for name in feature.inner)
    if spec.modifies_scores:
        inner = {"sm_scale": None, **inner}
    return Signature(
        launch=tuple(name for feature in used for name in feature.launch),
        pointers=merged("pointers"),
        scalars=merged("scalars"),
        strides=merged("strides"),
        inner=tuple(inner),
    )


def capped_too_high(problem: Problem) -> str | None:
    """None, or why a cap is too large for a kernel's tanh."""
    most = MAX_SOFTCAP[problem.dtype]
    if problem.softcap <= most:
        return None
    return f"takes softcap up to {most:g} in {problem.dtype}: beyond, the error of its tanh, 1e-7 of the cap, would show in the scores"
