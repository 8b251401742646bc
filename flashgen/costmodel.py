"""A forecast from the compiler's facts alone: what a configuration costs relative to others, what bounds it, what to refuse.

Never a measurement. Its job, by the policy in `flashgen.tuner.policy`, is to *veto* tiles and, where nothing was measured, to rank
known-good ones. Milliseconds are given only for the kernel family and GPUs they were calibrated on, as a range.

The form (cycles of one SM quadrant, for one pass of the main loop of one thread block):

1. Pipes. The products' time follows from their FLOPs and the target's dense peak, lowered by `TENSOR_EFFICIENCY`; every other
   pipe's from the instruction counts of the compiled loop, with the throughputs of the CUDA C++ Programming Guide
   (arithmetic instructions, compute capability 8.0 and 9.0): special functions 16 a clock and SM, fp32 128, the rest of the
   arithmetic 64, shared memory and shuffles 32 lanes. `bound_by` is the longest pipe.
2. Within a block nothing overlaps (a plain kernel waits for its products before it takes the softmax), so a pass costs the
   sum of the pipes; all but `exposed` of it hides behind the other warpgroups that share the SM.
3. Spill instructions in the loop cost `spill_cycles` each, and two pipeline stages (one load in flight) `two_stages`.
4. A launch is its blocks, longest first, over the SMs: per block the passes its rows need, plus a fixed start.

Where each constant comes from stands beside it: published, measured once, or fitted (`Constants`). What it promises, measured by
`benchmarks/model_quality.py` on eight problems of one plain kernel on one H200 and refitted there with one head dim held out: an order
of the tiles of one problem that is right more often than not, and no more. Not promised: the best of the top third, anything about
pipeline stages beyond "two are worse", kernels whose warps are specialised (measured: it does not rank them), clocks and power, and any
architecture but sm_90, where the form is the same and nothing was judged.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from flashgen.config import KernelConfig
from flashgen.facts import CompiledFacts
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import Variant, by_name

MODEL = "serial-3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What is fitted, on the plain surfaces of `benchmarks/data`, by `benchmarks/model_quality.py --fit`.

    Attributes:
        spill_cycles: of a quadrant, for one spill instruction of one warp in the main loop. 16 is also what the traffic through L2
            costs at the 32 bytes a clock and SM assumed below (128 bytes x 4 quadrants / 32).
        two_stages: how much longer a pass takes when only one load is in flight.
        exposed: the part of a pass that no other warpgroup hides.
    """

    spill_cycles: float = 16.0
    two_stages: float = 0.15
    exposed: float = 0.3


FITTED = Constants()

TENSOR_EFFICIENCY = 0.845  # an 8192^3 bf16 product reaches 800 of 947 TFLOP/s at 1.75 GHz on one H100
PASS_CYCLES = 100.0  # barriers and the loop's own latency, a guess: the order hardly depends on it
BLOCK_START_CYCLES = 3000.0  # loading q, filling the pipeline, storing the output; a guess of the same kind
LAUNCH_US = 3.0
L2_BYTES_PER_CLOCK = 32.0  # of one SM; unpublished, 32 is what 7.4 TB/s over 132 SMs at 1.75 GHz gives
# Sustained clock under a tensor-core load, as a part of the boost clock (1.75 of 1.98 GHz measured on an H200).
SUSTAINED_CLOCK = 0.88
# From so many spill instructions in the main loop on, a plain kernel is never worth running: on the measured surfaces such tiles were
# all far behind their problem's best (`benchmarks/model_quality.py` prints how far).
SPILL_VETO = 50
# Where milliseconds mean something: the family, dtype width and GPUs the constants were fitted on, with the range that held.
_CALIBRATED = {("triton_fwd", 2): ("h100", "h200")}
# Measured over predicted, in the data of benchmarks/model_quality.py, for tiles within 30 % of their problem's best (177 rows): the
# median scales, the 5th and 95th percentile around it are the range.
CALIBRATION = 0.82
_RANGE = (0.75, 1.25)

# Cycles of a quadrant that one warp instruction occupies its pipe, by class of `flashgen.sass`.
_CYCLES = {"mufu": 8.0, "fp32": 1.0, "alu": 2.0, "select": 2.0, "shuffle": 4.0, "shared": 4.0, "async_copy": 4.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A forecast; every figure of it is to be called predicted.

    Attributes:
        cost: relative, lower is better; comparable within one problem and target only.
        bound_by: the longest pipe: tensor, mufu, fp32, alu, select, shuffle, shared, async_copy, memory.
        ms: predicted milliseconds of a launch where calibrated, else None.
        ms_low, ms_high: the range in which measured times of the calibration stood, else None.
        calibrated: whether there are milliseconds.
        basis: in words, what the figure stands on.
        model: version of the model.
    """

    cost: float
    bound_by: str
    ms: float | None
    ms_low: float | None
    ms_high: float | None
    calibrated: bool
    basis: str
    model: str = MODEL


def predict(
    facts: CompiledFacts,
    problem: Problem,
    target: Target,
    config: KernelConfig,
    *,
    constants: Constants = FITTED,
) -> Prediction:
    """Forecast one configuration of one problem; deterministic.

    Args:
        facts: of the configuration, compiled for the target.
        problem: the sizes.
        target: with its published figures.
        config: the knobs.
        constants: others than the shipped ones only to judge the form.

    Returns:
        The forecast.
    """
    variant = by_name(config.variant)
    if not variant.modelled:
        return _by_portfolio(variant, problem, target, config)
    pipes = _pipes(facts, problem, target, config)
    resident = occupancy(facts, target)
    # Warpgroups (four warps, one per quadrant) of all blocks on an SM hide behind one another; the longest pipe is a floor.
    groups = resident * config.num_warps / 4
    exposed = constants.exposed + (1.0 - constants.exposed) / groups
    per_pass = resident * max(max(pipes.values()), (sum(pipes.values()) + PASS_CYCLES * config.num_warps / 4) * exposed)
    spills = facts.loop_spill_ops * _passes(facts, problem, config)
    per_pass += constants.spill_cycles * spills * config.num_warps / 4 * resident
    if config.num_stages <= 2:
        per_pass *= 1.0 + constants.two_stages
    cycles = _makespan(problem, config, target.num_sms * resident, per_pass)
    calibrated = target.name in _CALIBRATED.get((config.variant, problem.spec.itemsize), ())
    ms = None
    if calibrated:
        ms = CALIBRATION * cycles / (target.clock_mhz * SUSTAINED_CLOCK * 1e3) + LAUNCH_US * 1e-3
    basis = (
        f"predicted; calibrated on one H200, where 9 of 10 good tiles took {_RANGE[0]:g} to {_RANGE[1]:g} of it"
        if calibrated
        else "predicted; rank and bound only: no measurement of this kernel family on this GPU stands behind it"
    )
    return Prediction(
        cost=cycles,
        bound_by=max(pipes, key=lambda name: (pipes[name], name)),
        ms=ms,
        ms_low=None if ms is None else ms * _RANGE[0],
        ms_high=None if ms is None else ms * _RANGE[1],
        calibrated=calibrated,
        basis=basis,
    )


def _by_portfolio(variant: Variant, problem: Problem, target: Target, config: KernelConfig) -> Prediction:
    """The place of a configuration in the variant's own order, where instruction counts say nothing about time."""
    order = [known.config for known in variant.known_good(problem.spec, target)]
    return Prediction(
        cost=1.0 + (order.index(config) if config in order else len(order)),
        bound_by="not modelled",
        ms=None,
        ms_low=None,
        ms_high=None,
        calibrated=False,
        basis=f"no forecast: the order is that of the known-good configurations of {variant.name}",
    )


def rank(predictions: Sequence[tuple[KernelConfig, Prediction]]) -> list[tuple[KernelConfig, Prediction]]:
    """Best first; equal costs go to fewer stages, then to the smaller tile, then by name."""
    return sorted(
        predictions,
        key=lambda row: (round(row[1].cost, 3), row[0].get("num_stages", 0), _tile(row[0]), row[0].label),
    )


def veto(
    config: KernelConfig, facts: CompiledFacts, spec: AttentionSpec, target: Target, deeper: CompiledFacts | None = None
) -> str | None:
    """Why a configuration must not be chosen unmeasured, and is measured last, or None.

    Args:
        config: the knobs.
        facts: of the configuration, compiled for the target.
        spec: what is compiled.
        target: where; the rule on stages speaks of NVIDIA's asynchronous copies and 16-bit products only, where it was measured.
        deeper: facts of the same tile with three stages, where they compiled and fit.
    """
    if facts.loop_spill_ops >= SPILL_VETO:
        return f"{facts.loop_spill_ops} spill instructions in its main loop ({SPILL_VETO} or more)"
    if facts.serialised and by_name(config.variant).backend == "gluon":
        # Fatal where warpgroups overlap; on the plain kernel the warning costs nothing beyond what its instructions show.
        return "ptxas serialised its asynchronous products"
    if config.get("num_stages") != 2 or deeper is None or spec.itemsize != 2 or target.backend != "cuda":
        return None
    if occupancy(deeper, target) >= occupancy(facts, target):
        return "two stages where three fit at equal occupancy"
    return None


def occupancy(facts: CompiledFacts, target: Target) -> int:
    """Thread blocks that fit on one SM, by registers, shared memory and threads; at least 1."""
    threads = facts.num_warps * target.warp_size
    registers = -(-max(facts.n_regs, 1) // 8) * 8 * threads
    smem = facts.smem_bytes + 1024  # the system's share of each block (CUDA C++ Programming Guide)
    return max(
        1,
        min(
            target.registers_per_sm // registers, target.smem_per_sm_bytes // smem, target.max_threads_per_sm // threads
        ),
    )


def _pipes(facts: CompiledFacts, problem: Problem, target: Target, config: KernelConfig) -> dict[str, float]:
    """Cycles of a quadrant per pass of the main loop over one block of keys, by pipe."""
    spec, passes = problem.spec, _passes(facts, problem, config)
    flops = 2.0 * _repeats(spec) * config.BLOCK_M * config.BLOCK_N * (spec.block_head_dim + spec.block_head_dim_v)
    pipes = {name: facts.loop.get(name, 0) * passes * cycles * config.num_warps / 4 for name, cycles in _CYCLES.items()}
    if spec.itemsize == 2 and target.clock_mhz:
        peak = target.bf16_tflops * 1e12 / (target.num_sms * target.clock_mhz * 1e6)  # FLOP per clock and SM
        pipes["tensor"] = flops / (peak * TENSOR_EFFICIENCY)
    if target.clock_mhz:
        step = (
            config.BLOCK_M if spec.op == "attention_bwd" else config.BLOCK_N
        )  # what a pass loads: rows of q and dout, or k and v
        loaded = step * (spec.head_dim + spec.head_dim_v) * spec.itemsize
        # K and V come from L2 for all but the first block of a head.
        pipes["memory"] = loaded / L2_BYTES_PER_CLOCK
    return pipes


def _passes(facts: CompiledFacts, problem: Problem, config: KernelConfig) -> float:
    """Passes of the compiled loop per block of keys: below 1 where ptxas unrolled it."""
    spec = problem.spec
    products = _repeats(spec) * config.BLOCK_M * config.BLOCK_N * (spec.block_head_dim + spec.block_head_dim_v)
    if facts.loop.get("hgmma"):
        return 1.0  # never unrolled in what was compiled; their shapes vary, so their number says nothing
    if facts.loop_macs:
        return float(products / facts.loop_macs)
    if spec.itemsize == 4 and facts.loop.get("fp32"):
        return float(max(1.0, products / (config.num_warps * 32) / facts.loop["fp32"]))
    return 1.0


def _repeats(spec: AttentionSpec) -> int:
    """Products of a pass, in pairs over both head dims: the forward's two, or the four of dK/dV (which nothing judged)."""
    return 2 if spec.op == "attention_bwd" else 1


def _makespan(problem: Problem, config: KernelConfig, slots: int, per_pass: float) -> float:
    """Cycles until the last block ends: blocks are handed out in launch order, each to the slot that is free first."""
    rows = -(-problem.seqlen_q // config.BLOCK_M)
    lengths: list[float] = []
    for start in range(0, problem.seqlen_q, config.BLOCK_M):
        keys = problem.seqlen_k
        if problem.causal:
            last = min(start + config.BLOCK_M, problem.seqlen_q) - 1
            keys = min(keys, max(0, last + problem.causal_offset + 1))
        lengths.append(-(-keys // config.BLOCK_N) * per_pass + BLOCK_START_CYCLES)
    if problem.causal:
        lengths.reverse()
    heads = problem.batch * problem.num_heads_q
    if rows * heads > 50_000:
        return float(sum(lengths) * heads / slots)  # so many waves that the tail does not matter
    free = [0.0] * min(slots, max(1, rows * heads))
    for _ in range(heads):
        for length in lengths:
            heapq.heapreplace(free, free[0] + length)
    return max(free)


def _tile(config: KernelConfig) -> int:
    return int(config.get("BLOCK_M", 0)) * int(config.get("BLOCK_N", 0))
