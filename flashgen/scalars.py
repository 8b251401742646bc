"""`Scalars`: the options of a call that are no tensors, checked and flat, as the operators' schema wants them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from flashgen import checks
from flashgen.config import KernelConfig, Tunable
from flashgen.dispatch import ConfigLike
from flashgen.errors import InvalidProblemError
from flashgen.settings import BACKENDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalars:
    """The options of a call that are no tensors, flat, since operators take no mappings; see `attention()`.

    `training` says that a backward will follow, `deterministic` that it must repeat bit for bit. The lengths are those of packed sequences, else -1.
    """

    causal: bool = False
    causal_alignment: str = "bottom-right"
    softmax_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    max_seqlen_q: int = -1
    max_seqlen_k: int = -1
    layout: str = "bshd"
    return_lse: bool = False
    training: bool = False
    deterministic: bool = False
    backend: str = "auto"
    config: str = ""

    @classmethod
    def of(
        cls,
        *,
        causal: Any,
        causal_alignment: Any,
        softmax_scale: Any,
        window_size: Any,
        softcap: Any,
        dropout_p: Any,
        return_lse: Any,
        backend: Any,
        config: ConfigLike | None,
        deterministic: Any = None,
        max_seqlen_q: Any = -1,
        max_seqlen_k: Any = -1,
        layout: Any = "bshd",
    ) -> Scalars:
        """The options of a call, each refused here by name where the operator's schema could not take it.

        Raises:
            InvalidProblemError: one is of the wrong type, or no number that fp32 can hold, or an unknown word.
        """
        left, right = checks.window(window_size)
        checks.one_of("causal_alignment", causal_alignment, checks.ALIGNMENTS)
        checks.one_of("backend", backend, BACKENDS)
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        return cls(
            causal=checks.flag("causal", causal),
            causal_alignment=causal_alignment,
            softmax_scale=None if softmax_scale is None else _number("softmax_scale", softmax_scale),
            window_left=left,
            window_right=right,
            softcap=_number("softcap", softcap),
            dropout_p=_number("dropout_p", dropout_p),
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            layout=layout,
            return_lse=checks.flag("return_lse", return_lse),
            deterministic=checks.flag("deterministic", deterministic),
            backend=backend,
            config=encode_config(config),
        )

    def flat(self) -> tuple[Any, ...]:
        """The values in the schema's order."""
        return tuple(getattr(self, field.name) for field in fields(self))


def _number(name: str, value: Any) -> Any:
    """A number as the operator's schema wants it; symbolic ones of a compiler pass through."""
    return value if isinstance(value, (torch.SymFloat, torch.SymInt)) else checks.number(name, value)


def encode_config(config: ConfigLike | None) -> str:
    """A config as one string."""
    if config is None:
        return ""
    if not isinstance(config, Mapping):
        raise InvalidProblemError(
            f"config={config!r} is a {type(config).__name__}: it must be a KernelConfig or a dict of its tunables."
        )
    variant = config.variant if isinstance(config, KernelConfig) else ""
    for name, value in config.items():
        if not isinstance(name, str) or not isinstance(value, (int, str)):
            raise InvalidProblemError(
                f"config: {name!r}={value!r} is a {type(value).__name__}; names are texts, allowed values int, str and bool."
            )
    return ";".join([variant, *[f"{name}={value!r}" for name, value in config.items()]])


def decode_config(text: str) -> KernelConfig | dict[str, Tunable] | None:
    """The config that `encode_config` wrote."""
    if not text:
        return None
    variant, *items = text.split(";")
    tunables: dict[str, Tunable] = {}
    for item in items:
        name, _, value = item.partition("=")
        tunables[name] = (
            value == "True" if value in ("True", "False") else value.strip("'") if "'" in value else int(value)
        )
    return KernelConfig(variant=variant, **tunables) if variant else tunables
