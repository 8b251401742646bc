"""The Optuna side of a search: a sampler that proposes what a strategy chooses from the enumerated legal list.

Each knob stays an Optuna parameter of its own, so that its dashboard and `enqueue_trial` work; the list decides what is legal, and
the strategy (`strategies.py`) reads nothing but the study's trials, so a study in a file goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flashgen.config import KernelConfig
from flashgen.errors import InvalidProblemError
from flashgen.tuner.strategies import NAMES, Strategy, Tried

if TYPE_CHECKING:
    import optuna


def check_strategy(strategy: str) -> None:
    """Refuse unknown strategies.

    Raises:
        InvalidProblemError: unknown.
    """
    if strategy not in NAMES:
        raise InvalidProblemError(f"strategy={strategy!r} is not known: allowed are {', '.join(NAMES)}.")


def strategy_sampler(strategy: Strategy, candidates: Sequence[KernelConfig]) -> optuna.samplers.BaseSampler:
    """An Optuna sampler that proposes a strategy's choices; a trial beyond the last repeats the list's last configuration."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    class StrategySampler(optuna.samplers.BaseSampler):
        """See `strategy_sampler`."""

        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, BaseDistribution]:
            return {name: CategoricalDistribution(values) for name, values in _choices(candidates).items()}  # type: ignore[arg-type]

        def sample_relative(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            # A trial that waits in the queue brings its own parameters; Optuna asks for the others only.
            fixed = trial.system_attrs.get("fixed_params", {})
            if fixed:
                return dict(fixed)
            tried = history(study, candidates, before=trial.number)
            return (strategy.propose(tried) or candidates[-1]).to_dict()

        def sample_independent(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            param_name: str,
            param_distribution: BaseDistribution,
        ) -> Any:
            return candidates[0][param_name]

    return StrategySampler()


def history(study: optuna.Study, candidates: Sequence[KernelConfig], *, before: int | None = None) -> list[Tried]:
    """A study's trials as a strategy reads them; those that still run count as tried, without a value."""
    known = {_key(config): config for config in candidates}
    found = []
    for trial in study.get_trials(deepcopy=False):
        config = known.get(_key(trial.params))
        if config is not None and trial.number != before and trial.state.name != "PRUNED":
            found.append(Tried(config=config, value=trial.value if trial.state.name == "COMPLETE" else None))
    return found


def proposals(study: optuna.Study, candidates: Sequence[KernelConfig]) -> Iterator[tuple[optuna.Trial, KernelConfig]]:
    """Ask the study until every configuration of the list was proposed once; the caller tells each before the next.

    One that the caller tells as pruned was not tried: it is proposed once more.
    """
    choices = _choices(candidates)
    known = {_key(config): config for config in candidates}
    for trial in study.get_trials(deepcopy=False, states=(_state("RUNNING"),)):
        study.tell(trial.number, state=_state("PRUNED"))  # left behind by a run that was killed: to be tried again
    seen = {trial.config for trial in history(study, candidates)}
    # As many trials as configurations, and no more than that many again each for pruned ones and for enqueued repeats.
    for _ in range(3 * len(candidates)):
        if len(seen) == len(known):
            return
        asked = study.ask()
        params: dict[str, Any] = {name: asked.suggest_categorical(name, values) for name, values in choices.items()}
        config = known.get(_key(params))
        if config is None or config in seen:
            study.tell(asked, state=_state("PRUNED"))
            continue
        yield asked, config
        if study.get_trials(deepcopy=False)[asked.number].state.name != "PRUNED":
            seen.add(config)


def _choices(candidates: Sequence[KernelConfig]) -> dict[str, list[Any]]:
    return {name: sorted({config[name] for config in candidates}) for name in (candidates[0] if candidates else ())}


def _key(params: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def new_study(
    strategy: Strategy, candidates: Sequence[KernelConfig], name: str, storage: str | None = None
) -> optuna.Study:
    """A study over the list, in memory or in a storage of its own (never the tuning database: Optuna's tables are its own).

    Args:
        strategy: chooses.
        candidates: the legal list.
        name: of the study.
        storage: an Optuna storage URL or a path of an SQLite file, or None for memory.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage if storage is None or "://" in storage else f"sqlite:///{storage}"
    return optuna.create_study(
        sampler=strategy_sampler(strategy, candidates),
        study_name=name,
        storage=url,
        load_if_exists=True,
        direction="minimize",
    )
