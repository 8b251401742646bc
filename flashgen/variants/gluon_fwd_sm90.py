"""The Hopper forward in Gluon: TMA, asynchronous wgmma, one producer warp and two or three consumer warpgroups."""

from __future__ import annotations

from typing import Any

from flashgen.config import KernelConfig, Tunable
from flashgen.problem import Problem
from flashgen.spec import MAX_HEAD_DIM, AttentionSpec, padded_head_dim
from flashgen.target import Target
from flashgen.variants.base import Knob, KnownGood, ResourceFacts, Variant
from flashgen.variants.features import Signature
from flashgen.variants.gluon_options import Options, emission, options, signature_of, words
from flashgen.variants.mod_text import WithMods

_COVERED_FLAGS = frozenset(
    {
        "causal", "has_lse", "window", "softcap", "has_alibi", "has_sinks", "has_bias", "has_attn_mask", "has_score_mod", "has_mask_mod",
        "has_block_mask", "dropout", "varlen",
    }
)  # fmt: skip
_WG_ROWS = 64  # query rows of a warpgroup
_WG_THREADS = 128
_BLOCK_N = (32, 64, 128, 256)
_STAGES = (1, 8)
_REGISTERS = (24, 256)  # what setmaxnreg takes, in steps of 8
_SECTION = (1, 1 << 16)
_ARGUMENT_BYTES = 512
_TILE_ELEMENTS = 114688  # of 16 bits, 224 KB: what tiles may take of a multiprocessor's 227 KB
_EXACT = 1 << 23  # positions whose differences, shifted by a length, fp32 holds

_H200 = (
    "measured on one H200, interleaved, bf16, S 512 to 16384, full and causal (benchmarks/results/h200_gluon_fwd.jsonl)"
)

# (BLOCK_M, BLOCK_N, STAGES, CONSUMER_REGS, PRODUCER_REGS, SECTION, OWN_STAGING, LAZY_SUM, TAKE_TURNS), best first, by the wider
# padded head dim.
_Knobs = tuple[int, int, int, int, int, int, bool, bool, bool]
_PORTFOLIO: dict[int, tuple[tuple[_Knobs, str], ...]] = {
    64: (
        ((192, 128, 3, 160, 32, 16, True, False, True), _H200),
        ((192, 128, 4, 160, 32, 4, True, False, True), _H200),
        ((192, 64, 3, 160, 32, 16, True, True, False), _H200),
        ((128, 128, 2, 240, 24, 4, True, False, False), _H200),
    ),
    128: (
        ((128, 128, 2, 240, 24, 16, True, True, False), _H200),
        ((128, 128, 2, 240, 24, 4, True, True, False), _H200),
        ((128, 128, 2, 240, 24, 4, True, False, False), _H200),
        ((192, 64, 3, 160, 32, 16, True, True, False), _H200),
    ),
    256: (
        ((128, 64, 2, 240, 24, 16, False, False, False), _H200),
        ((128, 64, 2, 240, 24, 4, False, False, False), _H200),
        ((128, 64, 2, 240, 24, 4, True, True, False), _H200),
        ((128, 32, 2, 240, 24, 4, True, True, False), _H200),
    ),
}

_HELD = "measured on one H200 beside the running maximum, bf16, S 1024, 2048 and 8192 (benchmarks/results/h200_hopper_hold.csv)"

# Of plain kernels: references held first, which wins but for short causal rows; then as above.
_PLAIN: dict[int, tuple[tuple[_Knobs, str], ...]] = {
    64: (((192, 128, 3, 160, 32, 16, True, True, True), _HELD), *_PORTFOLIO[64][:2], _PORTFOLIO[64][3]),
    128: (*_PORTFOLIO[128][:3], ((128, 128, 2, 240, 24, 16, True, False, False), _H200)),
    256: (((128, 64, 2, 240, 24, 16, False, True, False), _HELD), *_PORTFOLIO[256]),
}

_H200_OPTIONS = "measured on one H200, bf16, S 8192, beside two other tiles (option by option)"
_H200_TABLES = (
    "measured on one H200, bf16, S 2048 to 16384: documents of mixed length, 0.82 to 0.97 of the time of BLOCK_N=128"
)
_H200_HELD = "measured on one H200, bf16, S 2048 to 16384, two to four kinds of masks beside other tiles (benchmarks/results/h200_freeform_tiles.csv)"
_H200_GATHERED = "measured on one H200, bf16, S 8192: 0.53 to 0.95 of the time of BLOCK_N=128 (benchmarks/results/h200_gathered_tiles.jsonl)"
_COMPILED = "never timed: the tile whose loops do not spill when compiled with Triton 3.6"

# Tiles that go before these with some options, by flag and the wider padded head dim: operands and random numbers of a tile of scores take
# registers beside it, a window's edges waste less of a narrow block.
_NARROW_64: _Knobs = (192, 64, 3, 160, 32, 16, True, True, False)
_DEEP_64: _Knobs = (192, 64, 6, 160, 32, 16, True, True, False)
_HELD_64: _Knobs = (192, 128, 3, 160, 32, 16, True, True, True)
_WIDE_64: _Knobs = (128, 128, 3, 240, 24, 16, True, True, False)
_NARROW_128: _Knobs = (128, 64, 3, 240, 24, 16, True, True, False)
_ROOMY_64: _Knobs = (128, 64, 3, 240, 24, 16, True, True, False)
_NARROW_256: _Knobs = (128, 32, 2, 240, 24, 4, True, True, False)
_HEAVY = ("has_bias", "has_attn_mask", "has_score_mod", "dropout")  # two of them do not fit into 160 registers
_WITH_OPTIONS: dict[int, dict[str, tuple[_Knobs, str]]] = {
    64: {
        "window": (_DEEP_64, _H200_OPTIONS),
        "has_alibi": (_WIDE_64, _H200_OPTIONS),
        "softcap": (_DEEP_64, _H200_OPTIONS),
        "has_bias": (_NARROW_64, _H200_OPTIONS),
        "has_attn_mask": (_NARROW_64, _H200_OPTIONS),
        "has_score_mod": (_NARROW_64, _H200_OPTIONS),
        "has_mask_mod": (_HELD_64, _H200_HELD),
        "has_block_mask": (_NARROW_64, _COMPILED),
        "varlen": (_NARROW_64, _COMPILED),
        "dropout": (_NARROW_64, _COMPILED),
    },
    128: {
        "has_attn_mask": (_NARROW_128, _H200_OPTIONS),
        "dropout": (_NARROW_128, _COMPILED),
        "has_mask_mod": (_PORTFOLIO[128][1][0], _H200_HELD),
    },
    256: dict.fromkeys(("has_bias", "has_attn_mask", "has_score_mod", "dropout"), (_NARROW_256, _COMPILED)),
}


class GluonForwardSm90(WithMods, Variant):
    """`templates/gluon/attention_fwd_sm90.py.jinja`."""

    name = "gluon_fwd_sm90"
    op = "attention_fwd"
    backend = "gluon"
    template = "gluon/attention_fwd_sm90.py.jinja"
    modelled = False  # overlap between warpgroups is no sum of instruction counts
    knobs = (
        Knob(
            name="BLOCK_M",
            values=(128, 192, 256),
            meaning="query rows of a thread block: 64 for each consumer warpgroup",
        ),
        Knob(name="BLOCK_N", values=(64, 128), meaning="keys of one step"),
        Knob(name="STAGES", values=(2, 3, 4), meaning="key and value blocks in flight"),
        Knob(name="CONSUMER_REGS", values=(112, 160, 240), meaning="registers of a consumer's thread"),
        Knob(name="PRODUCER_REGS", values=(24, 32), meaning="registers of a producer's thread"),
        Knob(
            name="SECTION",
            values=(1, 2, 4, 8, 16),
            meaning="heads worked on at a time, so that their keys stay in L2",
            compiled=False,
        ),
        Knob(
            name="OWN_STAGING",
            values=(False, True),
            meaning="the output leaves through shared memory of its own, not q's",
        ),
        Knob(
            name="LAZY_SUM",
            values=(False, True),
            meaning="row sums are reduced across lanes once, at the end; references may be held, too (`holds`)",
        ),
        Knob(name="TAKE_TURNS", values=(False, True), meaning="warpgroups issue their products one after the other"),
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
            if value % 8 or value > MAX_HEAD_DIM:
                return f"{name} {value} is no multiple of 8: TMA moves rows in units of 16 bytes"
        return None

    def refuses(self, problem: Problem) -> str | None:
        reason = super().refuses(problem)
        if reason is not None:
            return reason
        if (problem.has_score_mod or problem.has_alibi) and max(problem.seqlen_q, problem.seqlen_k) >= _EXACT:
            return f"counts distances in fp32, exact below {_EXACT} positions: sequences of {problem.seqlen_q} and {problem.seqlen_k} are longer"
        if problem.unaligned:
            return f"TMA needs addresses and strides that are multiples of 16 bytes, and none that are 0: {', '.join(problem.unaligned)} is not so"
        return None

    def options(self, spec: AttentionSpec) -> Options:
        """The names that a spec's options add to the kernel, for the template."""
        return options(spec)

    def mod(self, spec: AttentionSpec, kind: str) -> Any:
        """The text of a spec's `score`, `mask` or `block`, a `mods.Emission`."""
        return emission(spec, kind)

    def measures_distance(self, spec: AttentionSpec, kind: str) -> bool:
        """Whether the text of a mod reads q_idx - kv_idx in fp32."""
        return "apart" in words(spec, kind)

    def mask_tiles(self, config: KernelConfig) -> dict[str, tuple[int, int]]:
        tile = (int(config.BLOCK_M), int(config.BLOCK_N))
        return {"words": tile, "lists": tile}

    def block_d(self, spec: AttentionSpec) -> int:
        """Columns of a query or key tile: `head_dim` padded to a power of two, at least a 128-byte swizzled row."""
        return max(64, padded_head_dim(spec.head_dim))

    def block_dv(self, spec: AttentionSpec) -> int:
        """Columns of a value or output tile."""
        return max(64, padded_head_dim(spec.head_dim_v))

    def settles(self, spec: AttentionSpec) -> bool:
        """Whether a plain kernel compares maxima as integers once no row's is negative. A causal one starts with rows of few keys: it lost."""
        return not (options(spec).any or spec.causal)

    def holds(self, spec: AttentionSpec) -> bool:
        """Whether LAZY_SUM holds references, too: of kernels with options where it was measured to win, and of those that their blocks are like.

        A cap lost (head dim 64: 1.07 to 1.10 of the time, 128: 1.00 to 1.02), and so did windows in blocks of 64 keys (1.01 to 1.03).
        """
        if not options(spec).any:
            return True
        narrow = any(getattr(spec, flag) for flag in ("window", "varlen", "has_block_mask", *_HEAVY))
        width = max(self.block_d(spec), self.block_dv(spec))
        wide = width == 128 and not (spec.dropout or spec.has_attn_mask)
        return not spec.softcap and (wide or (width == 64 and not narrow))

    def carries_pairs(self, spec: AttentionSpec) -> bool:
        """Whether loops carry two probabilities a register: where one loop follows another, Triton 3.6 unpacks and packs each in both.

        The longest block 431 instead of 495 instructions at head dim 64 under a diagonal, 471 instead of 537 at 128 (ARCHITECTURE.md).
        """
        return spec.causal and not options(spec).any and max(self.block_d(spec), self.block_dv(spec)) <= 128

    def tensor_sums(self, spec: AttentionSpec) -> bool:
        """Whether there is a thread block of four warpgroups, whose row sums are products: of a plain kernel, since lse sums before rounding."""
        plain = not (options(spec).any or spec.has_lse)
        return plain and self.block_d(spec) == self.block_dv(spec) == 64

    def caps_in_exponents(self, spec: AttentionSpec) -> bool:
        """Whether a cap joins the exponents, where it takes fewer instructions: measured to gain at head dim 128, not at 64."""
        return options(spec).capped and self.block_d(spec) > 64

    def panels(self, spec: AttentionSpec) -> tuple[tuple[int, int], ...]:
        """(first column, columns) of the products that make up the scores: powers of two, as blocks must be.

        In steps of 64 columns, a swizzled row: of head dim 240 in steps of 16, Triton 3.6's ptxas (12.8) made code that reads a
        register nothing wrote (`sass.undefined_registers`), the defect of `AttentionSpec.block_head_dim_v`.
        """
        return ((0, 128), (128, 64)) if 128 < spec.head_dim <= 192 else ((0, self.block_d(spec)),)

    def signature(self, spec: AttentionSpec) -> Signature:
        return signature_of(spec)

    def q_stages_text(self, spec: AttentionSpec) -> str:
        """How many tiles of queries lie in shared memory, as `launch` computes it: two where they fit."""
        once, step = 2 * self.block_d(spec) + self.block_dv(spec), self.block_d(spec) + self.block_dv(spec)
        return f"2 if OWN_STAGING and BLOCK_M * {once} + STAGES * BLOCK_N * {step} <= {_TILE_ELEMENTS} else 1"

    def q_stages(self, spec: AttentionSpec, config: KernelConfig) -> int:
        """The same of a configuration."""
        if not config.OWN_STAGING:  # the output is staged in their memory
            return 1
        widths = self.block_d(spec), self.block_dv(spec)
        tiles = config.BLOCK_M * (2 * widths[0] + widths[1]) + config.STAGES * config.BLOCK_N * sum(widths)
        return 2 if tiles <= _TILE_ELEMENTS else 1

    def num_warps(self, spec: AttentionSpec, config: KernelConfig) -> int:
        return _WG_THREADS // 32  # of the first partition: one warpgroup

    def multiplying_warps(self, spec: AttentionSpec, config: KernelConfig) -> int:
        return int(config.BLOCK_M) // _WG_ROWS * (_WG_THREADS // 32)

    def boxes(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, tuple[int, ...]]:
        rows, keys = (1, 1, _WG_ROWS), (1, 1, int(config.BLOCK_N))
        width, width_v = self.block_d(spec), self.block_dv(spec)
        return {
            "q_desc": (*rows, width),
            "k_desc": (*keys, width),
            "v_desc": (*keys, width_v),
            "o_desc": (*rows, width_v),
        }

    def constants(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, Tunable | None]:
        found = options(spec)
        own: dict[str, Tunable | None] = {"BLOCK_D": self.block_d(spec), "BLOCK_DV": self.block_dv(spec)}
        own |= {"ONE_KIND": True} if spec.has_block_mask else {}
        own |= {"BRIEF": False} if found.any else {"MASKED_LOOP": False}
        own |= {"Q_STAGES": self.q_stages(spec, config)}
        own |= {"LATE": True} if found.late else {}
        own |= {"mask_lists_ptr": None} if found.tabled else {}
        return {**own, "PACK": 1, "EVEN_K": True}

    def brief(self, spec: AttentionSpec) -> dict[str, Tunable]:
        return {"BRIEF": True} if options(spec).any else {}

    def illegal(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None = None
    ) -> str | None:
        for name in ("OWN_STAGING", "LAZY_SUM", "TAKE_TURNS"):
            if not isinstance(config[name], bool):
                return f"{name}={config[name]!r} must be True or False"
        if config.BLOCK_M not in (2 * _WG_ROWS, 3 * _WG_ROWS, 4 * _WG_ROWS) or not _is_int(config.BLOCK_M):
            return f"BLOCK_M={config.BLOCK_M!r} must be 128, 192 or 256: 64 rows for each of two to four consumer warpgroups"
        if config.BLOCK_M == 4 * _WG_ROWS and not self.tensor_sums(spec):
            return (
                f"BLOCK_M={config.BLOCK_M}: four consumer warpgroups are for head dims up to 64 without lse and options"
            )
        if config.BLOCK_N not in _BLOCK_N or not _is_int(config.BLOCK_N):
            return f"BLOCK_N={config.BLOCK_N!r} must be one of {', '.join(map(str, _BLOCK_N))}"
        for name, (low, high) in (("STAGES", _STAGES), ("SECTION", _SECTION)):
            if not _is_int(config[name]) or not low <= int(config[name]) <= high:
                return f"{name}={config[name]!r} must be from {low} to {high}"
        return (
            self._illegal_registers(spec, target, config)
            or self._illegal_staging(spec, config)
            or self._illegal_memory(spec, target, config, facts)
        )

    def _illegal_registers(self, spec: AttentionSpec, target: Target, config: KernelConfig) -> str | None:
        low, high = _REGISTERS
        for name in ("CONSUMER_REGS", "PRODUCER_REGS"):
            value: Any = config[name]
            if not _is_int(value) or not low <= value <= high or value % 8:
                return f"{name}={value!r} must be a multiple of 8 from {low} to {high}"
        num_wg = config.BLOCK_M // _WG_ROWS
        # The producer's warp is padded to a warpgroup; every thread starts with an equal share, which is then traded.
        share = target.registers_per_sm // ((num_wg + 1) * _WG_THREADS) // 8 * 8
        first = share * (num_wg + 1) - config.CONSUMER_REGS * (num_wg - 1) - config.PRODUCER_REGS
        if first > high:
            return f"CONSUMER_REGS={config.CONSUMER_REGS} leaves the first warpgroup {first} registers a thread, more than {high}"
        if first < config.CONSUMER_REGS:
            return (
                f"{num_wg} warpgroups of CONSUMER_REGS={config.CONSUMER_REGS} and PRODUCER_REGS={config.PRODUCER_REGS} "
                f"need more than the {share * (num_wg + 1)} registers a thread of each can share"
            )
        # The accumulator, a block's scores in fp32 and in 16 bit, and what addresses and row statistics took when compiled.
        needed = _WG_ROWS * (2 * self.block_dv(spec) + 3 * config.BLOCK_N) // (2 * _WG_THREADS) + 30
        if needed > config.CONSUMER_REGS:
            return f"output, scores and probabilities of a consumer need about {needed} registers a thread, CONSUMER_REGS={config.CONSUMER_REGS}"
        return None

    def _illegal_staging(self, spec: AttentionSpec, config: KernelConfig) -> str | None:
        if not config.OWN_STAGING and self.block_d(spec) != self.block_dv(spec):
            return "OWN_STAGING=False stages the output in q's memory, which has another width here"
        if not config.OWN_STAGING and options(spec).hides:
            return "OWN_STAGING=False stages the output in q's memory, which is needed till the end where a mask hides keys"
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
        """Shared memory of a thread block: tiles, barriers, and at most 512 bytes of arguments that partitions are handed.

        Tiles come in multiples of 4 KB and the limit leaves 3 KB over, so that the bound decides as the exact figure does.
        """
        num_wg = config.BLOCK_M // _WG_ROWS
        queries = self.q_stages(spec, config)
        columns = queries * self.block_d(spec) + (self.block_dv(spec) if config.OWN_STAGING else 0)
        tiles = config.BLOCK_M * columns + config.STAGES * config.BLOCK_N * (self.block_d(spec) + self.block_dv(spec))
        barriers = 2 * queries * num_wg + 4 * config.STAGES + 2
        tiles += 8 * config.BLOCK_N if num_wg == 4 else 0  # ones
        return int(tiles * spec.itemsize + 8 * barriers + _ARGUMENT_BYTES)

    def default(self, spec: AttentionSpec, target: Target) -> KernelConfig:
        known = self.known_good(spec, target)
        if known:
            return known[0].config
        return self.config(
            BLOCK_M=128, BLOCK_N=32, STAGES=2, CONSUMER_REGS=240, PRODUCER_REGS=24, SECTION=4, OWN_STAGING=True, LAZY_SUM=True,
            TAKE_TURNS=False,
        )  # fmt: skip

    def keeps_beside_scores(self, spec: AttentionSpec) -> bool:
        """Whether a plain kernel's tile says nothing: its sections, where nothing is masked, took up to 1.18 of the time with a cap at head dim 128 (H200)."""
        return options(spec).any

    def _with_options(self, spec: AttentionSpec) -> list[tuple[_Knobs, str]]:
        """Tiles known for a spec's options, best first."""
        width = max(self.block_d(spec), self.block_dv(spec))
        first = [row for flag, row in _WITH_OPTIONS[width].items() if getattr(spec, flag)]
        program = spec.mods.program if spec.mods else None
        if first == [_WITH_OPTIONS[64]["has_mask_mod"]] and program and program.mask_reads:
            first.insert(0, (_DEEP_64, _H200_TABLES))
        hidden = spec.has_mask_mod or spec.has_block_mask
        if width == 128 and program and program.gathers_scores and (hidden or program.gathers_by_expression):
            # Addresses and elements of a wide tile's pairs leave no registers; at (q_idx, kv_idx) without a mask the wide one took 0.86
            # of the time. Not timed: with a BlockMask at (q_idx, kv_idx).
            first.insert(0, (_NARROW_128, _H200_GATHERED))
        if width == 64 and sum(getattr(spec, flag) for flag in _HEAVY) > 1:
            first.insert(0, (_ROOMY_64, _COMPILED))
        return first

    def known_good(self, spec: AttentionSpec, target: Target) -> tuple[KnownGood, ...]:
        width = max(self.block_d(spec), self.block_dv(spec))
        first = self._with_options(spec)
        rows = tuple(dict([*first, *_PORTFOLIO[width]] if options(spec).any else _PLAIN[width]).items())
        names = [knob.name for knob in self.knobs]
        known = (
            KnownGood(config=self.config(**dict(zip(names, values, strict=True))), source=source)
            for values, source in rows
        )
        return self.legal(known, spec, target)


def _is_int(value: Tunable) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
