"""`resolve`: which variant runs a problem, with which configuration, and why.

The order of configurations is fixed: explicit, measured in the user's database, measured and shipped,
predicted (the user's, then shipped), default. Nothing is tuned or predicted during a call; answers are memoised.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from flashgen import settings
from flashgen.config import KernelConfig, Tunable
from flashgen.coverage import untuned
from flashgen.errors import DatabaseError, InvalidProblemError, UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.settings import BACKENDS, Settings
from flashgen.spec import AttentionSpec
from flashgen.store import exchange, portfolios, seeds, select
from flashgen.store.portfolios import Member
from flashgen.store.records import Record
from flashgen.target import Target
from flashgen.variants import REGISTRY, Variant, by_name, candidates

ConfigSource = Literal["explicit", "database", "seed", "predicted", "default"]
ConfigLike = KernelConfig | Mapping[str, Tunable]

logger = logging.getLogger("flashgen")

# What a spec's flag is called in `attention()`.
_OPTION_OF_FLAG = {
    "window": "window_size",
    "has_alibi": "alibi_slopes",
    "has_sinks": "sinks",
    "has_bias": "bias",
    "has_attn_mask": "attn_mask",
    "has_score_mod": "score_mod",
    "has_mask_mod": "mask_mod",
    "has_block_mask": "block_mask",
    "dropout": "dropout_p",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a call will do.

    Attributes:
        backend: the backend that runs, `gluon`, `triton` or `torch`.
        variant: name of the variant.
        config: its knobs.
        config_source: where they come from.
        rejected: variants that were considered before it -> why they do not run.
        problem: the call.
        target: where it runs.
        notes: what else a user should know, e.g. copies that are made.
        backward: what computes the gradients, where the call wants them.
    """

    backend: str
    variant: str
    config: KernelConfig
    config_source: ConfigSource
    rejected: dict[str, str]
    problem: Problem
    target: Target
    notes: tuple[str, ...] = ()
    backward: Plan | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.problem}",
            f"  target   {self.target.name} ({self.target.arch})",
            f"  runs     {self.variant} (backend {self.backend})",
            f"  config   {self.config.label or 'no tunables'} (from: {self.config_source})",
        ]
        lines += [f"  rejected {name}: {reason}" for name, reason in self.rejected.items()]
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)


_memo: dict[object, Plan] = {}
_said: set[object] = set()
_listeners: list[Callable[[], None]] = []


def forget() -> None:
    """Drop memoised plans; call it after writing to the database."""
    _memo.clear()
    _said.clear()
    for listener in _listeners:
        listener()


def on_forget(listener: Callable[[], None]) -> None:
    """Have something else dropped whenever plans are: what was derived from them."""
    _listeners.append(listener)


def resolve(
    problem: Problem, target: Target | None = None, *, backend: str = "auto", config: ConfigLike | None = None
) -> Plan:
    """Decide what runs a problem.

    Args:
        problem: the call.
        target: None for the device the problem's tensors are on.
        backend: as in `attention()`; "auto" follows FLASHGEN_BACKEND.
        config: a KernelConfig or a mapping of tunables, used as given.

    Returns:
        The plan; equal arguments give the same one until `forget()` or a changed FLASHGEN_* variable.

    Raises:
        InvalidProblemError: unknown backend, or a config that is not legal.
        UnsupportedProblemError: no variant covers the problem; lists every variant's reason.
        DatabaseError: the user's database is corrupt or unreadable, or is not the one that FLASHGEN_REQUIRE_DB_DIGEST names.
        SchemaVersionError: its schema is newer or older than this flashgen.
    """
    fixed = config if config is None or isinstance(config, KernelConfig) else tuple(sorted(config.items()))
    key = (problem, target.name if target else None, backend, fixed, settings.raw())
    plan = _memo.get(key)
    if plan is None:
        plan = _resolve(problem, target or Target.detect(problem.device), backend, config, settings.read())
        _memo[key] = plan
    return plan


def _resolve(problem: Problem, target: Target, backend: str, config: ConfigLike | None, env: Settings) -> Plan:
    if backend not in BACKENDS:
        raise InvalidProblemError(f"backend={backend!r} is not known: allowed are {', '.join(BACKENDS)}.")
    if env.log is not None:
        logger.setLevel(env.log.upper())
    if backend == "auto":
        backend = env.backend
    asked = backend
    if isinstance(config, KernelConfig):
        backend = _backend_of(config, backend)
    elif config is not None and backend == "auto" and target.backend != "cpu":
        backend = _backend_with_tunables(config)
    variant, rejected = _choose(problem, target, backend)
    spec = problem.spec
    if config is not None:
        chosen, source = variant.parse_config(config, spec, target), "explicit"
    elif not variant.knobs:
        chosen, source = variant.default(spec, target), "default"
    else:
        chosen, source = _configure(variant, spec, problem, target, env)
    backward = _backward(problem, target, variant, asked, env) if problem.requires_grad else None
    plan = Plan(
        backend=variant.backend,
        variant=variant.name,
        config=chosen,
        config_source=source,  # type: ignore[arg-type]  # one of ConfigSource on every branch
        rejected=rejected,
        problem=problem,
        target=target,
        notes=_notes(problem, target, variant, backward) + _default_note(variant, spec, target, chosen, source),
        backward=backward,
    )
    _report_fallback(plan, env)
    return plan


# -- which variant --


def _backend_of(config: KernelConfig, backend: str) -> str:
    owner = by_name(config.variant).backend
    if backend not in ("auto", owner):
        raise InvalidProblemError(
            f"config is one of variant {config.variant!r}, which is backend {owner!r}, but backend={backend!r} was asked for."
        )
    return owner


def _backend_with_tunables(config: Mapping[str, Tunable]) -> str:
    """The backend of the only variant that has exactly these tunables, else "auto": `parse_config` then says what is wrong."""
    owners = {v.backend for v in REGISTRY if v.knobs and {knob.name for knob in v.knobs} == set(config)}
    return owners.pop() if len(owners) == 1 else "auto"


def _choose(problem: Problem, target: Target, backend: str) -> tuple[Variant, dict[str, str]]:
    spec = problem.spec
    rejected: dict[str, str] = {}
    for variant in candidates(spec):
        reason = _refusal(variant, problem, spec, target, backend)
        if reason is None:
            return variant, rejected
        rejected[variant.name] = reason
    if backend not in ("auto", *(variant.backend for variant in REGISTRY)):
        rejected[backend] = "this backend has no variant yet"
    options = [_OPTION_OF_FLAG.get(flag, flag) for flag in spec.flags if flag not in ("causal", "has_lse")]
    what = f"attention() with {', '.join(options)}" if options else f"{problem}"
    raise UnsupportedProblemError(f"{what} is not supported on {target.name} with backend={backend!r}:", rejected)


def _refusal(variant: Variant, problem: Problem, spec: AttentionSpec, target: Target, backend: str) -> str | None:
    if backend not in ("auto", variant.backend):
        return f"backend={backend!r} was asked for, this is {variant.backend!r}"
    reason = variant.supports(spec, target) or variant.refuses(problem)
    if reason is not None or variant.backend == "torch":
        return reason
    if backend == "auto" and target.backend == "cpu":
        return f"CPU tensors would be interpreted, slowly, for checking only: ask for backend={variant.backend!r}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def _backward(problem: Problem, target: Target, forward: Variant, backend: str, env: Settings) -> Plan:
    """The plan of a call's gradients: in the backend that was asked for; where any will do, never an interpreted one.

    An explicit `config` is the forward's; the backward takes its own, as if nothing were given.

    Raises:
        UnsupportedProblemError: the backend that was asked for has no backward for this call, or FLASHGEN_ON_MISS asks for it.
    """
    try:
        return _resolve(problem.backward, target, backend, None, replace(env, on_fallback="silent"))
    except UnsupportedProblemError as error:
        if not error.reasons:  # nothing is tuned, and FLASHGEN_ON_MISS makes that an error
            raise
        raise UnsupportedProblemError(
            f"{forward.name} runs forward, but the backward of {problem} has no variant on {target.name} with backend={backend!r}: "
            "use backend='auto' or torch.no_grad():",
            error.reasons,
        ) from error


def _notes(problem: Problem, target: Target, variant: Variant, backward: Plan | None) -> tuple[str, ...]:
    notes = [f"{name} is copied: its last stride is not 1" for name in problem.copies]
    if variant.backend != "torch" and target.backend == "cpu":
        notes.append(f"runs {_checking(variant)}: slow, for checking")
    if backward is not None:
        knobs = f" with {backward.config.label} (from: {backward.config_source})" if backward.config else ""
        notes.append(f"the backward runs {backward.variant} (backend {backward.backend}){knobs}")
        notes += [f"the backward {note}" for note in backward.notes if note.startswith("runs in")]
    return tuple(notes)


def _checking(variant: Variant) -> str:
    """Where a CPU call of a generated kernel runs."""
    return "in the simulator" if variant.backend == "gluon" else "in Triton's interpreter"


def _default_note(
    variant: Variant, spec: AttentionSpec, target: Target, config: KernelConfig, source: str
) -> tuple[str, ...]:
    if source != "default" or not variant.knobs:
        return ()
    if portfolio_first(variant, spec, target) == config:
        return (
            f"nothing is tuned for this kernel: the configuration is the first of {target.arch}'s portfolio (flashgen show portfolio)",
        )
    return ("nothing is tuned for this kernel: the configuration is the variant's own default",)


def _report_fallback(plan: Plan, env: Settings) -> None:
    """On a GPU a fall to torch is said once per spec: of the forward, or of the backward alone."""
    if plan.target.backend == "cpu" or env.on_fallback == "silent":
        return
    if (
        plan.backend == "torch"
        and env.backend != "torch"
        and not all("was asked for" in r for r in plan.rejected.values())
    ):
        reason = "; ".join(f"{name}: {text}" for name, text in plan.rejected.items())
        message = f"{plan.problem.spec.key} falls to the torch backend on {plan.target.name}: {reason}"
    elif plan.backend != "torch" and plan.backward is not None and plan.backward.backend == "torch":
        reason = "; ".join(f"{name}: {text}" for name, text in plan.backward.rejected.items())
        message = f"the backward of {plan.problem.spec.key} falls to the torch backend on {plan.target.name}: {reason}"
    else:
        return
    if env.on_fallback == "error":
        raise UnsupportedProblemError(f"{message} (FLASHGEN_ON_FALLBACK=error)", plan.rejected)
    if _first(("fallback", plan.problem.spec, plan.target.name)):
        warnings.warn(f"{message}. Silence with FLASHGEN_ON_FALLBACK=silent.", stacklevel=2)


# -- which configuration --


def _configure(
    variant: Variant, spec: AttentionSpec, problem: Problem, target: Target, env: Settings
) -> tuple[KernelConfig, str]:
    text = cache(lambda: render(spec, variant))  # a first call need not wait for it where there are no rows
    database = _database_rows(variant, spec, lambda: text().digest, target, env)
    key = spec.key
    shipped = [
        row
        for row in _seed_rows(spec, target)
        if (row.spec_key, row.variant) == (key, variant.name) and row.digest == text().digest
    ]
    order = (
        ("database", select.best_measured, database),
        ("seed", select.best_measured, shipped),
        ("predicted", select.best_predicted, database),
        ("predicted", select.best_predicted, shipped),
    )
    for source, best, rows in order:
        config = _legal(best(rows, problem.shape), variant, spec, target)
        if config is not None:
            if source == "predicted":
                _report_miss(problem, target, env, f"uses the predicted configuration {config.label}", error=False)
            return config, source
    member = portfolio_first(variant, spec, target)
    default, kind = (member, "portfolio's first") if member is not None else (variant.default(spec, target), "default")
    _report_miss(problem, target, env, f"uses the {kind} configuration {default.label}", error=True)
    return default, "default"


def portfolio_first(variant: Variant, spec: AttentionSpec, target: Target) -> KernelConfig | None:
    """The first shipped configuration for this architecture, dtype and padded head dim that is legal here, or None.

    Portfolios are of plain kernels: none where options keep values beside every score, which such a tile leaves no room for.
    """
    if variant.keeps_beside_scores(spec):
        return None
    found = portfolios.find(
        arch=target.arch, op=spec.op, variant=variant.name, dtype=spec.dtype,
        head_dim=spec.block_head_dim, head_dim_v=spec.block_head_dim_v,
    )  # fmt: skip
    return next((config for row in found if (config := _legal(row, variant, spec, target)) is not None), None)


def _legal(row: Record | Member | None, variant: Variant, spec: AttentionSpec, target: Target) -> KernelConfig | None:
    """A stored winner that today's predicate refuses is skipped, with a line in the log."""
    if row is None:
        return None
    try:
        return variant.parse_config(row.config, spec, target)
    except InvalidProblemError as error:
        logger.warning("a stored winner is ignored: %s", error)
        return None


def _database_rows(
    variant: Variant, spec: AttentionSpec, digest: Callable[[], str], target: Target, env: Settings
) -> list[Record]:
    path = env.database_path
    if path is not None and not path.exists():
        _require_digest(exchange.NO_ROWS, env)
        return []
    from flashgen.store import open_store  # imports sqlalchemy: only where there is a database

    with open_store(env.database_url) as store:
        if env.require_db_digest is not None:
            _require_digest(store.digest(), env)
        rows = store.trials(spec_key=spec.key, digest=digest(), gpu=_gpu_filter(target))
    return [row for row in rows if row.variant == variant.name]


def _require_digest(found: str, env: Settings) -> None:
    """Processes that must choose alike (the ranks of one model) each name the rows that they count on."""
    if env.require_db_digest not in (None, found):
        raise DatabaseError(
            f"the tuning database {env.database_path or 'on the server'} has digest {found}, FLASHGEN_REQUIRE_DB_DIGEST asks for "
            f"{env.require_db_digest}: give every process the same rows (`flashgen db export` and `import --origin local`), or unset it."
        )


def _seed_rows(spec: AttentionSpec, target: Target) -> list[Record]:
    name = _gpu_filter(target)
    return [row for gpu in ([name] if name else seeds.gpus()) for row in seeds.load(gpu, spec.op)]


def _gpu_filter(target: Target) -> str | None:
    """Interpreted kernels take any GPU's configuration, so that what was tuned elsewhere can be checked here."""
    return None if target.backend == "cpu" else target.name


def _report_miss(problem: Problem, target: Target, env: Settings, what: str, *, error: bool) -> None:
    where = f" --target {target.name if target.backend != 'cpu' else 'h100'}"
    command = untuned(problem.spec) or f"flashgen tune {problem.tune_arguments}{where}"
    if error and env.on_miss == "error":
        raise UnsupportedProblemError(
            f"nothing is tuned for {problem} on {target.name} and FLASHGEN_ON_MISS=error. Tune it: {command}"
        )
    if _first(("miss", problem.spec, tuple(problem.shape.items()), target.name)):
        logger.warning("%s on %s %s; to tune it: %s", problem, target.name, what, command)


def _first(key: object) -> bool:
    if key in _said:
        return False
    _said.add(key)
    return True
