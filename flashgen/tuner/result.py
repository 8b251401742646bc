"""What a tuning run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flashgen.problem import Problem
from flashgen.store import Record

Mode = Literal["auto", "measured", "predicted"]


@dataclass(slots=True, kw_only=True)
class ProblemResult:
    """What became of one problem.

    Attributes:
        problem: what was tuned.
        spec_key, variant, digest: of the kernel.
        legal: how many configurations the predicate admits before compiling.
        excluded: configuration -> why it was never tried, or did not fit.
        trials: a record per finished configuration, reused ones included.
        winner: the best record that passed the accuracy check, or None.
        message: why there is no winner, or a remark.
        cut_short: the run's time was over before all was tried that was to be.
    """

    problem: Problem
    spec_key: str
    variant: str
    digest: str
    legal: int
    excluded: dict[str, str] = field(default_factory=dict)
    trials: list[Record] = field(default_factory=list)
    winner: Record | None = None
    message: str = ""
    cut_short: bool = False

    def counts(self) -> dict[str, int]:
        """Trials by status."""
        found: dict[str, int] = {}
        for trial in self.trials:
            found[trial.status] = found.get(trial.status, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        winner = self.winner
        return {
            "problem": str(self.problem),
            "spec": self.spec_key,
            "variant": self.variant,
            "digest": self.digest,
            "shape": self.problem.shape,
            "legal": self.legal,
            "trials": len(self.trials),
            "by_status": self.counts(),
            "excluded": self.excluded,
            "winner": None if winner is None else winner_json(winner),
            "message": self.message,
        }


def winner_json(winner: Record) -> dict[str, Any]:
    """The part of a winning record that a reader wants; a forecast's figures carry `predicted` in their names."""
    shown: dict[str, Any] = {"config": winner.config, "status": winner.status, "error_ratio": winner.error_ratio}
    if winner.status == "predicted":
        shown |= {
            "predicted_rank": winner.rank,
            "bound_by": winner.bound_by,
            "predicted_ms": winner.predicted_ms,
            "model": winner.model,
        }
    else:
        shown |= {
            "latency_ms": winner.latency_ms,
            "latency_p10_ms": winner.latency_p10_ms,
            "latency_p90_ms": winner.latency_p90_ms,
            "quality": winner.quality,
            "protocol": winner.protocol,
        }
    return shown


@dataclass(slots=True, kw_only=True)
class TuneResult:
    """What a run gives back.

    Attributes:
        problems: one per problem that was begun.
        session: id of the run in the database.
        mode: "measured" or "predicted".
        target: name of the target.
        database: where the trials were stored.
        elapsed_s: seconds.
        interrupted: Ctrl-C ended the run; what was finished is stored.
        timed_out: its time was over before all was tried that was to be; what won is a winner all the same.
    """

    problems: list[ProblemResult]
    session: str
    mode: Mode
    target: str
    database: str
    elapsed_s: float = 0.0
    interrupted: bool = False
    timed_out: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "session": self.session,
            "mode": self.mode,
            "target": self.target,
            "database": self.database,
            "elapsed_s": round(self.elapsed_s, 3),
            "interrupted": self.interrupted,
            "timed_out": self.timed_out,
            "problems": [problem.to_json() for problem in self.problems],
        }
