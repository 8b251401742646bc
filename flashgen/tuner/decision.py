"""The last step of a measured search: the finalists side by side, and what is stored of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashgen.bench import summarise
from flashgen.config import KernelConfig
from flashgen.facts import CompiledFacts
from flashgen.store import Record
from flashgen.tuner import shootout
from flashgen.tuner.context import Context

if TYPE_CHECKING:
    from flashgen.tuner.measured import Bench

_FINAL_BUDGET_S = 60.0  # of launches; slow kernels get fewer rounds


def decide(context: Context, bench: Bench, finalists: Sequence[KernelConfig]) -> None:
    """Time the best few side by side, the incumbent among them, and store who won and by how much.

    A finalist that turns out wrong, or faults, is stored as such, and the others begin again. Where the final rounds
    fail for reasons that nobody can name, the search's times decide, which are of low quality.
    """
    timed = {_config(context, row): row for row in reversed(context.timed())}
    if not timed:
        _tell_causes(context)
        return
    incumbent = next((config for config in context.favourites if config in timed), None)
    order = list(dict.fromkeys([*([] if incumbent is None else [incumbent]), *(c for c in finalists if c in timed)]))
    failures: dict[KernelConfig, str] = {}
    while order:
        context.tell(0, 1, "", "re-timing the best")
        launches_s = sum(timed[config].latency_ms or 0.0 for config in [order[0], *order]) / 1e3
        most = int(min(shootout.MOST_ROUNDS, max(shootout.LEAST_ROUNDS, _FINAL_BUDGET_S / max(launches_s, 1e-9))))
        request = {**request_of(context), "do": "final", "configs": [c.to_dict() for c in order], "most": most}
        reply = bench.ask(request, context.trial_timeout_s + 4 * most * launches_s)
        if reply["status"] == "ok":
            _keep(context, bench, order, timed, reply)
            return
        index = reply.get("index", -1)
        if index < 0:
            context.result.message = f"the final rounds failed ({reply.get('message')}); the search's times decide"
            break
        failed = order.pop(index)
        failures[failed] = f"{reply['status']} in the final rounds: {reply.get('message')}"
        context.finish([_row(context, bench, timed.pop(failed), reply["status"], message=str(reply.get("message")))])
    context.tell(1, 1, "", "re-timing the best")
    left = [row for config, row in timed.items() if config not in failures]
    context.result.winner = min(left, key=lambda row: row.latency_ms or 0.0, default=None)
    if context.result.winner is None:
        context.result.message = "; ".join(f"{config.label}: {why}" for config, why in failures.items())


def _keep(
    context: Context,
    bench: Bench,
    order: list[KernelConfig],
    timed: dict[KernelConfig, Record],
    reply: dict[str, Any],
) -> None:
    """A row per finalist; the winner is of rank 1, whatever the medians say: a tie keeps the incumbent."""
    times = [summarise(samples, reply["protocol"]) for samples in reply["samples"]]
    places = sorted(range(len(order)), key=lambda i: (i != reply["winner"], times[i].latency_ms))
    rows = {}
    for place, i in enumerate(places, start=1):
        final = {
            "incumbent": order[0].label,
            "floor": reply["floor"],
            "rounds": reply["rounds"],
            "dropped": reply["dropped"],
            "interval": reply["intervals"][i],
            "samples_ms": reply["samples"][i],
        }
        if place == 1:
            final |= {"states": reply["states"], "twin_ms": reply["twin"]}
        figures = {name: getattr(times[i], name) for name in ("latency_ms", "latency_p10_ms", "latency_p90_ms")}
        old = timed[order[i]]
        rows[place] = _row(
            context, bench, old, "ok", final=final, protocol=reply["protocol"], quality=reply["quality"], rank=place,
            max_abs_error=old.max_abs_error, error_ratio=old.error_ratio, **figures,
        )  # fmt: skip
    context.finish(rows[place] for place in sorted(rows))
    context.result.winner = rows[1]
    context.tell(1, 1, "", "re-timing the best")
    if reply["quality"] == "low":
        kept = "" if context.trusted is None else f"; the stored result of {context.trusted.created[:10]} stays in use"
        context.result.message = (
            f"the machine was too noisy to trust this: the incumbent's twin differed by {100 * reply['floor']:.1f} %, "
            f"{reply['dropped']} rounds were dropped{kept}"
        )


def _row(context: Context, bench: Bench, old: Record, status: str, **values: Any) -> Record:
    values = {"protocol": shootout.PROTOCOL, **values}
    final = values.pop("final", None)
    compiled = old.facts is not None and "arch" in old.facts  # nothing is compiled for the CPU provider
    facts = CompiledFacts.from_json(old.facts) if compiled and old.facts else None
    return context.record(_config(context, old), status, facts=facts, device=bench.hello, shootout=final, **values)


def request_of(context: Context) -> dict[str, Any]:
    """What every request to the worker says of the problem."""
    return {
        "spec": context.source.spec.key,
        "variant": context.variant.name,
        "text": context.source.text,
        "problem": {name: getattr(context.problem, name) for name in context.problem.__slots__ if name != "mods"},
        "mods": context.sent_mods,
        "key": f"{context.source.digest} {context.problem} {context.problem.window_size} {context.session}",
    }


def _config(context: Context, row: Record) -> KernelConfig:
    return KernelConfig(variant=context.variant.name, **row.config)


def _tell_causes(context: Context) -> None:
    causes = {label(row): row.message or row.status for row in context.result.trials if row.status != "ok"}
    causes = dict(list({**causes, **context.result.excluded}.items())[:10])
    context.result.message = "no candidate could be measured: " + (
        "; ".join(f"{name}: {cause}" for name, cause in causes.items()) or "the time was up before the first one ended"
    )


def label(row: Record) -> str:
    """A row's configuration in words."""
    return " ".join(f"{name}={value}" for name, value in sorted(row.config.items()))
