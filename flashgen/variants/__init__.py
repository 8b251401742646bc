"""One descriptor per recipe; `REGISTRY` is the only list of them."""

from __future__ import annotations

from flashgen.errors import InvalidProblemError
from flashgen.spec import AttentionSpec
from flashgen.variants.base import Knob, KnownGood, MeasuredTile, ResourceFacts, Variant
from flashgen.variants.gluon_bwd_sm90 import GluonBackwardSm90
from flashgen.variants.gluon_fwd_sm90 import GluonForwardSm90
from flashgen.variants.torch_blocked import TorchBlocked, TorchBlockedBackward
from flashgen.variants.triton_bwd import TritonBackward
from flashgen.variants.triton_fwd import TritonForward

__all__ = ["REGISTRY", "Knob", "KnownGood", "MeasuredTile", "ResourceFacts", "Variant", "by_name", "candidates"]

# Fastest first within an operation: dispatch takes the first that supports the problem.
REGISTRY: tuple[Variant, ...] = (
    GluonForwardSm90(),
    TritonForward(),
    TorchBlocked(),
    GluonBackwardSm90(),
    TritonBackward(),
    TorchBlockedBackward(),
)


def by_name(name: str) -> Variant:
    """A variant by its name.

    Raises:
        InvalidProblemError: no such variant.
    """
    for variant in REGISTRY:
        if variant.name == name:
            return variant
    raise InvalidProblemError(f"variant {name!r} is not known: allowed are {', '.join(v.name for v in REGISTRY)}.")


def candidates(spec: AttentionSpec) -> tuple[Variant, ...]:
    """The variants that compute the spec's operation, fastest first; whether they support it is theirs to say."""
    return tuple(variant for variant in REGISTRY if variant.op == spec.op)
