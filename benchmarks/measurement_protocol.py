"""What the tuner's way of timing costs and how finely it tells kernels apart, on the card that is there.

    python benchmarks/measurement_protocol.py --output benchmarks/results/NAME.json

Per problem: one launch between two events against the same launch in a CUDA graph over rotated inputs, and the final rounds of a
kernel against itself. Its floor is what a candidate must beat to win; the "challenger" is the same configuration, so that a win is a mistake.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from flashgen import Problem, Target
from flashgen.bench import FLUSH_BYTES, measure
from flashgen.bench.environment import Environment
from flashgen.render import render
from flashgen.tuner import providers, shootout
from flashgen.tuner.context import choose_variant
from flashgen.tuner.final import RoundLog
from flashgen.tuner.trial import Contestant, prepare

LENGTHS = (256, 512, 1024, 2048, 4096)


def judge(problem: Problem, provider: providers.Provider) -> dict[str, Any]:
    """One problem's figures; milliseconds."""
    variant = choose_variant(problem, Target.detect())
    source = render(problem.spec, variant)
    config = variant.default(problem.spec, Target.detect())
    request = {
        "spec": source.spec.key, "variant": variant.name, "text": source.text, "key": str(problem),
        "problem": {name: getattr(problem, name) for name in problem.__slots__},
    }  # fmt: skip
    case = prepare(request, provider)
    by_events, in_graph = Contestant(case, config.to_dict()), Contestant(case, config.to_dict())
    by_events.first()
    in_graph.first()
    in_graph.shorten()
    row: dict[str, Any] = {"problem": str(problem), "variant": variant.name, "config": config.to_dict()}
    for name, contestant in (("events", by_events), ("graph", in_graph)):
        timed = measure(contestant.once, once=lambda run: run())  # type: ignore[arg-type, return-value]
        row[f"{name}_ms"] = [timed.latency_p10_ms, timed.latency_ms, timed.latency_p90_ms]
        row[f"{name}_samples"] = timed.samples
    row["input_copies"] = 1 + len(case.copies)
    chosen = in_graph if row["events_ms"][1] < provider.short_ms else by_events
    log, start = RoundLog(provider.state), time.perf_counter()
    verdict = shootout.shoot_out(
        {"incumbent": chosen.once, "the same": chosen.once}, once=lambda run: run(), each_round=log  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    by_events.check()
    in_graph.check()
    row["final"] = {
        "graph": chosen is in_graph, "rounds": verdict.rounds, "dropped": log.dropped, "floor": round(verdict.floor, 5),
        "quality": verdict.quality, "winner": verdict.winner, "middle": round(verdict.intervals["the same"].middle, 5),
        "seconds": round(time.perf_counter() - start, 3), "last_state": log.states[-1] if log.states else None,
    }  # fmt: skip
    return row


def overheads(provider: providers.Provider) -> dict[str, float]:
    """Milliseconds of nothing between two events, and of the flush that stands before them."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=provider.device)
    return {
        "nothing_ms": median(provider.once(lambda: None) for _ in range(50)),
        "flush_ms": median(provider.once(lambda: flush.zero_()) for _ in range(50)),
    }


def main() -> None:
    """Judge every length and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    provider = providers.make("cuda")
    found: dict[str, Any] = {
        "environment": asdict(Environment.read(provider.device)), "device": provider.describe(), "state": provider.state(), **overheads(provider), "problems": []
    }  # fmt: skip
    for seqlen in LENGTHS:
        found["problems"].append(judge(Problem.preset("llama3-8b", seqlen=seqlen), provider))
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found["problems"][-1]), flush=True)


if __name__ == "__main__":
    main()
