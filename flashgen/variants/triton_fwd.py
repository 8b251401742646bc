"""The portable forward: one `tl.dot` kernel for every architecture that Triton compiles for."""

from __future__ import annotations

from typing import Any

from flashgen.config import KernelConfig, Tunable
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import triton_fwd_tiles
from flashgen.variants.base import Knob, KnownGood, MeasuredTile, ResourceFacts, Variant, head_dims
from flashgen.variants.features import FEATURES
from flashgen.variants.mod_text import WithMods

_BLOCK_LIMITS = (16, 256)
_WARPS = (1, 2, 4, 8, 16)
_STAGES = (1, 8)

# What the template knows, in the words of the spec's flags.
_COVERED_FLAGS = frozenset({"causal", "has_lse", "has_score_mod", "has_mask_mod", *FEATURES})


class TritonForward(WithMods, Variant):
    """`templates/triton/attention_fwd.py.jinja`: pointer loads, masked blocks peeled, any head dim, any strides."""

    name = "triton_fwd"
    op = "attention_fwd"
    backend = "triton"
    template = "triton/attention_fwd.py.jinja"
    knobs = (
        Knob(name="BLOCK_M", values=(32, 64, 128, 256), meaning="query rows of one program"),
        Knob(name="BLOCK_N", values=(16, 32, 64, 128), meaning="keys of one step of the inner loop"),
        Knob(name="num_warps", values=(4, 8), meaning="warps of one program"),
        Knob(name="num_stages", values=(2, 3, 4), meaning="depth of the software pipeline over keys"),
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

    def kernels(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, dict[str, Tunable | None]]:
        # A block mask's blocks are usually such that tiles divide them.
        kind: dict[str, Tunable | None] = {"ONE_KIND": True} if spec.has_block_mask else {}
        return {self.op: {**head_dims(spec), **config, **kind}}

    def illegal(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None = None
    ) -> str | None:
        low, high = _BLOCK_LIMITS
        for name in ("BLOCK_M", "BLOCK_N"):
            value: Any = config[name]
            # tl.arange wants powers of two, tl.dot at least 16 on each side.
            if not _is_int(value) or not low <= value <= high or value & (value - 1):
                return f"{name}={value!r} must be a power of two from {low} to {high}"
        # Triton takes powers of two only; 32 warps are the hardware's limit of a block, 16 is where registers run out.
        if not _is_int(config.num_warps) or config.num_warps not in _WARPS:
            return f"num_warps={config.num_warps!r} must be one of {', '.join(map(str, _WARPS))}"
        if not _is_int(config.num_stages) or not _STAGES[0] <= config.num_stages <= _STAGES[1]:
            return f"num_stages={config.num_stages!r} must be from {_STAGES[0]} to {_STAGES[1]}"
        # Fewer than 8 rows a warp leaves warps computing the same products twice: never the best on any surface read.
        if 8 * config.num_warps > config.BLOCK_M and config.num_warps > 4:
            return (
                f"BLOCK_M={config.BLOCK_M} is too small for num_warps={config.num_warps}: at least 8 query rows a warp"
            )
        # fp32 accumulators alone beyond 255 registers a thread cannot be held: the compiler would live in spills.
        accumulator = config.BLOCK_M * (spec.block_head_dim_v + config.BLOCK_N) // (config.num_warps * target.warp_size)
        if accumulator > 512:
            return f"accumulators need {accumulator} registers a thread (output and score tiles), twice what exists"
        operands = _fp32_operands(spec, config, target.warp_size)
        if operands > 1024:
            # Compiled for sm_80 and sm_90: from 768 on such a tile spills, beyond 1024 thousands of times, a minute to compile.
            return f"fp32 operands of one thread's products are {operands} values, four times the registers that exist"
        if facts is not None and facts.undefined_registers:
            return f"ptxas miscompiled it: {facts.undefined_registers} instructions read registers that nothing wrote"
        if facts is not None and facts.smem_bytes > target.smem_bytes:
            return f"needs {facts.smem_bytes} bytes of shared memory, {target.name} has {target.smem_bytes} a block"
        if facts is None and self._least_smem(spec, config) > target.smem_bytes:
            return (
                f"needs at least {self._least_smem(spec, config)} bytes of shared memory for the key and value stages, "
                f"{target.name} has {target.smem_bytes} a block"
            )
        return None

    def default(self, spec: AttentionSpec, target: Target) -> KernelConfig:
        for known in self.known_good(spec, target):
            if self.illegal(spec, target, known.config) is None:
                return known.config
        return self.config(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2)

    def known_good(self, spec: AttentionSpec, target: Target) -> tuple[KnownGood, ...]:
        key = self._key(spec, target)
        rows = triton_fwd_tiles.KNOWN_GOOD[key]
        if (spec.head_dim, spec.head_dim_v) != (spec.block_head_dim, spec.block_head_dim_v):
            rows = (*triton_fwd_tiles.PADDED.get(key, ()), *rows)
        if target.smem_bytes <= triton_fwd_tiles.SMALL_SMEM_BYTES:
            rows = (*triton_fwd_tiles.SMALL_SMEM.get(key, ()), *rows)
        if spec.has_mask_mod or spec.has_block_mask:
            rows = (*triton_fwd_tiles.FREE_MASK.get(key, ()), *rows)
        if self.keeps_beside_scores(spec):
            rows = (*triton_fwd_tiles.BESIDE_SCORES[key[1:]], *rows)
            if key[0] in ("sm_80", "sm_120"):
                rows = (*triton_fwd_tiles.BESIDE_SCORES_MMA.get(key[1:], ()), *rows)
        return tuple(KnownGood(config=self._tile(tile), source=source) for tile, source in dict(rows).items())

    def keeps_beside_scores(self, spec: AttentionSpec) -> bool:
        return spec.hides_anywhere or spec.dropout

    def score_parts(self, spec: AttentionSpec) -> int:
        """In how many parts columns are summed to a score. CUDA cores add one after the other: at head dim 256 an H200 left the budget by a quarter."""
        return spec.block_head_dim // 64 if spec.itemsize == 4 and spec.block_head_dim > 128 else 1

    def measured_tiles(self, spec: AttentionSpec, target: Target) -> tuple[MeasuredTile, ...]:
        rows = triton_fwd_tiles.MEASURED.get(self._key(spec, target), ())
        return tuple(
            MeasuredTile(config=self._tile(tile), seqlen=seqlen, causal=causal, source=triton_fwd_tiles.MEASURED_SOURCE)
            for seqlen, causal, tile in rows
        )

    @staticmethod
    def _key(spec: AttentionSpec, target: Target) -> triton_fwd_tiles.Key:
        return triton_fwd_tiles.key(target, spec.itemsize, max(spec.block_head_dim, spec.block_head_dim_v))

    def _tile(self, tile: triton_fwd_tiles.Tile) -> KernelConfig:
        block_m, block_n, num_warps, num_stages = tile
        return self.config(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)

    @staticmethod
    def _least_smem(spec: AttentionSpec, config: KernelConfig) -> int:
        # Two loops (unmasked, masked) never overlap, so one set of stages; the last stage may live in registers.
        stages = max(1, config.num_stages - 1)
        return int(stages * config.BLOCK_N * (spec.block_head_dim + spec.block_head_dim_v) * spec.itemsize)


def _fp32_operands(spec: AttentionSpec, config: KernelConfig, warp_size: int) -> int:
    """Values of q and k that one thread multiplies for its scores on the CUDA cores; 0 where tensor cores do it."""
    if spec.itemsize == 2:
        return 0
    scores = max(1, config.BLOCK_M * config.BLOCK_N // (config.num_warps * warp_size))
    rows = 1 << ((scores.bit_length() - 1) // 2)
    return int((rows + scores // rows) * max(spec.block_head_dim, spec.block_head_dim_v))


def _is_int(value: Tunable) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
