"""`Problem`: one call of attention as a checked value: shapes and options, no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashgen import checks
from flashgen.checks import ALIGNMENTS, LAYOUTS, CausalAlignment, Layout
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.presets import find as find_preset
from flashgen.spec import DTYPES, AttentionSpec, DType, Mods, Op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALIGNMENTS", "LAYOUTS", "CausalAlignment", "Layout", "Problem", "not_built"]


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
        deterministic: the gradients must repeat bit for bit; every forward does, whatever is asked for.
        device: of the tensors, e.g. `cpu` or `cuda:0`.
        copies: names of the tensors whose last stride is not 1, which are copied.
        unaligned: names of the other tensors that TMA cannot address: see `checks.tma_addressable`.
        mods: score_mod and mask_mod as kernels have them, where a kernel may run the call.
        untraced: why they have no such form, in a user's words.
        bias_grad: whether the bias wants a gradient.
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
    deterministic: bool = False
    layout: Layout = "bshd"
    device: str = "cpu"
    copies: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    mods: Mods | None = None
    untraced: str = ""
    bias_grad: bool = False

    def __post_init__(self) -> None:
        require = checks.require
        checks.one_of("dtype", self.dtype, DTYPES)
        checks.one_of("layout", self.layout, LAYOUTS)
        checks.one_of("causal_alignment", self.causal_alignment, ALIGNMENTS)
        for name in ("batch", "seqlen_q", "seqlen_k"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("num_heads_q", "num_heads_kv", "head_dim", "head_dim_v"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        if self.num_heads_q % self.num_heads_kv:
            raise InvalidProblemError(
                f"{self.num_heads_q} query heads cannot share {self.num_heads_kv} key/value heads: the number of heads of q "
                "must be a multiple of that of k and v (grouped-query attention)."
            )
        if self.softmax_scale is not None:
            checks.number("softmax_scale", self.softmax_scale)
        require(checks.number("softcap", self.softcap) >= 0, "softcap", self.softcap, "0 (off) or a positive number")
        checks.window(self.window_size)
        p = checks.number("dropout_p", self.dropout_p)
        require(0.0 <= p < 1.0, "dropout_p", self.dropout_p, "from 0 up to, not including, 1")

    # -- what it means --

    @property
    def spec(self) -> AttentionSpec:
        """What has to be compiled for `op`."""
        return self.spec_for(self.op)

    @property
    def backward(self) -> Problem:
        """The gradients of this call, as a problem of their own: tuned, stored and resolved apart."""
        return replace(self, op="attention_bwd", return_lse=False, requires_grad=False)

    def modified(
        self, *, score_mod: Callable[..., Any] | None = None, mask_mod: Callable[..., Any] | None = None
    ) -> Problem:
        """The problem with these functions, traced, and with what they capture as samples: to be tuned, checked or exported.

        Args:
            score_mod, mask_mod: as in `attention()`; captured tensors may lie on any one device, and are copied.

        Raises:
            UnsupportedProblemError: kernels do not have one of their operations.
            InvalidProblemError: a function gives something else than it must.
        """
        if score_mod is None and mask_mod is None:
            return replace(self, has_score_mod=False, has_mask_mod=False, mods=None)
        from flashgen import mods  # imports torch

        given = mods.fingerprint((score_mod, mask_mod)).tensors
        device = next((x.device for x in given if x.dim()), None)
        program, tensors = mods.program(score_mod, {} if mask_mod is None else {"mask_mod": mask_mod}, device)
        samples = tuple(x.detach().cpu().clone() for x in tensors)
        return replace(
            self,
            has_score_mod=score_mod is not None,
            has_mask_mod=mask_mod is not None,
            mods=Mods(digest=program.digest, program=program, samples=samples),
        )

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
            mods=self.mods,
        )

    @property
    def scale(self) -> float:
        """The softmax scale in use: 0 where it is too small for a normal number of fp32, which kernels take it in."""
        scale: float = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        return scale if abs(scale) >= 2.0**-126 else 0.0

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

        The values of cu_seqlens and seqused_k are looked at on a CPU only; on a GPU that would synchronise.

        Raises:
            InvalidProblemError: the message names the argument, its value and what is allowed.
        """
        checks.qkv(q, k, v, "bshd", dims=3)
        batch = checks.packing(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
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
        deterministic: bool = False,
        layout: Layout = "bshd",
    ) -> Problem:
        """Check a call's arguments; they are those of `attention()`. Of optional operands only their presence counts here.

        Args:
            requires_grad: whether a backward will follow; None reads it off q, k, v, bias and sinks and torch's grad mode.
            deterministic: whether it must repeat bit for bit.

        Raises:
            InvalidProblemError: the message names the argument, its value and what is allowed.
        """
        dtype = checks.qkv(q, k, v, layout)
        tensors = {"q": q, "k": k, "v": v}
        seq, heads = (1, 2) if layout == "bshd" else (2, 1)
        for name in ("k", "v"):
            checks.require_equal(f"batch of {name}", tensors[name].shape[0], "q's", q.shape[0])
        checks.require_equal("sequence length of v", v.shape[seq], "k's", k.shape[seq])
        checks.require_equal("number of heads of v", v.shape[heads], "k's", k.shape[heads])
        checks.require_equal("head_dim of k", k.shape[3], "q's", q.shape[3])
        if attn_mask is not None and hasattr(attn_mask, "dtype"):
            checks.operand("attn_mask", attn_mask)
        return cls(
            dtype=dtype,
            batch=q.shape[0],
            seqlen_q=q.shape[seq],
            seqlen_k=k.shape[seq],
            num_heads_q=q.shape[heads],
            num_heads_kv=k.shape[heads],
            head_dim=q.shape[3],
            head_dim_v=v.shape[3],
            causal=checks.flag("causal", causal),
            causal_alignment=causal_alignment,
            softmax_scale=None if softmax_scale is None else checks.number("softmax_scale", softmax_scale),
            window_size=checks.window(window_size),
            softcap=checks.number("softcap", softcap),
            has_alibi=alibi_slopes is not None,
            has_sinks=sinks is not None,
            has_bias=bias is not None,
            bias_grad=checks.wants_gradient(bias),
            has_attn_mask=attn_mask is not None,
            has_score_mod=score_mod is not None,
            has_mask_mod=mask_mod is not None,
            has_block_mask=block_mask is not None,
            dropout_p=checks.number("dropout_p", dropout_p),
            return_lse=checks.flag("return_lse", return_lse),
            requires_grad=checks.wants_gradient(q, k, v, bias, sinks) if requires_grad is None else requires_grad,
            deterministic=checks.flag("deterministic", deterministic),
            layout=layout,
            device=str(q.device),
            copies=tuple(name for name, tensor in tensors.items() if checks.is_copied(tensor)),
            unaligned=tuple(
                name
                for name, tensor in tensors.items()
                if not checks.is_copied(tensor) and not checks.tma_addressable(tensor)
            ),
        )


def not_built(name: str) -> UnsupportedProblemError:
    """The error of a public name or option that is reserved and not built yet."""
    return UnsupportedProblemError(f"{name} is not supported by this version of flashgen: nothing covers it yet.")
