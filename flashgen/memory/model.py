"""A model's attention layers, counted kind by kind with the tile that a call would run, and added up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flashgen import dispatch
from flashgen.coverage import generated, uncovered
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.memory.account import Account, Tile, account
from flashgen.presets import find
from flashgen.problem import Problem
from flashgen.target import Target

# Options of a problem, switched off: what is left is plain attention, causal or not.
_PLAIN = {
    "window_size": (-1, -1), "softcap": 0.0, "has_alibi": False, "has_sinks": False, "has_bias": False, "has_attn_mask": False,
    "has_score_mod": False, "has_mask_mod": False, "has_block_mask": False, "dropout_p": 0.0, "varlen": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAccount:
    """One kind of layers.

    Attributes:
        kind: its name in the preset.
        count: layers of this kind in the model.
        account: of one layer.
        config_source: where the tile comes from, as in `explain`.
        uncovered: options that no kernel covers yet; then these layers run in the torch backend, and the account is of the
            tiled kernel that would cover them, with the tile of the same attention without these options.
    """

    kind: str
    count: int
    account: Account
    config_source: str
    uncovered: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAccount:
    """All attention layers of a model at one length, one forward.

    Attributes:
        preset, seqlen, batch, target, train: what was asked.
        layers: by kind.
    """

    preset: str
    seqlen: int
    batch: int
    target: str
    train: bool
    layers: tuple[LayerAccount, ...]

    def total(self, figure: Callable[[Account], int]) -> int:
        """A figure of every layer, added up: traffic, or what is saved for the backward."""
        return sum(row.count * figure(row.account) for row in self.layers)

    def largest(self, figure: Callable[[Account], int]) -> int:
        """A figure of the layer with most of it: what layers that run one after another need at once."""
        return max((figure(row.account) for row in self.layers), default=0)

    @property
    def flash_memory(self) -> int:
        """Bytes of attention at once: all that is saved where training, else the largest layer's live bytes."""
        return self._memory(lambda a: a.flash.saved, lambda a: a.flash.live)

    @property
    def materialised_memory(self) -> int:
        """As `flash_memory`; training, the last layer's scores live beside what all have saved."""
        return self._memory(lambda a: a.materialised.saved, lambda a: a.materialised.live)

    def _memory(self, saved: Callable[[Account], int], live: Callable[[Account], int]) -> int:
        if not self.train:
            return self.largest(live)
        # The layer that runs last has its live bytes beside what the others saved.
        return self.total(saved) + self.largest(lambda one: max(0, live(one) - saved(one)))


def of_model(
    preset: str, *, seqlen: int | None = None, target: Target, batch: int | None = None, train: bool = False
) -> ModelAccount:
    """Count a preset's attention layers.

    Args:
        preset: `name`, or `name/kind` for one kind of its layers.
        seqlen: the model's length; None for the preset's own. Kinds with a length of their own keep it.
        target: the GPU.
        batch: None for the preset's own.
        train: also what the backward needs.

    Raises:
        InvalidProblemError: unknown preset or kind, a length below 1, or a target without kernels.
        UnsupportedProblemError: no kernel runs even plain attention of this shape on the target.
        DatabaseError: the user's database is corrupt or unreadable.
    """
    for name, value in (("seqlen", seqlen), ("batch", batch)):
        if value is not None and value < 1:
            raise InvalidProblemError(f"{name}={value} is not allowed: {name} must be 1 or more.")
    if target.backend != "cuda":
        raise InvalidProblemError(
            f"target {target.name!r} has no memory hierarchy to count for: name a GPU, see `flashgen show targets`."
        )
    model, kinds = find(preset)
    layers = []
    for row in kinds:
        problem = Problem.preset(model.name, layer=row.kind, seqlen=seqlen, batch=batch, return_lse=train)
        tile, source, missing = _tile(problem, target)
        layers.append(
            LayerAccount(
                kind=row.kind,
                count=row.count,
                account=account(problem, tile=tile, target=target, train=train),
                config_source=source,
                uncovered=missing,
            )
        )
    return ModelAccount(
        preset=preset.lower(),
        seqlen=model.seqlen if seqlen is None else seqlen,
        batch=model.batch if batch is None else batch,
        target=target.name,
        train=train,
        layers=tuple(layers),
    )


def _tile(problem: Problem, target: Target) -> tuple[Tile, str, tuple[str, ...]]:
    """The tile of the kernel that runs a problem, or would; where it comes from; options that no kernel covers."""
    missing: tuple[str, ...] = ()
    asked = problem
    if not generated(problem.spec, target):
        lacking = sorted(uncovered(problem.spec, target).values(), key=len)
        # What the kernel closest to it lacks.
        missing = tuple(lacking[0]) if lacking else ()
        asked = replace(problem, **_PLAIN)  # type: ignore[arg-type]  # each a field's own off value
    if not generated(asked.spec, target):
        raise UnsupportedProblemError(f"no generated kernel runs {asked} on {target.name}.")
    plan = dispatch.resolve(asked, target)
    if plan.backend == "torch":
        raise UnsupportedProblemError(f"{asked} would run in the torch backend on {target.name}:", plan.rejected)
    return Tile(block_m=int(plan.config.BLOCK_M), block_n=int(plan.config.BLOCK_N)), plan.config_source, missing
