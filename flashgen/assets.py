"""Where the data folders are: inside an installed wheel, or one level up in a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flashgen.errors import FlashgenError

_PACKAGE = Path(__file__).resolve().parent


@cache
def _find(name: str, marker: str) -> Path:
    places = (_PACKAGE / name, _PACKAGE.parent / name)
    for place in places:
        if (place / marker).exists():
            return place
    raise FlashgenError(
        f"flashgen's data folder {name!r} was not found: looked at {places[0]} and {places[1]}. "
        "Reinstall flashgen, or run from a complete checkout."
    )


def templates_dir() -> Path:
    """The folder of Jinja2 templates.

    Raises:
        FlashgenError: neither the wheel's nor the checkout's folder exists.
    """
    return _find("templates", "triton")


def seeds_dir() -> Path:
    """The folder of shipped tuning records, `<gpu>/<op>.jsonl`.

    Raises:
        FlashgenError: neither the wheel's nor the checkout's folder exists.
    """
    return _find("tuning_db", "README.md") / "seeds"


def portfolios_dir() -> Path:
    """The folder of shipped portfolios, `<arch>/<op>.jsonl`.

    Raises:
        FlashgenError: neither the wheel's nor the checkout's folder exists.
    """
    return _find("tuning_db", "README.md") / "portfolios"
