"""What ideas for rendered kernels are made of."""

from __future__ import annotations

from collections.abc import Callable

from flashgen.spec import AttentionSpec

Edit = Callable[[str, AttentionSpec], str]


def once(text: str, old: str, new: str) -> str:
    """Replace what stands exactly once.

    Raises:
        ValueError: it does not: the template has changed under the idea.
    """
    if text.count(old) != 1:
        raise ValueError(f"stands {text.count(old)} times in the rendered text: {old!r}")
    return text.replace(old, new)
