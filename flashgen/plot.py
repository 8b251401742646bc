"""The one door to matplotlib: figures without a display, in one style, written as PNG, SVG or PDF.

matplotlib is an extra (`pip install flashgen[plot]`) and is imported inside the functions. No pyplot: its global state,
backends and windows are of no use to a command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgen.errors import InvalidProblemError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

# Okabe and Ito's palette, told apart with every kind of colour blindness: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check(path: Path) -> None:
    """Refuse a plot that could not be written, before any work.

    Raises:
        InvalidProblemError: the suffix is none of SUFFIXES, or the folder does not exist.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidProblemError(
            f"--plot {path}: the suffix {path.suffix!r} is not known: it must be one of {', '.join(SUFFIXES)}."
        )
    if not path.parent.is_dir():
        raise InvalidProblemError(f"--plot {path}: the folder {path.parent} does not exist: make it, or name another.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib is not installed: pip install flashgen[plot]") from None


def figure(
    columns: int = 1, *, rows: int = 1, title: str = "", size: tuple[float, float] = (6.4, 4.4)
) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side.

    Args:
        columns: how many axes in a row.
        rows: how many rows.
        title: above them all.
        size: width and height of one of them, in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib is not installed: pip install flashgen[plot]") from None
    made = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes: list[Any] = list(made.subplots(rows, columns, squeeze=False).flat)
    if title:
        made.suptitle(title)
    for one in axes:
        one.grid(True, alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
        one.set_prop_cycle(color=COLOURS)
    return made, axes


def save(made: Figure, path: Path) -> None:
    """Write a figure; the suffix is the format.

    Raises:
        InvalidProblemError: as `check`, or the file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    check(path)
    try:
        made.savefig(path, dpi=144)
    except OSError as error:
        raise InvalidProblemError(f"--plot {path} cannot be written: {error.strerror}.") from error
