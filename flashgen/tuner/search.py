"""The order in which legal configurations are tried: an Optuna sampler over an enumerated list.

The list holds legal points only and nothing is proposed twice, so "everything tried" is a real end (TPE and its kin
propose illegal and repeated points; measured in `tuning` studies, they hardly beat random on spaces this small).
Each knob stays an Optuna parameter of its own, so that its dashboard and `enqueue_trial` work.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flashgen.config import KernelConfig
from flashgen.errors import InvalidProblemError, UnsupportedProblemError

if TYPE_CHECKING:
    import optuna

STRATEGIES = ("auto", "random", "exhaustive", "tpe", "gp", "walk")
BUILT = ("auto", "random", "exhaustive")


def check_strategy(strategy: str) -> None:
    """Refuse unknown and unbuilt strategies.

    Raises:
        InvalidProblemError: unknown.
        UnsupportedProblemError: not built yet.
    """
    if strategy not in STRATEGIES:
        raise InvalidProblemError(f"strategy={strategy!r} is not known: allowed are {', '.join(STRATEGIES)}.")
    if strategy not in BUILT:
        raise UnsupportedProblemError(
            f"strategy {strategy!r} is not supported by this version of flashgen: use one of {', '.join(BUILT)}."
        )


def ordered(
    legal: Sequence[KernelConfig], seeds: Sequence[KernelConfig], strategy: str, *, seed: int = 0
) -> list[KernelConfig]:
    """The legal configurations in the order a strategy tries them.

    Args:
        legal: the enumerated list.
        seeds: configurations to try first (known-good tiles, winners of near shapes); those that are not legal are left out.
        strategy: "exhaustive" keeps the list's order, "random" shuffles it, "auto" puts the seeds first.
        seed: of the shuffle.
    """
    allowed = dict.fromkeys(legal)
    if strategy == "exhaustive":
        return list(allowed)
    rest = list(allowed)
    random.Random(seed).shuffle(rest)
    if strategy == "random":
        return rest
    return list(dict.fromkeys([*(config for config in seeds if config in allowed), *rest]))


def list_sampler(order: Sequence[KernelConfig]) -> optuna.samplers.BaseSampler:
    """An Optuna sampler that proposes the given configurations, each once, in order.

    When nothing is left it stops the study; a trial beyond that repeats the last configuration.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    class ListSampler(optuna.samplers.BaseSampler):
        """See `list_sampler`."""

        def __init__(self) -> None:
            self._space = {
                name: tuple(sorted({config[name] for config in order})) for name in (order[0] if order else ())
            }

        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, BaseDistribution]:
            return {name: CategoricalDistribution(values) for name, values in self._space.items()}

        def sample_relative(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            tried = {_key(t.params) for t in study.get_trials(deepcopy=False) if t.number != trial.number and t.params}
            # A trial that waits in the queue brings its own parameters; Optuna asks for the others only.
            fixed = trial.system_attrs.get("fixed_params", {})
            if fixed:
                return dict(fixed)
            return next((config.to_dict() for config in order if _key(config) not in tried), order[-1].to_dict())

        def sample_independent(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            param_name: str,
            param_distribution: BaseDistribution,
        ) -> Any:
            return order[0][param_name]

    return ListSampler()


def proposals(study: optuna.Study, order: Sequence[KernelConfig]) -> Iterator[tuple[optuna.Trial, KernelConfig]]:
    """Ask the study until every configuration of the list was proposed once."""
    variant = order[0].variant if order else ""
    names = sorted(order[0]) if order else []
    choices = {name: sorted({config[name] for config in order}) for name in names}
    seen: set[tuple[tuple[str, Any], ...]] = set()
    # As many trials as configurations, and no more than that many again for enqueued repeats.
    for _ in range(2 * len(order)):
        if len(seen) == len(order):
            return
        trial = study.ask()
        params: dict[str, Any] = {name: trial.suggest_categorical(name, choices[name]) for name in names}
        if _key(params) in seen:
            study.tell(trial, state=_pruned())
            continue
        seen.add(_key(params))
        yield trial, KernelConfig(variant=variant, **params)


def _key(params: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def _pruned() -> Any:
    import optuna

    return optuna.trial.TrialState.PRUNED


def new_study(order: Sequence[KernelConfig], name: str, storage: str | None = None) -> optuna.Study:
    """A study over the list, in memory or in a storage of its own (never the tuning database: Optuna's tables are its own).

    Args:
        order: what to propose, in order.
        name: of the study.
        storage: an Optuna storage URL or a path of an SQLite file, or None for memory.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage if storage is None or "://" in storage else f"sqlite:///{storage}"
    return optuna.create_study(
        sampler=list_sampler(order), study_name=name, storage=url, load_if_exists=True, direction="minimize"
    )
