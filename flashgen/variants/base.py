"""What every variant descriptor is: a template, the specs it supports, and the one predicate that says what is legal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Literal, Protocol

from flashgen.config import KernelConfig, Tunable
from flashgen.errors import InvalidProblemError
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec, Op
from flashgen.target import Target
from flashgen.variants.features import Signature, signature


class ResourceFacts(Protocol):
    """The part of the compiler's facts that legality needs (see `flashgen.facts.CompiledFacts`)."""

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one thread block."""

    @property
    def undefined_registers(self) -> int:
        """Instructions that read a register nothing wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One tunable.

    Attributes:
        name: as the launch takes it.
        values: that the space enumerates.
        meaning: in words.
        compiled: whether each value is a binary of its own; else it is an argument of the launch.
    """

    name: str
    values: tuple[Tunable, ...]
    meaning: str
    compiled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownGood:
    """A tile that somebody measured, or ships as a default, with its source."""

    config: KernelConfig
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTile:
    """The winner of one measured problem of this kind of kernel, on the same family of architecture, dtype width and head dim.

    Attributes:
        config: the tile.
        seqlen: of the problem's keys.
        causal: whether it masked the future.
        source: where the measurement stands.
        own: whether it is of the variant's own kernel (a shipped row), not of another plain kernel.
    """

    config: KernelConfig
    seqlen: int
    causal: bool
    source: str
    own: bool = False


def head_dims(spec: AttentionSpec) -> dict[str, Tunable]:
    """The compile-time head dims that every kernel takes."""
    return {
        "HEAD_DIM": spec.head_dim,
        "HEAD_DIM_V": spec.head_dim_v,
        "BLOCK_D": spec.block_head_dim,
        "BLOCK_DV": spec.block_head_dim_v,
    }


class Variant:
    """A recipe. Subclasses set the class attributes and override the four questions.

    Attributes:
        name: key in configs, database and `explain`.
        op: the operation it computes.
        backend: which `backend=` of `attention()` selects it.
        template: path below `templates/`, or None when the variant is no generated kernel.
        knobs: the tunables; their product, filtered by `illegal`, is the search space.
        modelled: whether the cost model can rank its configurations; if not, it only vetoes, and `known_good` is the order.
    """

    name: ClassVar[str]
    op: ClassVar[Op]
    backend: ClassVar[Literal["gluon", "triton", "torch"]]
    template: ClassVar[str | None] = None
    knobs: ClassVar[tuple[Knob, ...]] = ()
    modelled: ClassVar[bool] = True

    def supports(self, spec: AttentionSpec, target: Target) -> str | None:
        """None, or the reason why this variant cannot compute `spec` on `target`."""
        raise NotImplementedError

    def refuses(self, problem: Problem) -> str | None:
        """None, or the reason why one call's tensors keep this variant from running a spec that it supports."""
        return None

    def illegal(
        self, spec: AttentionSpec, target: Target, config: KernelConfig, facts: ResourceFacts | None = None
    ) -> str | None:
        """None, or the reason why `config` may not run: the one predicate that tuner, dispatch and `explain` share.

        Args:
            spec: what is compiled.
            target: where.
            config: the knobs.
            facts: the compiler's facts where known; only they decide exactly whether shared memory fits.
        """
        raise NotImplementedError

    def default(self, spec: AttentionSpec, target: Target) -> KernelConfig:
        """The configuration of a call for which nothing was tuned."""
        raise NotImplementedError

    def known_good(self, spec: AttentionSpec, target: Target) -> tuple[KnownGood, ...]:
        """Tiles with a source, best first; the only ones a prediction may pick."""
        return ()

    def legal(self, known: Iterable[KnownGood], spec: AttentionSpec, target: Target) -> tuple[KnownGood, ...]:
        """Those tiles that this spec can have: each was measured at one pair of head dims, and options take memory and registers, too."""
        return tuple(one for one in known if self.illegal(spec, target, one.config) is None)

    def boxes(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, tuple[int, ...]]:
        """Blocks of the TMA descriptors that the kernel takes, by parameter; none where it takes pointers."""
        return {}

    def fp32_boxes(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, tuple[int, ...]]:
        """The same of descriptors of fp32 numbers in plain order, which no product reads."""
        return {}

    def num_warps(self, spec: AttentionSpec, config: KernelConfig) -> int:
        """Warps that a launch asks for: of the program, or of its first partition."""
        return int(config.num_warps)

    def multiplying_warps(self, spec: AttentionSpec, config: KernelConfig) -> int:
        """Warps that issue products."""
        return self.num_warps(spec, config)

    def loop_columns(self, spec: AttentionSpec) -> int:
        """Columns of a tile's products that the main loop multiplies at least: a backward's scores again, dp, dv and dk."""
        # Gluon kernels leave out columns of padding where they can.
        gluon = self.backend == "gluon"
        columns = spec.head_dim + spec.head_dim_v if gluon else spec.block_head_dim + spec.block_head_dim_v
        return 2 * columns if spec.op == "attention_bwd" else columns

    def constants(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, Tunable | None]:
        """Compile-time arguments besides the knobs, as an aligned call with whole blocks has them; of a pointer that it leaves out, None."""
        return {}

    def kernels(self, spec: AttentionSpec, config: KernelConfig) -> dict[str, dict[str, Tunable | None]]:
        """The jit functions that `launch` calls, each with its compile-time arguments; the first has the main loop.

        A pointer that is None in the usual call is one of them.
        """
        return {self.op: {**head_dims(spec), **config}}

    def signature(self, spec: AttentionSpec) -> Signature:
        """The arguments that a spec's options add to the launch and to the kernels."""
        return signature(spec)

    def mask_tiles(self, config: KernelConfig) -> dict[str, tuple[int, int]]:
        """(queries, keys) of the tiles that masks are judged for: `keys` of each block of queries, `rows` of each block of keys.

        `lists`, where it is given, is the tile of a block mask's lists of keys, else `keys` is; `words` stands for `keys` where a kernel looks up
        masked tiles (`block_ranges.looked_up`).
        """
        return {"rows" if self.op == "attention_bwd" else "keys": (int(config.BLOCK_M), int(config.BLOCK_N))}

    def keeps_beside_scores(self, spec: AttentionSpec) -> bool:
        """Whether a spec's options need registers or shared memory for every score, so that a plain kernel's tile says nothing."""
        return False

    def launch_options(self, problem: Problem) -> dict[str, Any]:
        """What `launch` takes of a call besides the scale, the offset and the tunables."""
        return {}

    def brief(self, spec: AttentionSpec) -> dict[str, Tunable]:
        """What `launch` takes besides to run a form that gives the same bits, slower, and compiles quickly; nothing where there is none."""
        return {}

    def unordered(self, problem: Problem) -> tuple[str, ...]:
        """Outputs of `launch` that are summed in no fixed order: their last bits may differ from launch to launch.

        None where `problem.deterministic` is asked for: a variant that cannot order its sums `refuses` it.
        """
        return ()

    def measured_tiles(self, spec: AttentionSpec, target: Target) -> tuple[MeasuredTile, ...]:
        """Winners measured elsewhere for the same family of architecture, dtype width and padded head dim."""
        return ()

    def config(self, **tunables: Tunable) -> KernelConfig:
        """A config of this variant."""
        return KernelConfig(variant=self.name, **tunables)

    def space(self, spec: AttentionSpec, target: Target) -> tuple[KernelConfig, ...]:
        """Every legal config, in a fixed order."""
        names = [knob.name for knob in self.knobs]
        points = (
            self.config(**dict(zip(names, values, strict=True))) for values in product(*(k.values for k in self.knobs))
        )
        return tuple(config for config in points if self.illegal(spec, target, config) is None)

    def parse_config(
        self, given: KernelConfig | Mapping[str, Tunable], spec: AttentionSpec, target: Target
    ) -> KernelConfig:
        """The user's `config=` as a checked KernelConfig.

        Raises:
            InvalidProblemError: unknown, missing or illegal tunables, or another variant's config.
        """
        if isinstance(given, KernelConfig) and given.variant != self.name:
            raise InvalidProblemError(f"config is one of variant {given.variant!r}, but this call runs {self.name!r}.")
        names = {knob.name for knob in self.knobs}
        unknown, missing = sorted(set(given) - names), sorted(names - set(given))
        if unknown or missing:
            parts = (("has unknown tunables", unknown), ("lacks", missing))
            wrong = " and ".join(f"{verb} {', '.join(which)}" for verb, which in parts if which)
            raise InvalidProblemError(f"config for {self.name} {wrong}: it takes exactly {', '.join(sorted(names))}.")
        config = self.config(**dict(given))
        reason = self.illegal(spec, target, config)
        if reason is not None:
            raise InvalidProblemError(
                f"config {config.label} is not legal for {spec.key} on {target.name}: {reason}. "
                "See `flashgen show spaces` for the legal values."
            )
        return config
