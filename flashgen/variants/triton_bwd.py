"""The portable backward: three `tl.dot` kernels without atomics, for every architecture that Triton compiles for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashgen.config import KernelConfig, Tunable
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants.base import Knob, KnownGood, ResourceFacts, Variant, head_dims
from flashgen.variants.features import FEATURES, Signature, signature
from flashgen.variants.mod_text import WithMods
from flashgen.variants.triton_fwd_tiles import family

_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_M_DQ", "BLOCK_N_DQ")
_BLOCK_LIMITS = (16, 256)
_WARPS = (1, 2, 4, 8, 16)
_STAGES = (1, 8)

# What the template knows, in the words of the spec's flags.
_COVERED_FLAGS = frozenset({"causal", "has_score_mod", "has_mask_mod", *FEATURES})
# What its loops take of each option, of one query head; sinks meet no loop.
_INNER = {
    "window": ("window_left", "window_right"),
    "softcap": ("softcap",),
    "has_alibi": ("slope", "seqlen_k"),
    "has_bias": ("bias_ptr", "stride_bias_m", "stride_bias_n", "seqlen_k"),
    "has_attn_mask": ("attn_mask_ptr", "stride_attn_mask_m", "stride_attn_mask_n", "seqlen_k"),
    "has_block_mask": ("block_kinds_ptr", "stride_block_kinds_m", "block_size_q", "block_size_k", "seqlen_k"),
    "dropout": ("philox_ptr", "off_bh", "dropout_threshold", "dropout_scale"),
}
# The loop over the query heads of a group has its own words for some.
_IN_GROUP = {
    "off_bh": "head",
    "bias_ptr": "bias_ptr + off_b * stride_bias_b + off_h * stride_bias_h",
    "attn_mask_ptr": "attn_mask_ptr + off_b * stride_attn_mask_b + off_h * stride_attn_mask_h",
    "block_kinds_ptr": "block_kinds_ptr + off_b * stride_block_kinds_b + off_h * stride_block_kinds_h",
}
# Tables of one of the two kernels: what keys walk over, and what rows do.
_OF_ROWS = ("row_ranges", "row_blocks", "row_counts")
_OF_KEYS = ("mask_ranges", "key_blocks", "key_counts", "ranges")

# (BLOCK_M, BLOCK_N, BLOCK_M_DQ, BLOCK_N_DQ, num_warps, num_stages)
_Tile = tuple[int, int, int, int, int, int]

# torch/_inductor/template_heuristics/triton.py; most of its tiles spill in the loop of dK/dV when this kernel is compiled with them.
_FLEX = "default tile of FlexAttention's backward in PyTorch 2.13"
_COMPILED = "never timed: of the tiles compiled, the largest whose loops do not spill with Triton 3.6 and 3.9"
_FITS = "never timed: of the tiles compiled, the one that fits and spills least in its loops"
_ANY = "for the interpreter: few programs"

# By (family of architecture, padded head dim), of 16-bit kernels; best first.
_KNOWN_GOOD: dict[tuple[str, int], tuple[tuple[_Tile, str], ...]] = {
    ("sm_90", 64): (((64, 128, 128, 64, 8, 3), _FLEX),),
    ("sm_90", 128): (((32, 128, 128, 64, 8, 2), _COMPILED),),
    ("sm_90", 256): (((32, 64, 64, 32, 8, 2), _FITS),),
    ("sm_100", 64): (((64, 128, 128, 64, 8, 2), _COMPILED),),
    ("sm_100", 128): (((64, 128, 128, 64, 8, 2), _COMPILED),),
    ("sm_100", 256): (((32, 64, 64, 32, 8, 1), _FITS),),
    ("sm_120", 64): (((32, 128, 128, 32, 8, 2), _COMPILED),),
    ("sm_120", 128): (((32, 64, 64, 32, 8, 2), _COMPILED),),
    ("sm_120", 256): (((16, 64, 64, 16, 8, 1), _FITS),),
    ("sm_80", 64): (((64, 128, 128, 64, 8, 2), _COMPILED),),
    ("sm_80", 128): (((32, 128, 128, 32, 8, 2), _COMPILED),),
    ("sm_80", 256): (((16, 64, 64, 16, 8, 1), _FITS),),
    ("gfx942", 64): (((64, 64, 64, 64, 8, 1), _COMPILED),),
    ("gfx942", 128): (((64, 64, 64, 64, 4, 1), _COMPILED),),
    ("gfx942", 256): (((32, 64, 64, 32, 4, 1), _FITS),),
}
# Go first where an option keeps values beside every score.
_BESIDE_SCORES: dict[tuple[str, int], tuple[tuple[_Tile, str], ...]] = {
    ("cuda", 64): (((32, 64, 64, 32, 8, 1), _COMPILED),),
    ("cuda", 128): (((32, 64, 64, 32, 8, 1), _COMPILED),),
    ("sm_90", 64): (((64, 128, 128, 64, 8, 2), _COMPILED),),
    ("sm_90", 128): (((32, 128, 128, 64, 8, 1), _COMPILED),),
    ("hip", 64): (((32, 64, 64, 32, 8, 1), _COMPILED),),
    ("hip", 128): (((32, 64, 64, 32, 4, 1), _COMPILED),),
}
# Go before those where three options or more do: 16 rows at a time.
_MANY = 3
_BESIDE_MANY: dict[tuple[str, int], tuple[tuple[_Tile, str], ...]] = {
    ("sm_80", 64): (((16, 64, 64, 32, 8, 1), _COMPILED),),
    ("sm_90", 64): (((16, 128, 128, 32, 8, 1), _COMPILED),),
    ("sm_90", 128): (((16, 128, 128, 64, 8, 1), _COMPILED),),
}
# Go first for packed sequences, whose lengths stay in registers.
_PACKED: dict[tuple[str, int], tuple[tuple[_Tile, str], ...]] = {
    ("sm_80", 128): (((32, 64, 64, 32, 8, 1), _COMPILED),),
}
# fp32 is multiplied on the CUDA cores in full precision: everything larger spills.
_FP32: _Tile = (16, 16, 16, 16, 4, 1)


class TritonBackward(WithMods, Variant):
    """`templates/triton/attention_bwd.py.jinja`: dK/dV and dQ apart, so that nothing is added atomically; any head dim."""

    name = "triton_bwd"
    op = "attention_bwd"
    backend = "triton"
    template = "triton/attention_bwd.py.jinja"
    modelled = False
    knobs = (
        Knob(name="BLOCK_M", values=(32, 64), meaning="query rows of one step of dK/dV"),
        Knob(name="BLOCK_N", values=(64, 128), meaning="keys of one program of dK/dV"),
        Knob(name="BLOCK_M_DQ", values=(64, 128), meaning="query rows of one program of dQ"),
        Knob(name="BLOCK_N_DQ", values=(32, 64), meaning="keys of one step of dQ"),
        Knob(name="num_warps", values=(4, 8), meaning="warps of one program"),
        Knob(name="num_stages", values=(1, 2, 3), meaning="depth of the software pipelines over rows and over keys"),
    )

    def supports(self, spec: AttentionSpec, target: Target) -> str | None:
        if spec.op != self.op:
            return f"computes {self.op}, not {spec.op}"
        missing = [flag for flag in spec.flags if flag not in _COVERED_FLAGS]
        if missing:
            return f"{', '.join(missing)}: not covered by this kernel yet"
        if target.backend == "cuda" and target.capability < 80:
            return (
                f"needs compute capability 8.0 or newer (bf16 and asynchronous copies); {target.name} is {target.arch}"
            )
        return None

    def signature(self, spec: AttentionSpec) -> Signature:
        """The arguments that a spec's options add to dK/dV and dQ, for the template."""
        found = signature(replace(spec, has_sinks=False))
        inner = dict.fromkeys(name for flag, names in _INNER.items() if flag in spec.flags for name in names)
        if spec.mods is not None:
            inner |= dict.fromkeys(("b", "h", *spec.mods.program.parameters))
        if spec.modifies_scores:
            inner = {"sm_scale": None, **inner}
        return replace(found, launch=signature(spec).launch, inner=tuple(inner))

    def of_kernel(self, added: Signature, walks: str) -> Signature:
        """The part of a signature for the kernel that walks over `rows` (dK/dV) or over `keys` (dQ)."""
        others = _OF_KEYS if walks == "rows" else _OF_ROWS

        def kept(names: Mapping[str, str]) -> dict[str, str]:
            return {name: x for name, x in names.items() if _table(name) not in others}

        return replace(added, pointers=kept(added.pointers), strides=kept(added.strides))

    def asks_seqlen_q(self, spec: AttentionSpec) -> bool:
        """Whether dQ's loop counts rows to their end."""
        return bool(spec.has_alibi or spec.has_attn_mask or spec.has_bias or spec.mods)

    def mask_tiles(self, config: KernelConfig) -> dict[str, tuple[int, int]]:
        return {
            "rows": (int(config.BLOCK_M), int(config.BLOCK_N)),
            "keys": (int(config.BLOCK_M_DQ), int(config.BLOCK_N_DQ)),
        }

    def launch_options(self, problem: Problem) -> dict[str, Any]:
        return {"deterministic": problem.deterministic} if self.gradient_sums(problem.spec) else {}

    def unordered(self, problem: Problem) -> tuple[str, ...]:
        return () if problem.deterministic else tuple(f"d{name}" for name in self.gradient_sums(problem.spec))

    def in_group(self, name: str) -> str:
        """What the loop over a group's query heads passes for an argument of its inner loop."""
        return _IN_GROUP.get(name, name)

    def kernels(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, dict[str, Tunable | None]]:
        dims = {**head_dims(spec), "BLOCK_D": spec.block_head_dim_out}
        # A bias of every score, whose gradient is wanted; a block mask of blocks that tiles divide.
        usual = {"BIAS_ROWS": True, "BIAS_KEYS": True, "SUM_BIAS": 4, "SUMS": 1, "WRITES_DQ": True}
        sums = {name: usual[name] for name in self.sum_constants(spec)}
        kind: dict[str, Tunable | None] = {"ONE_KIND": True} if spec.has_block_mask else {}
        value_dims = {name: dims[name] for name in ("HEAD_DIM_V", "BLOCK_DV")}
        return {
            "attention_bwd_dkdv": {**dims, **kind, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N},
            "attention_bwd_dq": {**dims, **kind, **sums, "BLOCK_M": config.BLOCK_M_DQ, "BLOCK_N": config.BLOCK_N_DQ},
            # Few calls bring a gradient of lse.
            "attention_bwd_preprocess": {**value_dims, "BLOCK_M": config.BLOCK_M, "dlse_ptr": None},
        }

    def illegal(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None = None
    ) -> str | None:
        low, high = _BLOCK_LIMITS
        for name in _BLOCKS:
            value: Any = config[name]
            # tl.arange wants powers of two, tl.dot at least 16 on each side.
            if not _is_int(value) or not low <= value <= high or value & (value - 1):
                return f"{name}={value!r} must be a power of two from {low} to {high}"
        if not _is_int(config.num_warps) or config.num_warps not in _WARPS:
            return f"num_warps={config.num_warps!r} must be one of {', '.join(map(str, _WARPS))}"
        if not _is_int(config.num_stages) or not _STAGES[0] <= config.num_stages <= _STAGES[1]:
            return f"num_stages={config.num_stages!r} must be from {_STAGES[0]} to {_STAGES[1]}"
        for rows in ("BLOCK_N", "BLOCK_M_DQ"):
            # Fewer than 8 rows of results a warp leaves warps computing the same products twice.
            if 8 * config.num_warps > config[rows] and config.num_warps > 4:
                return f"{rows}={config[rows]} is too small for num_warps={config.num_warps}: at least 8 of them a warp"
        threads, dims = config.num_warps * target.warp_size, (spec.block_head_dim_out, spec.block_head_dim_v)
        # fp32 accumulators and two tiles of scores; beyond 512 a thread twice the registers that exist: it lives in spills.
        dkdv = config.BLOCK_N * (sum(dims) + 2 * config.BLOCK_M) // threads
        dq = config.BLOCK_M_DQ * (dims[0] + 2 * config.BLOCK_N_DQ) // threads
        for what, registers in (("dK/dV", dkdv), ("dQ", dq)):
            if registers > 512:
                return f"accumulators of {what} need {registers} registers a thread, twice what exists"
        if facts is not None and facts.undefined_registers:
            return f"ptxas miscompiled it: {facts.undefined_registers} instructions read registers that nothing wrote"
        if facts is not None and facts.smem_bytes > target.smem_bytes:
            return f"needs {facts.smem_bytes} bytes of shared memory, {target.name} has {target.smem_bytes} a block"
        if facts is None and (least := _least_smem(spec, config)) > target.smem_bytes:
            return f"needs at least {least} bytes of shared memory, {target.name} has {target.smem_bytes} a block"
        return None

    def default(self, spec: AttentionSpec, target: Target) -> KernelConfig:
        for known in self.known_good(spec, target):
            if self.illegal(spec, target, known.config) is None:
                return known.config
        return self._tile(_FP32)

    def known_good(self, spec: AttentionSpec, target: Target) -> tuple[KnownGood, ...]:
        if target.backend == "cpu":
            rows: tuple[tuple[_Tile, str], ...] = (((64, 64, 64, 64, 4, 1), _ANY),)
        elif spec.itemsize == 4:
            rows = ((_FP32, f"{_FLEX}, for fp32"),)
        else:
            widest = max(spec.block_head_dim_out, spec.block_head_dim_v)
            rows = _KNOWN_GOOD[(family(target), widest)]
            options = sum(flag in _INNER or flag == "has_score_mod" for flag in spec.flags)
            tables = [_PACKED] if spec.varlen else []
            # What a mask_mod reads is not kept beside the scores of unmasked blocks: on sm_90 the usual tiles hold it.
            beside = options > 0 if family(target) == "sm_90" else self.keeps_beside_scores(spec)
            tables += [_BESIDE_SCORES] if beside else []
            tables += [_BESIDE_MANY] if options >= _MANY else []
            for table in tables:
                known = table.get((family(target), widest)) or table.get((target.backend, widest), ())
                rows = (*known, *rows)
        return tuple(KnownGood(config=self._tile(tile), source=source) for tile, source in rows)

    def keeps_beside_scores(self, spec: AttentionSpec) -> bool:
        return bool(signature(spec).inner)

    def _tile(self, tile: _Tile) -> KernelConfig:
        names = (*_BLOCKS, "num_warps", "num_stages")
        return self.config(**dict(zip(names, tile, strict=True)))


def _least_smem(spec: AttentionSpec, config: KernelConfig) -> int:
    """The stages of the loops; the last stage may live in registers."""
    stages = max(1, config.num_stages - 1)
    step = max(config.BLOCK_M, config.BLOCK_N_DQ)
    return int(stages * step * (spec.block_head_dim_out + spec.block_head_dim_v) * spec.itemsize)


def _table(name: str) -> str:
    """Which table a parameter is about, of `row_blocks_ptr` or `stride_row_blocks_n`."""
    return name.removesuffix("_ptr") if name.endswith("_ptr") else name.removeprefix("stride_").rpartition("_")[0]


def _is_int(value: Tunable) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
