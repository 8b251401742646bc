"""Named attention shapes of real models, each with the source of its numbers."""

from __future__ import annotations

from flashgen.errors import InvalidProblemError
from flashgen.presets.base import Layers, Preset
from flashgen.presets.models import MODELS

__all__ = ["PRESETS", "Layers", "Preset", "find", "preset"]

PRESETS: dict[str, Preset] = {model.name: model for model in MODELS}


def preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        InvalidProblemError: the name is not known; the message lists those that are.
    """
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise InvalidProblemError(
            f"preset {name!r} is not known: allowed are {', '.join(PRESETS)}. See `flashgen show presets`."
        ) from None


def find(name: str, kind: str | None = None) -> tuple[Preset, tuple[Layers, ...]]:
    """A preset, and the kinds of layers that the name means: `gemma2-9b` all, `gemma2-9b/local` one.

    Args:
        name: of a preset, or `name/kind`.
        kind: names the kind apart from the preset.

    Raises:
        InvalidProblemError: the preset or the kind is not known, or two kinds are named; lists what there is.
    """
    model, _, inside = name.partition("/")
    found = preset(model)
    wanted = kind if kind is not None else inside.lower() if "/" in name else None
    if kind is not None and "/" in name and kind != inside.lower():
        raise InvalidProblemError(f"preset {name!r} names a kind of layers, and layer={kind!r} another: name one.")
    if wanted is None:
        return found, found.layers
    chosen = tuple(layers for layers in found.layers if layers.kind == wanted)
    if not chosen:
        kinds = ", ".join(f"{found.name}/{layers.kind}" for layers in found.layers)
        raise InvalidProblemError(f"preset {found.name!r} has no layers of kind {wanted!r}: allowed are {kinds}.")
    return found, chosen
