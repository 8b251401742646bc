"""flashgen beside its peers on one problem: load, check, take turns, check again, compare pair by pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from flashgen.bench.environment import gpu_state
from flashgen.bench.rounds import (
    PROTOCOL_SIDE_BY_SIDE,
    Clock,
    EventClock,
    Ratio,
    Verdict,
    WallClock,
    noise_floor,
    pairwise_ratio,
    run_rounds,
    verdict,
)
from flashgen.bench.timing import Measurement, summarise
from flashgen.coverage import options_of, spelled, undrawn
from flashgen.errors import UnsupportedProblemError
from flashgen.peers import options
from flashgen.peers.base import BenchOp, Call, Peer, flops_of
from flashgen.peers.inputs import Inputs
from flashgen.peers.judge import PEER_SLACK, Judge
from flashgen.peers.own import Flashgen
from flashgen.problem import Problem

TWIN = "flashgen (A/A)"
SHORT_MS = 0.05  # below it a launch's host time may exceed the kernel's

Status = Literal["ok", "loose", "wrong", "failed", "unsupported", "absent", "not run"]


@dataclass(slots=True, kw_only=True)
class Contestant:
    """What became of one contestant.

    Attributes:
        name, version, detail: who, of which release, and what runs inside.
        status: `ok`; `loose` (timed, but outside flashgen's own error budget); `wrong` (never reported with a time);
            `failed` (raised); `unsupported`; `absent` (not installed); `not run` (time was over).
        message: why, where the status is not ok.
        budget_used: part of the error budget; above 1 is outside.
        prepare_s: seconds from nothing to the first result, compilation included (of a backward also the forwards of all
            copies); no part of any time.
        samples: milliseconds, one per round.
        time: their summary.
        ratio: its times over the baseline's, pair by pair; None for the baseline itself.
        verdict: against the baseline, beyond the noise floor.
        tflops, gbps: at the median; bytes are each tensor's moved once, the least there can be.
    """

    name: str
    version: str = ""
    detail: str = ""
    status: Status = "ok"
    message: str = ""
    budget_used: float | None = None
    prepare_s: float | None = None
    samples: list[float] = field(default_factory=list)
    time: Measurement | None = None
    ratio: Ratio | None = None
    verdict: Verdict | None = None
    tflops: float | None = None
    gbps: float | None = None


@dataclass(slots=True, kw_only=True)
class Comparison:
    """One problem and operation, all contestants; the first one is the baseline.

    Attributes:
        problem, op: the work.
        contestants: in the order they were asked for, the baseline's twin last.
        protocol: how it was timed.
        cuda_graph: calls were captured, and replays timed.
        floor: the least difference that counts; from the twin.
        copies, overflows: of the inputs, and whether they exceed the cache.
        coverage: what was compared with the reference.
        warm_up_rounds, settled: of the warm-up.
        gpu_before, gpu_after: clock, power and temperature round the rounds.
        notes: what a reader of the numbers has to know.
        interrupted, expired: Ctrl-C or the deadline came before the last round.
    """

    problem: Problem
    op: BenchOp
    contestants: list[Contestant] = field(default_factory=list)
    protocol: str = PROTOCOL_SIDE_BY_SIDE
    cuda_graph: bool = False
    floor: float | None = None
    copies: int = 0
    overflows: bool = False
    coverage: str = ""
    warm_up_rounds: int = 0
    settled: bool = False
    gpu_before: dict[str, Any] = field(default_factory=dict)
    gpu_after: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    expired: bool = False

    @property
    def baseline(self) -> Contestant:
        """What the ratios refer to."""
        return self.contestants[0]

    @property
    def options(self) -> list[str]:
        """What the problem has beyond causality, as `attention()` spells it."""
        return [spelled(flag) for flag in options_of(self.problem.spec)]

    @property
    def flops(self) -> float:
        """Of one call."""
        return flops_of(self.problem, self.op)

    @property
    def moved_bytes(self) -> int:
        """Each tensor once; a backward reads q, k, v, out and dout and writes three gradients."""
        beside = options.option_bytes(self.problem) if self.options else 0
        return self.problem.io_bytes * (1 if self.op == "attention_fwd" else 2) + beside


def compare(
    problem: Problem,
    op: BenchOp,
    contestants: Sequence[Peer],
    *,
    rounds: int = 30,
    seed: int = 0,
    cuda_graph: bool = False,
    warm_up_ms: tuple[float, float] = (200.0, 2000.0),
    clock: Clock | None = None,
    inputs: Inputs | None = None,
    expired: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure one problem.

    Args:
        problem: what is computed, and on which device; options are drawn (`peers.options`), and a peer without one of them says so.
        op: forward, or backward without its forward.
        contestants: the first is the baseline, a `Flashgen`.
        rounds: samples of each.
        seed: of the inputs and the shuffles.
        cuda_graph: capture each call and time replays: host time vanishes.
        warm_up_ms: the least and the most of the warm-up.
        clock: events on a GPU, the host's clock elsewhere, where not given.
        inputs: drawn here where not given.
        expired: True ends the measurement early, keeping what there is.
        say: is told what happens.

    Returns:
        All contestants, also those that were not timed, with the reason. Ctrl-C during the rounds keeps whole rounds.

    Raises:
        UnsupportedProblemError: an option that cannot be drawn, or nothing of flashgen can be timed here.
    """
    why = undrawn(problem.spec)
    if why is not None:
        raise UnsupportedProblemError(f"bench of {problem} is not supported: {why}.")
    if problem.dropout_p and cuda_graph:
        raise UnsupportedProblemError(
            "bench with dropout and --cuda-graph is not supported: each call draws its seed anew."
        )
    problem = replace(problem, return_lse=False, requires_grad=False, layout="bshd", copies=())
    result = Comparison(problem=problem, op=op, cuda_graph=cuda_graph)
    result.contestants = [_enter(peer, problem, op) for peer in contestants]
    if result.baseline.status != "ok":
        raise UnsupportedProblemError(
            f"{result.baseline.name} cannot be timed for {op} of {problem} on {problem.device}: {result.baseline.message}"
        )
    inputs = inputs or Inputs(problem, op, seed=seed)
    result.copies, result.overflows = inputs.copies, inputs.overflows
    entrants = _Entrants(result, inputs, cuda_graph, warm_up_ms, say)
    for peer, entry in zip(contestants, result.contestants, strict=True):
        if entry.status == "ok":
            entrants.admit(peer, entry)
    if entrants.calls:
        entrants.run(
            clock or (EventClock() if problem.device.startswith("cuda") else WallClock()), rounds, seed, expired
        )
    _summarise(result, rounds, {peer.name: peer.flops(problem, op) for peer in contestants})
    return result


def _enter(peer: Peer, problem: Problem, op: BenchOp) -> Contestant:
    reason = peer.available(problem.device)
    if reason is not None:
        return Contestant(name=peer.name, status="absent", message=reason)
    entry = Contestant(name=peer.name, version=peer.version())
    lacking = [spelled(flag) for flag in options_of(problem.spec) if flag not in peer.takes]
    reason = f"has no {', '.join(lacking)}" if lacking else peer.supports(problem, op)
    if reason is not None:
        entry.status, entry.message = "unsupported", reason
    else:
        entry.detail = peer.detail(problem, op)
    return entry


class _Entrants:
    """The contestants that run: their calls, and the judges of the first and the last copy of the inputs."""

    def __init__(
        self,
        result: Comparison,
        inputs: Inputs,
        cuda_graph: bool,
        warm_up_ms: tuple[float, float],
        say: Callable[[str], None],
    ) -> None:
        self.result, self.inputs, self.cuda_graph, self.say = result, inputs, cuda_graph, say
        self.warm_up_ms = warm_up_ms
        self.calls: dict[str, list[Call]] = {}
        self.peers: dict[str, Peer] = {}
        self._judges: dict[tuple[Hashable, int], Judge] = {}
        result.coverage = options.judge_of(result.problem, result.op, inputs.of("bshd")[0]).coverage

    def admit(self, peer: Peer, entry: Contestant) -> None:
        """Prepare a contestant and judge its first result."""
        self.say(f"{entry.name}: prepare and check")
        start = time.perf_counter()
        try:
            calls = self._prepare(peer)
            outcome = calls[0]()
            _synchronize(self.result.problem)
        except Exception as error:  # whatever a peer raises is its result, never the end of the comparison
            text = str(error).strip().splitlines()
            entry.status, entry.message = "failed", f"{type(error).__name__}: {text[0] if text else ''}"
            return
        entry.prepare_s = time.perf_counter() - start
        if self._holds(0, peer, entry, outcome):
            self.calls[entry.name] = calls
            self.peers[entry.name] = peer

    def _prepare(self, peer: Peer) -> list[Call]:
        calls = peer.prepare(self.result.problem, self.result.op, self.inputs.of(peer.layout))
        return [_graphed(call) for call in calls] if self.cuda_graph else calls

    def _holds(self, copy: int, peer: Peer, entry: Contestant, outcome: Any) -> bool:
        key = (peer.computes, copy)
        if key not in self._judges:
            self._judges[key] = peer.judge(self.result.problem, self.result.op, self.inputs.of("bshd")[copy])
        slack = 1.0 if isinstance(peer, Flashgen) else PEER_SLACK
        judgement, used, message = self._judges[key].judge(outcome, peer.layout, slack=slack)
        entry.budget_used = max(used, entry.budget_used or 0.0)
        if judgement == "wrong" or entry.status == "ok":
            entry.status, entry.message = judgement, message
        return judgement != "wrong"

    def run(self, clock: Clock, rounds: int, seed: int, expired: Callable[[], bool]) -> None:
        """The rounds; then every contestant's last copy is judged, so that no time of a wrong result is kept."""
        result, entries = self.result, {entry.name: entry for entry in self.result.contestants}
        baseline = result.baseline
        if baseline.name in self.calls:
            self.calls[TWIN] = self.calls[baseline.name]
            entries[TWIN] = Contestant(name=TWIN, version=baseline.version, detail="the baseline once more")
            result.contestants.append(entries[TWIN])
        self.say(f"{', '.join(self.calls)}: {rounds} rounds")
        result.gpu_before = _state(result.problem)
        least, most = self.warm_up_ms
        timed = run_rounds(
            self.calls, clock=clock, rounds=rounds, seed=seed, least_ms=least, most_ms=most, expired=expired
        )
        result.gpu_after = _state(result.problem)
        result.warm_up_rounds, result.settled = timed.warm_up_rounds, timed.settled
        result.interrupted, result.expired = timed.interrupted, timed.expired
        for name, samples in timed.samples.items():
            entry = entries[name]
            if not samples:
                entry.status, entry.message = "not run", "interrupted" if timed.interrupted else "the time was over"
            elif name == TWIN or self._holds(-1, self.peers[name], entry, self.calls[name][-1]()):
                entry.samples = samples


def _state(problem: Problem) -> dict[str, Any]:
    return gpu_state() if problem.device.startswith("cuda") else {}


def _synchronize(problem: Problem) -> None:
    if problem.device.startswith("cuda"):
        torch.cuda.synchronize()


def _graphed(call: Call) -> Call:
    """The call as a replay of a CUDA graph; its result is the captured one's memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = call()

    def replay() -> Any:
        graph.replay()
        return outcome

    return replay


def _summarise(result: Comparison, rounds: int, flops: dict[str, float]) -> None:
    baseline = result.baseline
    flops = {**flops, TWIN: flops[baseline.name]}
    for entry in result.contestants:
        if not entry.samples:
            continue
        entry.time = summarise(entry.samples, result.protocol)
        seconds = entry.time.latency_ms / 1e3
        entry.tflops, entry.gbps = flops[entry.name] / seconds / 1e12, result.moved_bytes / seconds / 1e9
        if entry is not baseline and baseline.samples:
            entry.ratio = pairwise_ratio(entry.samples, baseline.samples)
    twin = next((entry.ratio for entry in result.contestants if entry.name == TWIN), None)
    if twin is not None:
        result.floor = noise_floor(twin)
        for entry in result.contestants:
            if entry.ratio is not None and entry.name != TWIN:
                entry.verdict = verdict(entry.ratio, result.floor)
    result.notes = _notes(result, rounds)


def _notes(result: Comparison, rounds: int) -> list[str]:
    notes = []
    times = [entry.time for entry in result.contestants if entry.time is not None]
    if times and times[0].samples < rounds:
        why = "interrupted" if result.interrupted else "the time was over"
        notes.append(f"only {times[0].samples} of {rounds} rounds: {why}")
    if times and not result.settled:
        notes.append("the warm-up ended before the times had settled")
    if result.options and options.option_bytes(result.problem):
        notes.append("bias and attn_mask are one copy, shared by all contestants and calls")
    if not result.overflows:
        notes.append("the copies of the inputs fit into the cache: times are those of warm inputs")
    gpu = result.problem.device.startswith("cuda")
    if gpu and not result.cuda_graph and any(time.latency_ms < SHORT_MS for time in times):
        notes.append(f"below {SHORT_MS} ms host time may dominate: --cuda-graph takes it out")
    return notes
