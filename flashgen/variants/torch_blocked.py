"""The fallback: blocked attention in plain torch operations, O(N) memory, on every device, with its own backward."""

from __future__ import annotations

from typing import ClassVar

from flashgen.config import KernelConfig
from flashgen.spec import AttentionSpec, Op
from flashgen.target import Target
from flashgen.variants.base import ResourceFacts, Variant

_MISSING_FLAGS = frozenset({"paged"})


class TorchBlocked(Variant):
    """`flashgen/torch_blocked.py`; no tunables, no template."""

    name = "torch_blocked"
    op: ClassVar[Op] = "attention_fwd"
    backend = "torch"

    def supports(self, spec: AttentionSpec, target: Target) -> str | None:
        missing = [flag for flag in spec.flags if flag in _MISSING_FLAGS]
        if missing:
            return f"{', '.join(missing)}: not covered by the torch backend yet"
        return None

    def illegal(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None = None
    ) -> str | None:
        return None

    def default(self, spec: AttentionSpec, target: Target) -> KernelConfig:
        return self.config()


class TorchBlockedBackward(TorchBlocked):
    """The backward of the same loops; it also differentiates what a generated kernel ran forward."""

    name = "torch_blocked_bwd"
    op = "attention_bwd"
