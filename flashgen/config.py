"""`KernelConfig`: the knobs of one variant, as an immutable value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flashgen.errors import InvalidProblemError

Tunable = int | str | bool


class KernelConfig(Mapping[str, Tunable]):
    """A variant's name and an immutable mapping of that variant's tunables.

    The tunables read as attributes (`config.BLOCK_M`) and as a mapping (`dict(config)`); two configs are equal when
    variant and tunables are. What is legal is the variant's business (`Variant.illegal`), not this class's.

    Args:
        variant: name of the variant the tunables belong to, e.g. `triton_fwd`.
        **tunables: e.g. `BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3`.

    Raises:
        InvalidProblemError: a tunable is neither int, str nor bool.
    """

    __slots__ = ("_hash", "_tunables", "_variant")
    _hash: int
    _tunables: dict[str, Tunable]
    _variant: str

    def __init__(self, *, variant: str, **tunables: Tunable) -> None:
        for name, value in tunables.items():
            if not isinstance(value, (int, str, bool)):
                raise InvalidProblemError(
                    f"config: {name}={value!r} is a {type(value).__name__}; allowed are int, str and bool."
                )
        items = dict(sorted(tunables.items()))
        object.__setattr__(self, "_variant", variant)
        object.__setattr__(self, "_tunables", items)
        object.__setattr__(self, "_hash", hash((variant, tuple(items.items()))))

    @property
    def variant(self) -> str:
        """Name of the variant these tunables belong to."""
        return self._variant

    def to_dict(self) -> dict[str, Tunable]:
        """The tunables alone, as a new dict (what `config=` also accepts)."""
        return dict(self._tunables)

    @property
    def label(self) -> str:
        """A short readable form, e.g. `BLOCK_M=128 BLOCK_N=64 num_stages=3 num_warps=8`."""
        return " ".join(f"{name}={value}" for name, value in self._tunables.items())

    def __getattr__(self, name: str) -> Any:
        try:
            return self._tunables[name]
        except KeyError:
            raise AttributeError(
                f"{self.variant} has no tunable {name!r}; it has {', '.join(self._tunables)}"
            ) from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"KernelConfig is immutable; build a new one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"KernelConfig is immutable; cannot delete {name!r}")

    def __getitem__(self, name: str) -> Tunable:
        return self._tunables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tunables)

    def __len__(self) -> int:
        return len(self._tunables)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KernelConfig):
            return NotImplemented
        return self._variant == other._variant and self._tunables == other._tunables

    def __repr__(self) -> str:
        return f"KernelConfig(variant={self.variant!r}, {', '.join(f'{k}={v!r}' for k, v in self._tunables.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self._variant, dict(self._tunables)))


def _rebuild(variant: str, tunables: dict[str, Tunable]) -> KernelConfig:
    return KernelConfig(variant=variant, **tunables)
