"""The tuner: Optuna over the enumerated legal list; measured on a GPU, predicted without one."""

from __future__ import annotations

from flashgen.tuner.context import Event
from flashgen.tuner.result import ProblemResult, TuneResult
from flashgen.tuner.run import choose_mode, tune
from flashgen.tuner.strategies import NAMES as STRATEGIES

__all__ = ["STRATEGIES", "Event", "ProblemResult", "TuneResult", "choose_mode", "tune"]
