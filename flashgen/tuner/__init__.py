"""The tuner: Optuna over the enumerated legal list; measured on a GPU, predicted without one.

Its names load on first use: the measuring process imports from this package, too, and needs neither a store nor a search.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashgen.tuner.context import Event
    from flashgen.tuner.result import ProblemResult, TuneResult
    from flashgen.tuner.run import choose_mode, tune
    from flashgen.tuner.strategies import NAMES as STRATEGIES

__all__ = ["STRATEGIES", "Event", "ProblemResult", "TuneResult", "choose_mode", "tune"]

_HOME = {
    "Event": "context",
    "ProblemResult": "result",
    "STRATEGIES": "strategies",
    "TuneResult": "result",
    "choose_mode": "run",
    "tune": "run",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flashgen.tuner' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"flashgen.tuner.{_HOME[name]}"), "NAMES" if name == "STRATEGIES" else name)
    globals()[name] = value
    return value
