"""The Hopper backward in Gluon: one pass over the rows for each block of keys, dq added to memory by TMA."""

from __future__ import annotations

from typing import Any

from flashgen.config import KernelConfig, Tunable
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec, padded_head_dim
from flashgen.target import Target
from flashgen.variants.base import Knob, KnownGood, ResourceFacts, Variant
from flashgen.variants.features import capped_too_high
from flashgen.variants.gluon_bwd_text import BackwardText

_COVERED_FLAGS = frozenset(
    {
        "causal",
        "dropout",
        "varlen",
        "window",
        "softcap",
        "has_alibi",
        "has_sinks",
        "has_bias",
        "has_attn_mask",
        "has_score_mod",
        "has_mask_mod",
        "has_block_mask",
    }
)
# Of dq in a wide kernel: 16 KB of 64 rows, so that two or three buffers fit and one is filled while TMA reads others.
_DQ_COLUMNS = 64
_NARROW = 128  # columns, padded, up to which p and ds stay in registers
_BLOCK_M = (64, 128)
_BLOCK_N = (64, 128)
# At most four of dq: split kernels hand them over at named barriers 8 to 15, one for each buffer and writer.
_STAGES = {"STAGES": (1, 4), "DS_STAGES": (1, 2), "DQ_STAGES": (1, 4)}
_REGISTERS = (24, 64)  # of the producer and the writer; setmaxnreg takes steps of 8
_MAX_REGISTERS = 255  # of a thread
_ARGUMENT_BYTES = 512

_H200 = "measured on one H200, interleaved, bf16, S 2048 and 8192 (benchmarks/results/h200_backward_tiles.csv)"
_H100 = "measured on one H100, interleaved, bf16, S 2048 and 8192 (benchmarks/results/h100_backward.csv)"
_IDEAS = "measured on one H200, interleaved, bf16, S 2048 to 16384 (benchmarks/results/h200_backward_ideas.csv)"
_H200_MASKS = (
    "timed on one H200, interleaved, bf16, S 8192, eight kinds of masks and scores, beside 64 rows or two buffers of dq"
)
_OPTIONS = "timed on one H200, interleaved, bf16, S 4096, causal, beside other tiles (benchmarks/results/h200_backward_option_tiles.csv)"
_SPLIT_SOURCE = "measured on one H200, interleaved, bf16, head dims 256 and 192/128, S 2048 to 8192 (benchmarks/results/h200_portfolio_tune.jsonl)"
_FITS = "never timed: of these knobs it spills least under Triton 3.6 and 3.9"

# (BLOCK_M, BLOCK_N, STAGES, DS_STAGES, DQ_STAGES, PRODUCER_REGS, SCORES_AHEAD, DV_FIRST, PEELED), best first, by the wider
# padded head dim and whether causal. Up to 128 the first does not spill in its loop under Triton 3.6 and 3.9.
_Knobs = tuple[int, int, int, int, int, int, bool, bool, bool]
_PORTFOLIO: dict[tuple[int, bool], tuple[tuple[_Knobs, str], ...]] = {
    (64, False): (
        ((128, 128, 2, 1, 1, 24, False, False, True), _H100),
        ((128, 128, 2, 1, 2, 24, False, False, True), _H200),
        ((128, 128, 2, 2, 2, 24, True, False, True), _H200),
    ),
    (64, True): (
        ((128, 128, 2, 1, 2, 24, False, False, True), _H100),
        ((128, 128, 2, 1, 1, 24, False, False, True), _H200),
        ((128, 128, 2, 2, 1, 24, False, False, True), _H200),
        ((128, 128, 2, 2, 2, 24, True, False, True), _IDEAS),
    ),
    (128, False): (
        ((64, 128, 2, 1, 2, 24, False, False, True), _H100),
        ((64, 128, 2, 2, 1, 24, True, False, True), _H200),
        ((64, 128, 2, 2, 1, 24, True, True, True), _H200),
    ),
    (128, True): (
        ((64, 128, 2, 1, 2, 24, False, False, True), _H100),
        ((64, 128, 2, 2, 2, 24, True, True, True), _H200),
        ((64, 128, 2, 2, 1, 24, True, True, True), _H200),
    ),
    (256, False): (
        ((64, 64, 2, 1, 3, 24, False, True, True), _H200),
        ((64, 64, 2, 1, 3, 24, False, True, False), _FITS),
        ((64, 64, 1, 1, 2, 24, False, True, False), _FITS),
    ),
    (256, True): (
        ((64, 64, 2, 1, 3, 24, False, True, False), _H200),
        ((64, 64, 2, 1, 3, 24, False, True, True), _FITS),
        ((64, 64, 1, 1, 2, 24, False, True, False), _FITS),
    ),
}
# Where one warpgroup has scores and the other dp. At 192 and 256 columns of keys more than two buffers of dq do not fit beside 256 of values.
_SPLIT: dict[bool, tuple[tuple[_Knobs, str], ...]] = {
    causal: tuple(
        ((64, 64, 2, 1, buffers, 24, False, True, peeled), _SPLIT_SOURCE)
        for peeled in (not causal, causal)
        for buffers in (2, 3)
    )
    for causal in (False, True)
}
# Go first where no option asks for memory or registers: the next scores are multiplied while dq is handed over.
_PLAIN: dict[tuple[int, bool], tuple[_Knobs, str]] = {
    (64, False): ((128, 128, 2, 2, 2, 24, True, False, True), _IDEAS),
    (128, False): ((64, 128, 2, 2, 2, 24, True, False, True), _IDEAS),
    # With two buffers of dq it spills in its loop, dv first under Triton 3.6 and else under 3.9.
    (128, True): ((64, 128, 2, 2, 1, 24, True, True, True), _H200),
}
# Go first where options keep values beside each score, or a mask reads tensors of rows: at head dim 64 a step of 128 rows spills in its
# loop then.
_BESIDE_SCORES: dict[int, tuple[tuple[_Knobs, str], ...]] = {
    64: (((64, 128, 2, 1, 2, 24, False, False, True), _H200_MASKS),),
}
# Go first at head dim 64 where a bias is all that a score is changed by or hidden, but for masks of places, ALiBi and packing: 2.17 instead of 2.21 ms, and nothing spilled.
_BIASED: dict[int, tuple[tuple[_Knobs, str], ...]] = {
    64: (((64, 128, 2, 2, 1, 24, False, False, True), _OPTIONS),),
}
# Go before those where the step has least registers left: at head dim 128 beside a bias or dropout's bits (the addresses of a second buffer of ds are
# made in the step), at 64 beside three options or more (half the keys leave 255 registers a thread).
_CROWDED: dict[int, tuple[tuple[_Knobs, str], ...]] = {
    64: (((64, 64, 2, 2, 1, 24, False, False, True), _FITS),),
    128: (((64, 128, 2, 2, 1, 24, False, False, True), _OPTIONS),),
}
# Go first where a mask_mod compares what it computes of rows and keys, at head dim 64.
_MASKED: dict[int, tuple[tuple[_Knobs, str], ...]] = {
    64: (((128, 128, 2, 1, 1, 24, False, False, True), _H200_MASKS),),
}
# Go first at head dim 128 beside gradients of captured tensors by row, which take a pointer, a value and a condition of each pair: 128 keys a step spill
# some 110 to 500 instructions in the loop and take 1.12 times as long (one H200, S 4096), 64 spill none. Other options are faster with 128 keys, spills or not
# (benchmarks/results/h200_backward_option_tiles.csv).
_HALVED: tuple[tuple[_Knobs, str], ...] = (
    ((64, 64, 2, 1, 3, 24, False, True, False), _FITS),
    ((64, 64, 2, 1, 3, 24, False, True, True), _OPTIONS),
)
# Beyond head dim 128 one tile fits, and p and ds leave no choice of order.
_WIDE_ONLY: dict[str, Tunable] = {"BLOCK_M": 64, "BLOCK_N": 64, "DS_STAGES": 1, "SCORES_AHEAD": False, "DV_FIRST": True}


class GluonBackwardSm90(BackwardText, Variant):
    """`templates/gluon/attention_bwd_sm90.py.jinja`."""

    name = "gluon_bwd_sm90"
    op = "attention_bwd"
    backend = "gluon"
    template = "gluon/attention_bwd_sm90.py.jinja"
    DS_REGISTERS = 248  # of a thread of the warpgroup with ds, where there is one: it holds a panel of dq beside dk
    modelled = False  # overlap of partitions is no sum of instruction counts
    knobs = (
        Knob(name="BLOCK_M", values=(64, 128), meaning="query rows of one step"),
        Knob(name="BLOCK_N", values=(64, 128), meaning="keys of a thread block: 16 for each consumer warp"),
        Knob(name="STAGES", values=(2, 3), meaning="blocks of rows in flight"),
        Knob(name="DS_STAGES", values=(1, 2), meaning="buffers of ds"),
        Knob(name="DQ_STAGES", values=(1, 2, 3), meaning="buffers of staged dq"),
        Knob(name="PRODUCER_REGS", values=(24, 32), meaning="registers of a thread of the producer and of the writer"),
        Knob(
            name="SCORES_AHEAD",
            values=(False, True),
            meaning="the scores of the next step are multiplied while this one ends",
        ),
        Knob(name="DV_FIRST", values=(False, True), meaning="dv is multiplied while ds is computed, not after it"),
        Knob(name="PEELED", values=(False, True), meaning="blocks that need a mask have a loop of their own"),
    )

    def supports(self, spec: AttentionSpec, target: Target) -> str | None:
        if spec.op != self.op:
            return f"computes {self.op}, not {spec.op}"
        missing = [flag for flag in spec.flags if flag not in _COVERED_FLAGS]
        if missing:
            return f"{', '.join(missing)}: not covered by this kernel yet"
        if target.backend != "cpu" and target.arch != "sm_90":
            return f"is written for Hopper (sm_90); {target.name} is {target.arch}"
        if spec.itemsize != 2:
            return f"takes fp16 and bf16 (wgmma multiplies fp32 in reduced precision only), not {spec.dtype}"
        for name, value in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
            if value % 8:
                return f"{name} {value} is no multiple of 8: TMA moves rows in units of 16 bytes"
        return None

    def refuses(self, problem: Problem) -> str | None:
        if problem.unaligned:
            return f"TMA needs addresses and strides that are multiples of 16 bytes, and none that are 0: {', '.join(problem.unaligned)} is not so"
        if problem.untraced:
            return problem.untraced
        if (problem.has_score_mod or problem.has_mask_mod or problem.has_block_mask) and problem.mods is None:
            return "score_mod, mask_mod and block_mask are traced where a call may run a kernel, and this one does not"
        return capped_too_high(problem)

    # -- what it compiles --

    def block_d(self, spec: AttentionSpec) -> int:
        """Columns of a query or key tile: `head_dim` padded to a power of two, at least a 128-byte swizzled row."""
        return max(64, padded_head_dim(spec.head_dim))

    def block_dv(self, spec: AttentionSpec) -> int:
        """Columns of a value or output tile."""
        return max(64, padded_head_dim(spec.head_dim_v))

    def is_wide(self, spec: AttentionSpec) -> bool:
        """Whether a block of 128 keys leaves a step too few registers: it then has 64, and p passes through shared memory."""
        width = max(self.block_d(spec), self.block_dv(spec))
        return width > _NARROW or (width == _NARROW and self.sums_by_row(spec))

    def is_split(self, spec: AttentionSpec) -> bool:
        """Whether one warpgroup has scores, p and dv, and the other dp, ds, dk and dq: wide kernels of plain and causal attention."""
        return max(self.block_d(spec), self.block_dv(spec)) > _NARROW and all(flag == "causal" for flag in spec.flags)

    def panels(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        """(first column, columns) of the products over a wide tile: powers of two, as blocks must be."""
        width = max(64, padded_head_dim(head_dim))
        return ((0, width),) if width <= _NARROW else ((0, _NARROW), (_NARROW, 64 if head_dim <= 192 else _NARROW))

    def dq_panels(self, spec: AttentionSpec) -> int:
        """Parts of equal width in which dq is computed, staged and added."""
        return self._columns(spec.head_dim) // _DQ_COLUMNS if self.is_wide(spec) else 1

    def dq_columns(self, spec: AttentionSpec) -> int:
        """Columns of such a part."""
        return _DQ_COLUMNS if self.is_wide(spec) else self.block_d(spec)

    def num_warps(self, spec: AttentionSpec, config: KernelConfig) -> int:
        """Consumer warps: 16 keys each, and two warpgroups for 64 keys where tiles are wide."""
        if self.is_split(spec):
            return 4  # of the partition that starts: the other one's are a worker's
        return 8 if self.is_wide(spec) else int(config.BLOCK_N) // 16

    def loop_columns(self, spec: AttentionSpec) -> int:
        """Of a split kernel the loop with most products: dp, dk and dq."""
        return spec.head_dim_v + 2 * spec.head_dim if self.is_split(spec) else super().loop_columns(spec)

    def boxes(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, tuple[int, ...]]:
        outer = (
            (1, 1, 1) if spec.varlen else (1, 1)
        )  # of packed sequences also how often the address wraps: see `place`
        rows, keys = (*outer, int(config.BLOCK_M)), (*outer, int(config.BLOCK_N))
        width, width_v = self.block_d(spec), self.block_dv(spec)
        return {
            "q_desc": (*rows, width),
            "k_desc": (*keys, width),
            "v_desc": (*keys, width_v),
            "do_desc": (*rows, width_v),
            "dk_desc": (*keys, width),
            "dv_desc": (*keys, width_v),
        }

    def fp32_boxes(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, tuple[int, ...]]:
        rows = int(config.BLOCK_M)
        return {
            "dq_desc": (1, rows * self.dq_columns(spec) // 256, 256),
            "lse_desc": (1, rows),
            "delta_desc": (1, rows),
        }

    def constants(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, Tunable | None]:
        widths = {"BLOCK_D": self.block_d(spec), "BLOCK_DV": self.block_dv(spec)}
        found: dict[str, Tunable | None] = {
            **widths,
            "MASKED": spec.causal or self.is_free(spec),
            "DETERMINISTIC": False,
        }
        found |= {"ONE_KIND": True} if spec.has_block_mask else {}
        found |= {"ONE_SIDED": True}  # named by kernels with slopes alone
        found |= {"SUM_BIAS": 4, "BIAS_ROWS": True, "BIAS_KEYS": True} if spec.has_bias else {}
        found |= {"SUMS": 1} if self.sums(spec) else {}
        return {**found, "MASKED": True, "PEELED": False} if spec.has_attn_mask else found

    def keeps_beside_scores(self, spec: AttentionSpec) -> bool:
        """Whether a plain kernel's tile says nothing: at head dim 128 the best one there costs 5 to 18 % with a mask (one H200)."""
        return any(flag != "causal" for flag in spec.flags)

    def launch_options(self, problem: Problem) -> dict[str, Any]:
        return {"deterministic": problem.deterministic}

    def unordered(self, problem: Problem) -> tuple[str, ...]:
        return (
            ()
            if problem.deterministic
            else ("dq", *(["dbias"] if problem.bias_grad else []), *self.sums(problem.spec).values())
        )

    def illegal(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None = None
    ) -> str | None:
        for name in ("SCORES_AHEAD", "DV_FIRST", "PEELED"):
            if not isinstance(config[name], bool):
                return f"{name}={config[name]!r} must be True or False"
        for name, allowed in (("BLOCK_M", _BLOCK_M), ("BLOCK_N", _BLOCK_N)):
            if config[name] not in allowed or not _is_int(config[name]):
                return f"{name}={config[name]!r} must be one of {', '.join(map(str, allowed))}"
        for name, (low, high) in _STAGES.items():
            if not _is_int(config[name]) or not low <= int(config[name]) <= high:
                return f"{name}={config[name]!r} must be from {low} to {high}"
        if config.SCORES_AHEAD and spec.varlen:
            return "SCORES_AHEAD multiplies before the first step, and a block of packed keys may have none: it must be False"
        if config.SCORES_AHEAD and config.STAGES < 2:
            return "SCORES_AHEAD reads the rows of the next step while this one's are in use: STAGES must be 2 at least"
        return (
            self._illegal_where_wide(spec, config)
            or self._illegal_registers(spec, target, config)
            or self._illegal_memory(spec, target, config, facts)
        )

    def _illegal_where_wide(self, spec: AttentionSpec, config: KernelConfig) -> str | None:
        """Where p passes through shared memory the kernel has one tile, and knobs of the other one stand at one value."""
        if not self.is_wide(spec):
            return None
        for name, only in _WIDE_ONLY.items():
            if config[name] != only:
                return f"{name}={config[name]!r} must be {only} where a head dim is above {_NARROW}, or gradients by row take its registers"
        if self.is_split(spec) and config.STAGES < 2:
            return "the scores of the next step would wait for this one's rows to be read: STAGES must be 2 at least"
        if config.DQ_STAGES < 2:
            return f"DQ_STAGES={config.DQ_STAGES} must be 2 at least where tiles have 64 keys: TMA reads two at a time"
        return None

    def _illegal_registers(self, spec: AttentionSpec, target: Target, config: KernelConfig) -> str | None:
        low, high = _REGISTERS
        value: Any = config.PRODUCER_REGS
        if not _is_int(value) or not low <= value <= high or value % 8:
            return f"PRODUCER_REGS={value!r} must be a multiple of 8 from {low} to {high}"
        # dk, dv, scores, dp and dq in fp32; p and ds in 16 bit once each; what addresses and rows took when compiled.
        rows, keys, width = config.BLOCK_M, config.BLOCK_N, self.block_d(spec)
        numbers = keys * (width + self.block_dv(spec)) + 2 * rows * keys + rows * width
        if self.is_wide(spec):
            numbers = keys * (self._columns(spec.head_dim) + self._columns(spec.head_dim_v) + 2 * rows)
            numbers += rows * self.dq_columns(spec)
        if self.is_split(spec):
            return self._illegal_share(spec, config)
        needed = numbers // (32 * self.num_warps(spec, config)) + 30
        if needed > _MAX_REGISTERS:
            return f"gradients and scores of a step need about {needed} registers a thread, which has {_MAX_REGISTERS}"
        return None

    def _illegal_share(self, spec: AttentionSpec, config: KernelConfig) -> str | None:
        """The warpgroup with p of a split kernel: of 504 registers of a thread of each of the three the other two have taken theirs."""
        scores = config.BLOCK_M * config.BLOCK_N * 3 // 2  # in fp32, and once in 16 bit
        needed = (config.BLOCK_N * self._columns(spec.head_dim_v) + scores) // 128 + 30
        share = 504 - self.DS_REGISTERS - config.PRODUCER_REGS
        if needed > share:
            return f"the warpgroup with p needs about {needed} registers a thread, PRODUCER_REGS={config.PRODUCER_REGS} leaves it {share}"
        return None

    def _illegal_memory(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None
    ) -> str | None:
        if facts is not None and facts.undefined_registers:
            return f"ptxas miscompiled it: {facts.undefined_registers} instructions read registers that nothing wrote"
        needed = facts.smem_bytes if facts is not None else self.smem_bytes(spec, config)
        if needed > target.smem_bytes:
            return f"needs {needed} bytes of shared memory, {target.name} has {target.smem_bytes} a block"
        return None

    def smem_bytes(self, spec: AttentionSpec, config: KernelConfig) -> int:
        """Shared memory of a thread block: tiles, barriers, and at most 512 bytes of arguments that partitions are handed."""
        rows, keys, width = config.BLOCK_M, config.BLOCK_N, self.block_d(spec)
        gradients = 1 if self.is_wide(spec) else config.STAGES  # buffers of dout and delta
        half = (config.STAGES * rows + keys) * width + (gradients * rows + keys) * self.block_dv(spec)
        half += (2 if self.is_wide(spec) else config.DS_STAGES) * rows * keys  # p and ds, or stages of ds
        full = config.DQ_STAGES * rows * self.dq_columns(spec) + (config.STAGES + gradients) * rows
        barriers = 2 + 2 * config.STAGES + gradients + config.DQ_STAGES
        if self.is_split(spec):
            full += rows * keys // 2  # p goes from one warpgroup to the other in fp32: twice the bytes
            barriers += 3
        # Sums over a tile's keys: each warp's own meet in shared memory, as Triton does it (2 KB more than was counted, 4 at 128 rows).
        sums = 4 * rows * self.num_warps(spec, config) if spec.has_bias or self.sums(spec) else 0
        return int(half * spec.itemsize + 4 * full + 8 * barriers + _ARGUMENT_BYTES + sums)

    def _columns(self, head_dim: int) -> int:
        return sum(width for _, width in self.panels(head_dim))

    def default(self, spec: AttentionSpec, target: Target) -> KernelConfig:
        known = self.known_good(spec, target)
        return known[0].config if known else self._of((64, 64, 2, 1, 1, 24, False, False, True))

    def known_good(self, spec: AttentionSpec, target: Target) -> tuple[KnownGood, ...]:
        width = max(self.block_d(spec), self.block_dv(spec))
        rows = _PORTFOLIO[width, spec.causal or self.is_free(spec)]
        beside = self.is_free(spec) or self.keeps_values(spec) or spec.softcap
        if not beside and (width, spec.causal) in _PLAIN:
            first = _PLAIN[width, spec.causal]
            rows = (first, *(row for row in rows if row[0] != first[0]))
        if self.is_split(spec):
            rows = _SPLIT[spec.causal]
        elif width <= _NARROW and self.is_wide(spec):
            rows = _HALVED
        elif self.keeps_values(spec) or spec.softcap or self.reads_rows(spec):
            rows = (*_BESIDE_SCORES.get(width, ()), *rows)
            rows = (*(_BIASED.get(width, ()) if spec.has_bias and self.changes(spec) == 1 else ()), *rows)
            rows = (*(_CROWDED.get(width, ()) if self.crowds(spec, width) else ()), *rows)
        elif spec.has_mask_mod:
            rows = (*_MASKED.get(width, ()), *rows)
        return self.legal((KnownGood(config=self._of(values), source=source) for values, source in rows), spec, target)

    @staticmethod
    def crowds(spec: AttentionSpec, width: int) -> bool:
        """Whether options leave a step of a usual tile too few registers."""
        if width <= 64:
            return GluonBackwardSm90.changes(spec) >= 3
        return spec.has_bias or (spec.dropout and not spec.has_alibi)

    @staticmethod
    def changes(spec: AttentionSpec) -> int:
        """How many options change what a score becomes."""
        return sum((spec.has_bias, spec.has_attn_mask, spec.dropout, spec.softcap, spec.has_score_mod))

    def _of(self, values: _Knobs) -> KernelConfig:
        return self.config(**dict(zip((knob.name for knob in self.knobs), values, strict=True)))


def _is_int(value: Tunable) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
