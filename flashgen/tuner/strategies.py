"""Which configuration to try next: exchangeable strategies over an enumerated legal list.

A strategy is a pure function of what was tried: it never sees an illegal point, never proposes one twice, and "everything tried" is
a real end. That makes a run resumable from its study, and lets recorded surfaces judge every strategy
(`benchmarks/search_quality.py`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from flashgen.config import KernelConfig
from flashgen.errors import InvalidProblemError
from flashgen.tuner.experience import CAP, Lesson, expected_slowdowns, portfolio
from flashgen.tuner.surrogate import Array, Surrogate, expected_improvement, features

NAMES = ("auto", "random", "exhaustive", "tpe", "gp", "walk")
SEEDS = 4  # configurations that `auto` takes from other problems before it models
COLD_START = 6  # space-filling trials before the first model where nothing is known
_WALK_EVERY = 3  # every third step of `auto` stays in the incumbent's neighbourhood


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One finished trial.

    Attributes:
        config: what was tried.
        value: its time in milliseconds, or None where it failed.
    """

    config: KernelConfig
    value: float | None


class Strategy:
    """A way of choosing."""

    def propose(self, tried: Sequence[Tried], avoid: Collection[KernelConfig] = ()) -> KernelConfig | None:
        """The next configuration that is not among `avoid`, or None when every one was tried."""
        raise NotImplementedError

    def defer(self, config: KernelConfig) -> bool:
        """Put a configuration off until the others are tried; False where the strategy does not, or did already."""
        return False

    def finalists(self, tried: Sequence[Tried], count: int) -> list[KernelConfig]:
        """The configurations to re-time, most promising first: the least readings."""
        timed = sorted((trial for trial in tried if trial.value is not None), key=lambda trial: trial.value or 0.0)
        return list(dict.fromkeys(trial.config for trial in timed))[:count]


def make(
    name: str,
    candidates: Sequence[KernelConfig],
    *,
    seeds: Sequence[KernelConfig] = (),
    lessons: Sequence[Lesson] = (),
    vetoed: frozenset[KernelConfig] = frozenset(),
    seed: int = 0,
) -> Strategy:
    """A strategy by its name.

    Args:
        name: one of `NAMES`.
        candidates: the legal list.
        seeds: `auto` tries these first, in order; those that are not legal are left out.
        lessons: other problems' measurements: `auto` takes more seeds and its expectation from them.
        vetoed: what the cost model advises against, as far as it is known yet (`Strategy.defer` adds to it); tried last, by
            every strategy but `exhaustive`.
        seed: of what is random.

    Raises:
        InvalidProblemError: the name is not known.
    """
    if name not in NAMES:
        raise InvalidProblemError(f"strategy={name!r} is not known: allowed are {', '.join(NAMES)}.")
    legal = list(dict.fromkeys(candidates))
    if name == "exhaustive":
        return InOrder(legal)
    first: Strategy
    if name == "random":
        first = InOrder(_shuffled(legal, seed))
    elif name == "tpe":
        first = Tpe(legal, seed)
    elif name == "walk":
        first = Walk(legal, seed)
    elif name == "gp":
        first = Model(legal, seed=seed, walk=False)
    else:
        taught = portfolio([config for config in legal if config not in vetoed], lessons, SEEDS)
        first = Model(legal, seeds=[*seeds, *taught], lessons=lessons, seed=seed, walk=True)
    return VetoedLast(first, InOrder(_shuffled(legal, seed)), vetoed)


def ordered(
    candidates: Sequence[KernelConfig], seeds: Sequence[KernelConfig], name: str, *, seed: int = 0
) -> list[KernelConfig]:
    """The whole list in the order in which a strategy that learns nothing would try it: seeds first, unless it is "random"."""
    if name == "exhaustive":
        return list(dict.fromkeys(candidates))
    legal = dict.fromkeys(candidates)
    first = [] if name == "random" else [config for config in dict.fromkeys(seeds) if config in legal]
    return list(dict.fromkeys([*first, *_shuffled(list(legal), seed)]))


def _shuffled(configs: Sequence[KernelConfig], seed: int) -> list[KernelConfig]:
    order = list(configs)
    random.Random(seed).shuffle(order)
    return order


class InOrder(Strategy):
    """A fixed order."""

    def __init__(self, order: Sequence[KernelConfig]) -> None:
        self._order = list(dict.fromkeys(order))

    def propose(self, tried: Sequence[Tried], avoid: Collection[KernelConfig] = ()) -> KernelConfig | None:
        """The first that was not tried."""
        done = {trial.config for trial in tried}.union(avoid)
        return next((config for config in self._order if config not in done), None)


class VetoedLast(Strategy):
    """A strategy that is held to what nobody advises against; when that is all tried, the rest follows.

    Args:
        first: chooses among what is not vetoed.
        rest: the order of what is.
        vetoed: what is put off from the start.
    """

    def __init__(self, first: Strategy, rest: Strategy, vetoed: Collection[KernelConfig]) -> None:
        self._first, self._rest, self._vetoed = first, rest, set(vetoed)

    def propose(self, tried: Sequence[Tried], avoid: Collection[KernelConfig] = ()) -> KernelConfig | None:
        """The strategy's choice, else the next of the vetoed."""
        return self._first.propose(tried, self._vetoed.union(avoid)) or self._rest.propose(tried, avoid)

    def defer(self, config: KernelConfig) -> bool:
        """Veto a configuration from now on."""
        known = config in self._vetoed
        self._vetoed.add(config)
        return not known

    def finalists(self, tried: Sequence[Tried], count: int) -> list[KernelConfig]:
        """The strategy's own."""
        return self._first.finalists(tried, count)


class Walk(Strategy):
    """Greedy: the whole one-knob neighbourhood of the incumbent, in random order, until nothing improves; then from elsewhere."""

    def __init__(self, candidates: Sequence[KernelConfig], seed: int) -> None:
        self._candidates, self._seed = list(candidates), seed

    def propose(self, tried: Sequence[Tried], avoid: Collection[KernelConfig] = ()) -> KernelConfig | None:
        """An untried neighbour of the best so far, else any untried configuration."""
        done = {trial.config for trial in tried}.union(avoid)
        left = [config for config in _shuffled(self._candidates, self._seed) if config not in done]
        timed = [trial for trial in tried if trial.value is not None]
        if not left or not timed:
            return left[0] if left else None
        best = min(timed, key=lambda trial: trial.value or 0.0).config
        return next((config for config in left if distance(best, config) == 1), left[0])


class Tpe(Strategy):
    """Optuna's TPE sampler, held to the legal list: what it proposes beside it, or again, is told as bad and costs nothing."""

    _ASKS = 50

    def __init__(self, candidates: Sequence[KernelConfig], seed: int) -> None:
        self._candidates, self._seed = list(candidates), seed

    def propose(self, tried: Sequence[Tried], avoid: Collection[KernelConfig] = ()) -> KernelConfig | None:
        """TPE's choice given the trials, or a random untried one when it finds none."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        done = {trial.config for trial in tried}.union(avoid)
        left = [config for config in self._candidates if config not in done]
        if not left:
            return None
        space = {
            name: optuna.distributions.CategoricalDistribution(sorted({config[name] for config in self._candidates}))
            for name in self._candidates[0]
        }
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self._seed + len(tried)))
        worst = max((trial.value for trial in tried if trial.value is not None), default=1.0)
        for trial in tried:
            value = 4.0 * worst if trial.value is None else trial.value
            study.add_trial(
                optuna.trial.create_trial(params=trial.config.to_dict(), distributions=space, value=value)  # type: ignore[arg-type]
            )
        by_params = {tuple(config.items()): config for config in left}
        for _ in range(self._ASKS):
            asked = study.ask(space)  # type: ignore[arg-type]
            found = by_params.get(tuple(sorted(asked.params.items())))
            if found is not None:
                return found
            study.tell(asked, 4.0 * worst)
        return random.Random(self._seed + len(tried)).choice(left)


class Model(Strategy):
    """Seeds, then expected improvement under a Gaussian process, every third step within one knob of the incumbent.

    The process models log time against what other problems let expect; a failure counts as e times slower than the best.
    """

    def __init__(
        self,
        candidates: Sequence[KernelConfig],
        *,
        seeds: Sequence[KernelConfig] = (),
        lessons: Sequence[Lesson] = (),
        seed: int,
        walk: bool,
    ) -> None:
        self._candidates, self._walk = list(candidates), walk
        self._index = {config: i for i, config in enumerate(self._candidates)}
        self._points = features(self._candidates)
        self._surrogate = Surrogate(self._points)
        self._expected = expected_slowdowns(self._candidates, lessons)
        first = [config for config in dict.fromkeys(seeds) if config in self._index]
        self._first = InOrder(first or self._spread(seed))

    def propose(self, tried: Sequence[Tried], avoid: Collection[KernelConfig] = ()) -> KernelConfig | None:
        """The next seed, else the model's choice."""
        seen = [trial for trial in tried if trial.config in self._index]
        barred = {
            self._index[config] for config in (*(trial.config for trial in seen), *avoid) if config in self._index
        }
        if len(barred) == len(self._candidates):
            return None
        timed = [trial for trial in seen if trial.value is not None]
        following = self._first.propose(tried, avoid)
        if following is not None or not timed:
            return following or InOrder(self._candidates).propose(tried, avoid)
        return self._candidates[self._choose(seen, sorted(barred))]

    def finalists(self, tried: Sequence[Tried], count: int) -> list[KernelConfig]:
        """The least expected times: a reading that is low by luck is pulled back to what its neighbours say."""
        seen = [trial for trial in tried if trial.config in self._index]
        ran = dict.fromkeys(trial.config for trial in seen if trial.value is not None)
        if len(ran) < 2:
            return list(ran)
        _, mean, _ = self._predict(seen)
        return sorted(ran, key=lambda config: mean[self._index[config]])[:count]

    def _choose(self, seen: Sequence[Tried], barred: Sequence[int]) -> int:
        index, mean, std = self._predict(seen)
        gain = expected_improvement(mean, std, float(mean[index].min()))
        gain[barred] = -1.0
        if self._walk and len(seen) % _WALK_EVERY == _WALK_EVERY - 1:
            incumbent = self._candidates[index[int(mean[index].argmin())]]
            near = [i for i, c in enumerate(self._candidates) if gain[i] >= 0.0 and distance(incumbent, c) == 1]
            if near:
                return max(near, key=lambda i: gain[i])
        return int(gain.argmax())

    def _predict(self, seen: Sequence[Tried]) -> tuple[list[int], Array, Array]:
        """Where the trials stand in the list; mean and deviation of the log time everywhere."""
        index = [self._index[trial.config] for trial in seen]
        best = math.log(min(trial.value for trial in seen if trial.value is not None))
        values = np.array([CAP if trial.value is None else min(CAP, math.log(trial.value) - best) for trial in seen])
        left_over = values - self._expected[index]
        shift, scale = float(left_over.mean()), max(float(left_over.std()), 0.02)
        mean, std = self._surrogate.predict(index, (left_over - shift) / scale)
        return index, mean * scale + shift + self._expected, std * scale

    def _spread(self, seed: int) -> list[KernelConfig]:
        """A few configurations far from one another: where nothing is known, that teaches most."""
        generator = np.random.default_rng(seed)
        chosen = [int(generator.integers(len(self._candidates)))] if self._candidates else []
        while len(chosen) < min(COLD_START, len(self._candidates)):
            apart = ((self._points[:, None, :] - self._points[chosen][None]) ** 2).sum(-1).min(1)
            apart = apart + 1e-6 * generator.random(len(apart))
            apart[chosen] = -1.0
            chosen.append(int(apart.argmax()))
        return [self._candidates[i] for i in chosen]


def distance(a: KernelConfig, b: KernelConfig) -> int:
    """In how many tunables two configurations differ."""
    return sum(a[name] != b[name] for name in a)
