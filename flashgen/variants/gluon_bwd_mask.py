"""The mask of a step of the Hopper backward as text: bounds of rows for each key, comparisons in PTX, and what is left."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flashgen.errors import RenderError
from flashgen.spec import AttentionSpec

_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskParts:
    """Text for `templates/gluon/parts/attention_bwd_sm90_hide.py.jinja` and what calls it.

    Attributes:
        bounds: statements of a thread block, of `offs_n` and `off_b`.
        first, end: of each key the first row that may see it and the end of those that may; empty for none.
        kept: (name, text) of what comparisons take of each key, computed once for a thread block.
        early: statements of a step that depend on rows or keys alone: they read memory while products are multiplied.
        late: those that depend on both.
        compared: (comparison, one side, other side): operands of the select, or numbers.
        rest: a condition besides; empty for none.
        names: which of q_idx and kv_idx a step needs.
    """

    bounds: tuple[str, ...] = ()
    first: str = ""
    end: str = ""
    kept: tuple[tuple[str, str], ...] = ()
    early: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    compared: tuple[tuple[str, str, str], ...] = ()
    rest: str = ""
    names: tuple[str, ...] = ()
    windowed: bool = False

    @property
    def has_end(self) -> bool:
        """Whether rows behind a key's last one are hidden."""
        return self.windowed or bool(self.end)

    @property
    def operands(self) -> tuple[str, ...]:
        """What the select takes beside the probabilities."""
        sides = (side for _, *both in self.compared for side in both if not _is_number(side))
        return ("rows_m[None, :]", "first_m[:, None]", *(("end_m[:, None]",) if self.has_end else ()), *sides)

    @property
    def assembly(self) -> tuple[str, ...]:
        """The select in PTX: $1 is the probability, the operands follow."""
        lines, number = ["setp.le.s32 seen, $3, $2;"], 4
        if self.has_end:
            lines.append("setp.lt.and.s32 seen, $2, $4, seen;")
            number += 1
        for op, *both in self.compared:
            words = []
            for side in both:
                words.append(side if _is_number(side) else f"${number}")
                number += not _is_number(side)
            lines.append(f"setp.{op}.and.s32 seen, {', '.join(words)}, seen;")
        return (".reg .pred seen;", *lines, "selp.f32 $0, $1, 0f00000000, seen;")

    @property
    def constraints(self) -> str:
        """Of the result, the probability and the operands."""
        return ",".join(("=f", "f", *("r" for _ in self.operands)))


@lru_cache(maxsize=64)  # a template asks for them some six times
def mask_parts(spec: AttentionSpec) -> MaskParts:
    """The parts of a spec's window and mask_mod."""
    if not spec.has_mask_mod:
        return MaskParts(windowed=spec.window)
    from flashgen import mods  # imports torch: only where a mod was given, which needed it already

    if spec.mods is None:
        raise RenderError(f"{spec.key} has mods that were not traced: nothing can be rendered for them.")
    program: Any = spec.mods.program
    parts = program.conjunction
    sides = list(dict.fromkeys(side for _, *both in parts.pairs for side in both if _is_kept(side)))
    ends = [x for x in (parts.first, parts.end) if x is not None]
    once = program.emit_nodes(
        [*ends, *sides], dialect=mods.GLUON, names=mods.Names(b="off_b", kv_idx="offs_n"), prefix="bound_"
    )
    texts = list(once.results)
    first = texts.pop(0) if parts.first is not None else ""
    end = texts.pop(0) if parts.end is not None else ""
    kept = tuple((f"key_{number}", text) for number, text in enumerate(texts, start=1))
    words = {id(side): f"{name}[:, None]" for side, (name, _) in zip(sides, kept, strict=True)}
    roots = [root for root in parts.roots if id(root) not in words]
    step = program.emit_nodes(roots, dialect=mods.GLUON, names=mods.Names())
    words |= {id(root): _operand(root, text) for root, text in zip(roots, step.results, strict=True)}
    early, late = _by_place(step.statements)
    used = {word for text in (*step.statements, *step.results) for word in _WORD.findall(text)}
    return MaskParts(
        bounds=once.statements,
        first=first,
        end=end,
        kept=kept,
        early=early,
        late=late,
        compared=tuple((op, words[id(x)], words[id(y)]) for op, x, y in parts.pairs),
        rest="" if parts.rest is None else step.results[-1],
        names=tuple(name for name in ("q_idx", "kv_idx") if name in used),
        windowed=spec.window,
    )


def _is_kept(side: Any) -> bool:
    """Whether a side of a comparison is of keys alone, and no number or index."""
    return bool(side.depends == {"kv_idx"} and side.op != "input")


def _operand(side: Any, text: str) -> str:
    """A side of a comparison: a number, or an expression of rows, keys or both."""
    if side.op == "const":
        return str(int(side.value))
    return text if side.depends & {"q_idx", "kv_idx"} else f"{text} + rows_m[None, :] * 0"


def _is_number(word: str) -> bool:
    return word.lstrip("-").isdigit()


def _by_place(statements: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Statements of rows or of keys alone, and those of both."""
    kinds = {"q_idx": {"q_idx"}, "kv_idx": {"kv_idx"}}
    early: list[str] = []
    late: list[str] = []
    for line in statements:
        name, text = line.split(" = ", 1)
        kinds[name] = {kind for word in _WORD.findall(text) for kind in kinds.get(word, ())}
        (late if len(kinds[name]) == 2 else early).append(line)
    return tuple(early), tuple(late)
