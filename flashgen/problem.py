"""`Problem`: one call of attention as a checked value: shapes and options, no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.presets import find as find_preset
from flashgen.spec import DTYPES, AttentionSpec, DType, Op

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["bshd", "bhsd"]
CausalAlignment = Literal["bottom-right", "top-left"]
LAYOUTS: tuple[Layout, ...] = ("bshd", "bhsd")
ALIGNMENTS: tuple[CausalAlignment, ...] = ("bottom-right", "top-left")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call: what `attention()` was asked, without the tensors.

    Attributes:
        dtype: of q, k and v.
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v: sizes.
        causal, causal_alignment, softmax_scale, window_size, softcap, dropout_p, layout: as in `attention()`;
            softmax_scale None means 1/sqrt(head_dim).
        has_alibi, has_sinks, has_bias, has_attn_mask, has_score_mod, has_mask_mod, has_block_mask: an optional operand is given.
        varlen: packed sequences; batch counts them and the lengths are the longest ones.
        return_lse: the caller wants lse.
        requires_grad: autograd will want a backward.
        op: what is to be computed of the call; `backward` makes the problem of its gradients.
        device: of the tensors, e.g. `cpu` or `cuda:0`.
        copies: names of the tensors whose last stride is not 1, which are copied.
    """

    dtype: DType
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    causal_alignment: CausalAlignment = "bottom-right"
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    has_alibi: bool = False
    has_sinks: bool = False
    has_bias: bool = False
    has_attn_mask: bool = False
    has_score_mod: bool = False
    has_mask_mod: bool = False
    has_block_mask: bool = False
    dropout_p: float = 0.0
    varlen: bool = False
    return_lse: bool = False
    requires_grad: bool = False
    op: Op = "attention_fwd"
    layout: Layout = "bshd"
    device: str = "cpu"
    copies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))
        _require(self.layout in LAYOUTS, "layout", self.layout, ", ".join(LAYOUTS))
        _require(self.causal_alignment in ALIGNMENTS, "causal_alignment", self.causal_alignment, ", ".join(ALIGNMENTS))
        for name in ("batch", "seqlen_q", "seqlen_k"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("num_heads_q", "num_heads_kv", "head_dim", "head_dim_v"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        if self.num_heads_q % self.num_heads_kv:
            raise InvalidProblemError(
                f"{self.num_heads_q} query heads cannot share {self.num_heads_kv} key/value heads: the number of heads of q "
                "must be a multiple of that of k and v (grouped-query attention)."
            )
        scale = self.softmax_scale
        _require(
            scale is None or math.isfinite(scale),
            "softmax_scale",
            scale,
            "a finite number, or None for 1/sqrt(head_dim)",
        )
        _require(
            math.isfinite(self.softcap) and self.softcap >= 0, "softcap", self.softcap, "0 (off) or a positive number"
        )
        window_ok = len(self.window_size) == 2 and all(isinstance(w, int) and w >= -1 for w in self.window_size)
        _require(window_ok, "window_size", self.window_size, "(left, right), each -1 (no limit) or 0 and more keys")
        _require(0.0 <= self.dropout_p < 1.0, "dropout_p", self.dropout_p, "from 0 up to, not including, 1")

    # -- what it means --

    @property
    def spec(self) -> AttentionSpec:
        """What has to be compiled for `op`."""
        return self.spec_for(self.op)

    @property
    def backward(self) -> Problem:
        """The gradients of this call, as a problem of their own: tuned, stored and resolved apart."""
        return replace(self, op="attention_bwd", return_lse=False, requires_grad=False)

    def spec_for(self, op: Op) -> AttentionSpec:
        """What has to be compiled for another operation of this call."""
        return AttentionSpec(
            op=op,
            dtype=self.dtype,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            causal=self.causal,
            window=self.window_size != (-1, -1),
            softcap=self.softcap != 0.0,
            has_alibi=self.has_alibi,
            has_sinks=self.has_sinks,
            has_bias=self.has_bias,
            has_attn_mask=self.has_attn_mask,
            has_score_mod=self.has_score_mod,
            has_mask_mod=self.has_mask_mod,
            has_block_mask=self.has_block_mask,
            dropout=self.dropout_p > 0.0,
            varlen=self.varlen,
            has_lse=op == "attention_fwd" and (self.return_lse or self.requires_grad),
        )

    @property
    def scale(self) -> float:
        """The softmax scale in use."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def causal_offset(self) -> int:
        """D in `causal keeps keys j <= i + d`: seqlen_k - seqlen_q for bottom-right, 0 for top-left."""
        return self.seqlen_k - self.seqlen_q if self.causal_alignment == "bottom-right" else 0

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs of one head are not masked by causality."""
        if not self.causal:
            return self.seqlen_q * self.seqlen_k
        # Row i sees min(max(i + d + 1, 0), seqlen_k) keys: none, then an arithmetic series, then all of them.
        offset = self.causal_offset
        first = min(max(-offset, 0), self.seqlen_q)
        full = min(max(self.seqlen_k - offset - 1, first), self.seqlen_q)
        ramp = full - first
        return ramp * (first + offset + 1) + ramp * (ramp - 1) // 2 + (self.seqlen_q - full) * self.seqlen_k

    @property
    def flops(self) -> int:
        """Floating-point operations of the products over visible pairs (2 per multiply-add).

        Two products forward. Five backward (scores again, dP, dV, dK, dQ), the convention of the field whatever a kernel repeats.
        """
        d, dv = self.head_dim, self.head_dim_v
        width = 3 * d + 2 * dv if self.op == "attention_bwd" else d + dv
        return 2 * self.batch * self.num_heads_q * self.visible_pairs * width

    @property
    def io_bytes(self) -> int:
        """Bytes of q, k, v and the output, and backward of their gradients, each moved once: the least HBM traffic."""
        rows_q = self.batch * self.seqlen_q * self.num_heads_q
        rows_k = self.batch * self.seqlen_k * self.num_heads_kv
        copies = 2 if self.op == "attention_bwd" else 1
        return copies * self.spec.itemsize * (rows_q + rows_k) * (self.head_dim + self.head_dim_v)

    @property
    def shape(self) -> dict[str, int]:
        """The sizes that a stored result is looked up by."""
        return {
            "batch": self.batch,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "num_heads_q": self.num_heads_q,
            "num_heads_kv": self.num_heads_kv,
        }

    @property
    def tune_arguments(self) -> str:
        """The options of `flashgen tune` that name this problem; mods, block masks and packing are code and data, not named."""
        words = [f"--op {self.op} --dtype {self.dtype} --head-dim {self.head_dim}"]
        if self.head_dim_v != self.head_dim:
            words.append(f"--head-dim-v {self.head_dim_v}")
        words.append(f"--heads-q {self.num_heads_q} --heads-kv {self.num_heads_kv}")
        words.append(f"--seqlen-q {self.seqlen_q} --seqlen-k {self.seqlen_k} --batch {self.batch}")
        if self.causal:
            words.append("--causal")
            if self.causal_alignment != "bottom-right":
                words.append(f"--causal-alignment {self.causal_alignment}")
        if self.window_size != (-1, -1):
            words.append(f"--window-size {self.window_size[0]},{self.window_size[1]}")
        if self.softcap:
            words.append(f"--softcap {self.softcap!r}")
        if self.softmax_scale is not None:
            words.append(f"--softmax-scale {self.softmax_scale!r}")
        if self.dropout_p:
            words.append(f"--dropout-p {self.dropout_p!r}")
        operands = {
            "--alibi": self.has_alibi,
            "--sinks": self.has_sinks,
            "--bias": self.has_bias,
            "--attn-mask": self.has_attn_mask,
            "--return-lse": self.spec.has_lse,
        }
        words += [option for option, given in operands.items() if given]
        return " ".join(words)

    def __str__(self) -> str:
        heads = f"heads {self.num_heads_q}" + ("" if self.num_heads_q == self.num_heads_kv else f"/{self.num_heads_kv}")
        return f"{self.spec.key} batch {self.batch} seqlen {self.seqlen_q}x{self.seqlen_k} {heads}"

    # -- how it is made --

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        seqlen: int | None = None,
        batch: int | None = None,
        layer: str | None = None,
        **overrides: Any,
    ) -> Problem:
        """The attention of a named model.

        Args:
            name: e.g. `llama3-8b`, or with a kind of its layers `gemma2-9b/local`; see `flashgen show presets`.
            seqlen: the model's sequence length; None for the preset's own. Lengths that do not follow it (77 text tokens)
                stay, and levels of a lower resolution shrink with it.
            batch: None for the preset's own.
            layer: the kind of layers, where the name says none; None for the main kind.
            **overrides: any field of `Problem`.

        Raises:
            InvalidProblemError: unknown preset or kind of layers, or a value out of range.
        """
        model, kinds = find_preset(name, layer)
        row = kinds[0]
        seqlen_q, seqlen_k = row.lengths(model.seqlen if seqlen is None else seqlen)
        problem = cls(
            dtype=model.dtype,
            batch=model.batch if batch is None else batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads_q=row.num_heads_q,
            num_heads_kv=row.num_heads_kv,
            head_dim=row.head_dim,
            head_dim_v=row.head_dim if row.head_dim_v is None else row.head_dim_v,
            causal=row.causal,
            softmax_scale=row.softmax_scale,
            window_size=row.window_size,
            softcap=row.softcap,
            has_sinks=row.has_sinks,
        )
        return replace(problem, **overrides)

    @classmethod
    def from_packed(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        seqused_k: Tensor | None = None,
        **options: Any,
    ) -> Problem:
        """Check a call of `varlen_attention()`; its arguments are these.

        Raises:
            InvalidProblemError: the message names the argument, its value and what is allowed.
        """
        for name, tensor in {"q": q, "k": k, "v": v}.items():
            if getattr(tensor, "dim", lambda: 0)() != 3:
                raise InvalidProblemError(f"{name} must be a packed tensor of 3 dimensions, (total, heads, head_dim).")
        batch = _check_offsets("cu_seqlens_q", cu_seqlens_q, q, None)
        if _check_offsets("cu_seqlens_k", cu_seqlens_k, k, None) != batch:
            raise InvalidProblemError(
                "cu_seqlens_q and cu_seqlens_k bound different numbers of sequences: they must be equally long."
            )
        if seqused_k is not None:
            _check_offsets("seqused_k", seqused_k, k, batch)
        for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            _require(
                isinstance(longest, int) and longest >= 0, name, longest, "the length of the longest sequence, an int"
            )
        if q.device.type == "cpu":
            _check_lengths("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
            _check_lengths("k", cast("Tensor", cu_seqlens_k), k.shape[0], max_seqlen_k)
        one = cls.from_tensors(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), **options)
        return replace(one, varlen=True, batch=batch, seqlen_q=max_seqlen_q, seqlen_k=max_seqlen_k)

    @classmethod
    def from_tensors(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        causal_alignment: CausalAlignment = "bottom-right",
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        attn_mask: Tensor | None = None,
        score_mod: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        block_mask: Any = None,
        dropout_p: float = 0.0,
        return_lse: bool = False,
        requires_grad: bool | None = None,
        layout: Layout = "bshd",
    ) -> Problem:
        """Check a call's arguments; they are those of `attention()`.

        Args:
            requires_grad: whether a backward will follow; None reads it off q, k and v and torch's grad mode.

        Raises:
            InvalidProblemError: the message names the argument, its value and what is allowed.
        """
        _require(layout in LAYOUTS, "layout", layout, ", ".join(LAYOUTS))
        tensors = {"q": q, "k": k, "v": v}
        for name, tensor in tensors.items():
            _check_tensor(name, tensor, q, layout)
        seq, heads = (1, 2) if layout == "bshd" else (2, 1)
        for name in ("k", "v"):
            _require_equal(f"batch of {name}", tensors[name].shape[0], "q's", q.shape[0])
        _require_equal("sequence length of v", v.shape[seq], "k's", k.shape[seq])
        _require_equal("number of heads of v", v.shape[heads], "k's", k.shape[heads])
        _require_equal("head_dim of k", k.shape[3], "q's", q.shape[3])
        if attn_mask is not None and str(attn_mask.dtype) != "torch.bool":
            raise InvalidProblemError(
                f"attn_mask has dtype {attn_mask.dtype}: it must be torch.bool (True = may attend). "
                "An additive float mask goes into `bias`."
            )
        return cls(
            dtype=_dtype_name("q", q),
            batch=q.shape[0],
            seqlen_q=q.shape[seq],
            seqlen_k=k.shape[seq],
            num_heads_q=q.shape[heads],
            num_heads_kv=k.shape[heads],
            head_dim=q.shape[3],
            head_dim_v=v.shape[3],
            causal=bool(causal),
            causal_alignment=causal_alignment,
            softmax_scale=_number("softmax_scale", softmax_scale),
            window_size=_window(window_size),
            softcap=_number("softcap", softcap) or 0.0,
            has_alibi=alibi_slopes is not None,
            has_sinks=sinks is not None,
            has_bias=bias is not None,
            has_attn_mask=attn_mask is not None,
            has_score_mod=score_mod is not None,
            has_mask_mod=mask_mod is not None,
            has_block_mask=block_mask is not None,
            dropout_p=_number("dropout_p", dropout_p) or 0.0,
            return_lse=bool(return_lse),
            requires_grad=_needs_grad(q, k, v) if requires_grad is None else requires_grad,
            layout=layout,
            device=str(q.device),
            copies=tuple(name for name, tensor in tensors.items() if tensor.stride(-1) != 1 and tensor.shape[-1] != 1),
        )


def _require(ok: bool, name: str, given: object, allowed: str) -> None:
    if not ok:
        raise InvalidProblemError(f"{name}={given!r} is not allowed: {name} must be {allowed}.")


def _require_equal(what: str, given: int, whose: str, wanted: int) -> None:
    if given != wanted:
        raise InvalidProblemError(f"{what} is {given}, but {whose} is {wanted}: they must be equal.")


def _check_tensor(name: str, tensor: Any, q: Any, layout: Layout) -> None:
    if not hasattr(tensor, "dim") or not hasattr(tensor, "stride"):
        raise InvalidProblemError(f"{name} is a {type(tensor).__name__}: it must be a torch.Tensor.")
    if tensor.dim() != 4:
        raise InvalidProblemError(
            f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}: it must have 4, "
            f"({'batch, seqlen, heads, head_dim' if layout == 'bshd' else 'batch, heads, seqlen, head_dim'}) in layout {layout!r}."
        )
    _dtype_name(name, tensor)
    if tensor.dtype != q.dtype:
        raise InvalidProblemError(
            f"{name} has dtype {tensor.dtype}, q has {q.dtype}: q, k and v must have one dtype. Cast one."
        )
    if tensor.device != q.device:
        raise InvalidProblemError(
            f"{name} is on {tensor.device}, q on {q.device}: q, k and v must be on one device. Move one."
        )


def _check_offsets(name: str, value: Any, like: Tensor, length: int | None) -> int:
    """A 1-d int32 tensor beside `like`; returns the number of sequences."""
    if getattr(value, "dim", lambda: 0)() != 1 or str(value.dtype) != "torch.int32" or value.device != like.device:
        given = (
            f"{tuple(value.shape)} {value.dtype} on {value.device}"
            if hasattr(value, "dtype")
            else f"a {type(value).__name__}"
        )
        raise InvalidProblemError(f"{name} is {given}: it must be a 1-dimensional int32 tensor on {like.device}.")
    if length is not None:
        _require(value.numel() == length, f"length of {name}", value.numel(), f"the number of sequences, {length}")
        return length
    _require(value.numel() >= 1, f"length of {name}", value.numel(), "the number of sequences plus one")
    return int(value.numel()) - 1


def _check_lengths(which: str, offsets: Tensor, total: int, longest: int) -> None:
    """On a CPU the values are looked at too; on a GPU that would synchronise."""
    ends = offsets.tolist()
    lengths = [stop - start for start, stop in pairwise(ends)]
    if ends[0] != 0 or ends[-1] > total or min(lengths, default=0) < 0:
        raise InvalidProblemError(
            f"cu_seqlens_{which}={ends} must start at 0, never fall, and end at most at {total}, {which}'s rows."
        )
    if max(lengths, default=0) > longest:
        raise InvalidProblemError(f"max_seqlen_{which}={longest} is less than the longest sequence, {max(lengths)}.")


def _dtype_name(name: str, tensor: Tensor) -> DType:
    names = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}
    found = names.get(str(tensor.dtype))
    if found is None:
        raise InvalidProblemError(f"{name} has dtype {tensor.dtype}: allowed are {', '.join(names)}. Cast it.")
    return cast(DType, found)


def _needs_grad(*tensors: Tensor) -> bool:
    import torch  # here: rendering and tuning a named problem work without it

    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidProblemError(f"{name}={value!r} is a {type(value).__name__}: it must be a number.") from None


def _window(value: Any) -> tuple[int, int]:
    try:
        left, right = value
    except (TypeError, ValueError):
        raise InvalidProblemError(
            f"window_size={value!r} must be a pair (left, right), each -1 (no limit) or a number of keys from 0 up."
        ) from None
    return (left, right)


def not_built(name: str) -> UnsupportedProblemError:
    """The error of a public name or option that exists in the contract and is not built yet."""
    return UnsupportedProblemError(f"{name} is not supported by this version of flashgen: nothing covers it yet.")
