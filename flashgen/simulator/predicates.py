"""Inline assembly that selects by comparisons: `setp` into one predicate, each ANDed with those before it, then `selp`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from flashgen.simulator.dtypes import Array

_WHOLE = re.compile(r"\{ \.reg \.pred (\w+); (.*) selp\.f32 \$0, \$1, 0f([0-9a-fA-F]{8}), \1; \}")
_COMPARED = re.compile(r"setp\.(eq|ne|lt|le|gt|ge)(\.and)?\.s32 (\w+), (\$\d+|-?\d+), (\$\d+|-?\d+)(?:, (\w+))?;")
_APPLY = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def parse(text: str) -> Callable[..., Array] | None:
    """What a text computes of its operands ($1 first); None where it is not of this form, to the last register.

    Args:
        text: with single blanks.
    """
    whole = _WHOLE.fullmatch(text)
    if whole is None:
        return None
    name, body, bits = whole.groups()
    steps = body.split("; ")
    found = [_COMPARED.fullmatch(step if step.endswith(";") else step + ";") for step in steps]
    if any(
        one is None or one[3] != name or (one[2] is not None) != (number > 0) or (one[6] or name) != name or (one[6] is not None) != (number > 0)
        for number, one in enumerate(found)
    ):  # fmt: skip
        return None
    other = np.uint32(int(bits, 16)).view(np.float32)

    def run(*operands: Any) -> Array:
        def value(word: str) -> Any:
            return operands[int(word[1:]) - 1] if word.startswith("$") else np.int32(word)

        seen: Any = np.True_
        for one in found:
            assert one is not None
            seen = seen & _APPLY[one[1]](value(one[4]), value(one[5]))
        return np.where(seen, operands[0], other)

    return run
