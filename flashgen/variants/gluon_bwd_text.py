"""What the options of a call add to the text of the Hopper backward: arguments, and mods as statements on tiles of keys x rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashgen.errors import RenderError
from flashgen.spec import AttentionSpec
from flashgen.variants.features import Signature, captured, signature
from flashgen.variants.gluon_bwd_mask import MaskParts, mask_parts

_OF_ROWS = ("mask_ranges", "ranges_", "key_")  # tables for who owns rows and walks over keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """One contribution to a captured tensor's gradient, as text of a tile of keys x rows.

    Attributes:
        number: of its gradient among those that are summed.
        value: of each pair.
        is_grad: whether that is the gradient of the score alone, which is 0 where nothing is seen.
        pointers: where it goes.
        part: `part`, the value of each pair, summed over what the element does not depend on.
        inside: whether it goes anywhere where all rows and keys exist.
        existing: whether it does where some may not; None where the element depends on neither.
    """

    number: int
    value: str
    is_grad: bool
    pointers: str
    part: str
    inside: str
    existing: str | None


class BackwardText:
    """A mixin: what `templates/gluon/attention_bwd_sm90.py.jinja` asks of a spec's options."""

    def signature(self, spec: AttentionSpec) -> Signature:
        """The arguments that a spec's options add to `launch` and to the kernel; `inner` is what of them the consumers take."""
        found = signature(replace(spec, has_sinks=False))

        def kept(names: Mapping[str, str]) -> dict[str, str]:
            return {
                name: value for name, value in names.items() if not name.removeprefix("stride_").startswith(_OF_ROWS)
            }

        pointers, strides = kept(found.pointers), kept(found.strides)
        walked = ("row_ranges", "row_blocks", "row_counts", "cu_seqlens", "seqused", "bottom_right")
        names = (*pointers, *found.scalars, *strides)
        inner = tuple(name for name in names if not name.removeprefix("stride_").startswith(walked))
        launch = tuple(name for name in signature(spec).launch if not name.startswith(_OF_ROWS))
        return replace(found, launch=launch, pointers=pointers, strides=strides, inner=inner)

    def is_free(self, spec: AttentionSpec) -> bool:
        """Whether blocks of rows need a mask on both ends of those that do not, or positions must stay the call's own."""
        of_positions = spec.has_alibi or spec.has_bias or spec.has_attn_mask or spec.dropout
        of_mods = spec.has_mask_mod or spec.has_score_mod or spec.has_block_mask
        return spec.varlen or spec.window or of_mods or (spec.causal and of_positions)

    def claims_rows(self, spec: AttentionSpec) -> bool:
        """Whether in any order, too, the first to come to a block of rows stores instead of adding to zeros.

        It pays where thread blocks do not come all at once, or where their steps are long: on one H200 full kernels of head dim 128 and
        wide ones lost up to 10 % by it.
        """
        widest = max(spec.head_dim, spec.head_dim_v)
        return not self.is_free(spec) and (widest <= 64 or (spec.causal and widest <= 128))

    def row_arguments(self, spec: AttentionSpec) -> tuple[str, ...]:
        """What decides which blocks of rows a block of keys meets, by the kernel's names."""
        if spec.has_block_mask:
            return ()
        diagonal = ("causal_offset", "first_key", "end_key") if spec.has_diagonal else ()
        window = ("window_left", "window_right") if spec.window else ()
        length = ("seqlen_k",) if spec.has_mask_mod or not spec.has_diagonal else ()
        ranges = ("row_ranges_ptr",) if spec.has_mask_mod else ()
        return ("seqlen_q", *length, *diagonal, *window, *ranges)

    def inner(self, spec: AttentionSpec) -> tuple[tuple[str, str, bool], ...]:
        """What a step takes because of options: its name there, what the loop passes, and whether that changes from step to step."""
        found: dict[str, tuple[str, bool]] = {}
        place = spec.has_alibi or spec.has_bias or spec.has_attn_mask or spec.mods is not None
        if spec.modifies_scores:
            found["sm_scale"] = ("sm_scale", False)
        if place:
            found["offs_n"] = ("offs_n", False)
        mask = self.mask_parts(spec)
        if spec.window or (mask is not None and mask.end):
            found["end_m"] = ("end_m", False)
        found |= {name: (name, False) for name, _ in (() if mask is None else mask.kept)}
        if spec.softcap:
            found["softcap"] = ("softcap", False)
        if spec.has_bias or spec.has_attn_mask or spec.has_score_mod or spec.has_block_mask:
            found["seqlen_q"] = ("seqlen_q", False)
        if spec.has_alibi:
            slope = "gl.load(alibi_slopes_ptr + off_b * stride_alibi_b + off_h * stride_alibi_h).to(gl.float32)"
            found |= {
                "start_n": ("start_n", False),
                "slope": (slope, True),
                "alibi_shift": ("seqlen_k - seqlen_q", False),
            }
        for name in ("bias", "attn_mask"):
            if getattr(spec, f"has_{name}"):
                head = f"{name}_ptr + off_b.to(gl.int64) * stride_{name}_b + off_h.to(gl.int64) * stride_{name}_h"
                found |= {"seqlen_k": ("seqlen_k", False), f"{name}_ptr": (head, True)}
                found |= {f"stride_{name}_{x}": (f"stride_{name}_{x}", False) for x in "mn"}
        if spec.has_block_mask:
            strides = "off_b.to(gl.int64) * stride_block_kinds_b + off_h.to(gl.int64) * stride_block_kinds_h"
            found |= {name: (name, False) for name in ("start_n", "seqlen_k", "block_size_q", "block_size_k")}
            found["block_kinds_ptr"] = (f"block_kinds_ptr + {strides}", True)
            found["stride_block_kinds_m"] = ("stride_block_kinds_m", False)
        if spec.dropout:
            found |= {"philox_ptr": ("philox_ptr", False), "start_n": ("start_n", False)}
            found["off_bh"] = ("(off_b * num_heads_kv + off_hkv) * group + member", True)
            found |= {name: (name, False) for name in ("dropout_threshold", "dropout_scale")}
        if spec.has_bias:
            head = "off_b.to(gl.int64) * stride_dbias_b + off_h.to(gl.int64) * stride_dbias_h"
            found |= {"start_n": ("start_n", False), "dbias_ptr": (f"dbias_ptr + {head}", True)}
            found |= {f"stride_dbias_{x}": (f"stride_dbias_{x}", False) for x in "mn"}
        if self.sums(spec):
            found |= {name: (name, False) for name in ("start_n", "seqlen_k", *self.sums(spec))}
        if self.summed(spec):
            found |= {name: (name, False) for name in ("largest_ptr", "term_bits")}
        if spec.mods is not None:
            found |= {"b": ("off_b", False), "h": ("off_h", True)}
            found |= {name: (name, False) for name in spec.mods.program.parameters}
        return tuple((name, *rest) for name, rest in found.items())

    def takes(self, spec: AttentionSpec, name: str) -> bool:
        """Whether a step takes an argument, or what is passed to it is made of it."""
        return any(name in (own, *passed.replace("-", " ").split()) for own, passed, _ in self.inner(spec))

    def takes_head(self, spec: AttentionSpec) -> bool:
        """Whether a step must know its query head."""
        return any("off_h" in passed for _, passed, _ in self.inner(spec))

    def needs_rows(self, spec: AttentionSpec) -> bool:
        """Whether rows and heads matter where nothing is masked, too."""
        return spec.has_alibi or spec.has_bias or spec.has_attn_mask or spec.has_score_mod or spec.dropout

    def reads_rows(self, spec: AttentionSpec) -> bool:
        """Whether a step reads tensors for its mask."""
        parts = self.mask_parts(spec)
        return parts is not None and any(".load(" in line for line in (*parts.early, *parts.late))

    def keeps_values(self, spec: AttentionSpec) -> bool:
        """Whether a step holds more than scores and their gradient for each pair."""
        return spec.has_bias or spec.has_attn_mask or spec.has_score_mod or spec.dropout

    def mod(self, spec: AttentionSpec, kind: str, score: str) -> Any:
        """The text of a spec's `score` or `mask` in a step, a `mods.Emission`; scores are keys x rows and called `score`."""
        program, names, dialect = self._program(spec, score)
        emit = {"score": program.emit_score, "mask": program.emit_mask, "block": program.emit_block}[kind]
        return emit(dialect=dialect, names=names, like=score if kind == "score" else None)

    def mask_parts(self, spec: AttentionSpec) -> MaskParts | None:
        """The mask of a step in parts that PTX compares, None where scores or operands make it a tile of conditions anyway."""
        if spec.has_score_mod or spec.has_block_mask or spec.has_attn_mask or not (spec.window or spec.has_mask_mod):
            return None
        return mask_parts(spec)

    def derivative(self, spec: AttentionSpec, score: str, grad: str) -> Any:
        """The text of score_mod's derivative times `grad`, a `mods.DerivativeEmission`."""
        program, names, dialect = self._program(spec, score)
        names = replace(names, grad=grad)
        return program.emit_derivative(dialect=dialect, names=names, like=score, of_captures=bool(self.sums(spec)))

    def sums(self, spec: AttentionSpec) -> dict[str, str]:
        """Parameters for the gradients of tensors that score_mod captures -> what `launch` calls them."""
        if spec.mods is None or not spec.has_score_mod:
            return {}
        program = spec.mods.program
        names = [
            program.captures[number].name for number in sorted({x.capture for x in program.derivative.contributions})
        ]
        return {f"sum_of_{name}_ptr": f"d{captured(name)}" for name in names}

    def sums_by_row(self, spec: AttentionSpec) -> bool:
        """Whether what score_mod captured gets gradients that depend on the query: of each pair, or of each row."""
        if not self.sums(spec) or spec.mods is None:
            return False
        return any("q_idx" not in one.summed_over for one in spec.mods.program.derivative.contributions)

    def sums_by_key(self, spec: AttentionSpec) -> bool:
        """Whether some of those depend on the key and not on the query."""
        if not self.sums(spec) or spec.mods is None:
            return False
        every = (one.summed_over for one in spec.mods.program.derivative.contributions)
        return any("q_idx" in over and "kv_idx" not in over for over in every)

    def summed(self, spec: AttentionSpec) -> tuple[str, ...]:
        """What `launch` calls the gradients that are sums over tiles: the bias's, and those of captured tensors."""
        return (*(["dbias"] if spec.has_bias else []), *self.sums(spec).values())

    def sum_arguments(self, spec: AttentionSpec) -> tuple[str, ...]:
        """What the kernel and its consumers take for those sums."""
        bias = ("dbias_ptr", *(f"stride_dbias_{x}" for x in "bhmn")) if spec.has_bias else ()
        return (*bias, *self.sums(spec), *(("largest_ptr", "term_bits") if self.summed(spec) else ()))

    def most_terms(self, spec: AttentionSpec) -> int:
        """Contributions of one pair to one gradient, at most."""
        return (
            max(1, len(spec.mods.program.derivative.contributions)) if spec.mods is not None and self.sums(spec) else 1
        )

    def added(self, spec: AttentionSpec, derivative: Any) -> tuple[Added, ...]:
        """What a step adds to those gradients."""
        names = [spec.mods.program.captures[one.capture].name for one in derivative.gradients]  # type: ignore[union-attr]
        numbers = [self.summed(spec).index(f"d{captured(name)}") for name in names]
        return tuple(
            _added(number, one, name) for number, one, name in zip(numbers, derivative.gradients, names, strict=True)
        )

    def mod_helpers(self, spec: AttentionSpec) -> tuple[str, ...]:
        """The jit functions that a spec's mods call, each once."""
        emitted = [self.mod(spec, "mask", "s")] if spec.has_mask_mod else []
        emitted += [self.mod(spec, "block", "s")] if spec.has_block_mask else []
        emitted += [self.mod(spec, "score", "s"), self.derivative(spec, "s", "p")] if spec.has_score_mod else []
        return tuple(dict.fromkeys(helper for one in emitted for helper in one.helpers))

    @staticmethod
    def _program(spec: AttentionSpec, score: str) -> tuple[Any, Any, Any]:
        from flashgen import mods  # imports torch: only where a mod was given, which needed it already

        if spec.mods is None:
            raise RenderError(f"{spec.key} has mods that were not traced: nothing can be rendered for them.")
        names = mods.Names(score=score, b="b", h="h", q_idx="q_idx", kv_idx="kv_idx")
        return spec.mods.program, names, mods.GLUON


def _added(number: int, one: Any, name: str) -> Added:
    """A contribution to a captured tensor's gradient, summed over what its element does not depend on."""
    rows, keys = "q_idx" in one.depends, "kv_idx" in one.depends
    # A sum is spread over the tile again, and one row or column of it adds: of a tensor of N x 1 Triton 3.6 adds what each register
    # of a thread holds, the replicas of the one column among them (seen on an H200: 16 times too much).
    part, first = {
        (True, True): ("part", ""),
        (True, False): (
            "gl.sum(part, 0)[None, :] + 0.0 * part",
            "(gl.arange(0, BLOCK_N, offs_n.type.layout) == 0)[:, None]",
        ),
        (False, True): ("gl.sum(part, 1)[:, None] + 0.0 * part", "(gl.arange(0, BLOCK_M, COLUMN) == 0)[None, :]"),
        (False, False): ("gl.sum(gl.sum(part, 1), 0)", ""),
    }[rows, keys]
    # The last place is added to the pointer as it is, in 32 bits where it has 32: an instruction less of each pair.
    leading = ""
    for dim, place in enumerate(one.places[:-1]):
        wide = place if place.isdigit() else f"{place}.to(gl.int64)"
        leading = f"({leading} + {wide}) * {name}_size{dim + 1}" if leading else f"{wide} * {name}_size{dim + 1}"
    pointers = f"(sum_of_{name}_ptr + {leading})" if leading else f"sum_of_{name}_ptr"
    pointers = " + ".join((pointers, *one.places[-1:]))
    pointers = f"{pointers} + offs_n[:, None] * 0 + rows_m[None, :] * 0" if first else pointers
    inside = one.inside if one.inside != "True" else ""
    edges = ["(rows_m < seqlen_q)[None, :]"] if rows else []
    edges += ["(offs_n < seqlen_k)[:, None]"] if keys else []
    firsts = [first] if first else []
    return Added(
        number=number, value=f"({one.value}).to(gl.float32)", is_grad=one.value == "ds", pointers=pointers, part=part,
        inside=_all(inside, firsts), existing=_all(inside, [*firsts, *edges]) if edges else None,
    )  # fmt: skip


def _all(inside: str, others: list[str]) -> str:
    """That all conditions hold, "None" where there are none."""
    if not others:
        return inside or "None"
    return " & ".join(([f"({inside})"] if inside else []) + others)
