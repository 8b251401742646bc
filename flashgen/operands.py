"""`Operands`: the optional tensors and functions of a call, checked, and in the form the torch backend wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashgen import block_lists, checks, probe, settings
from flashgen.block_ranges import launch_values
from flashgen.config import KernelConfig
from flashgen.errors import FlashgenError, InvalidProblemError, UnsupportedProblemError
from flashgen.mods.fingerprint import fingerprint
from flashgen.mods.reached import captured_tensors
from flashgen.problem import Problem
from flashgen.spec import AttentionSpec, Mods
from flashgen.torch_blocked import Options
from flashgen.variants import by_name
from flashgen.variants.features import captured, signature

Mod = Callable[..., Tensor]

_BLOCK = "block_mask.mask_mod"
_MOST_TRIED = 4096
_NONE = (1, 1, 1, 1)  # batch, heads, queries, keys: index 0, which a tensor of packed sequences has for each of them
_tried: dict[str, None] = {}  # fingerprints of mods that `probe` accepted and that have a trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """What a call brings along beside q, k and v; every field as in `attention()`.

    Attributes:
        philox: (2,) int64 seed and offset of dropout, on the tensors' device.
        cu_seqlens_q, cu_seqlens_k, seqused_k: of packed sequences.
        traced_as: the mods' program and what it captures, where they were traced elsewhere; None to trace them here.
        captured_as: `options_captured` of an earlier moment; None for now.
    """

    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    attn_mask: Tensor | None = None
    philox: Tensor | None = None
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    block_mask: Any = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    traced_as: tuple[Any, tuple[Tensor, ...]] | None = None
    captured_as: tuple[Tensor, ...] | None = None

    @property
    def has_functions(self) -> bool:
        """Whether something is given that an operator's schema cannot carry."""
        return self.score_mod is not None or self.mask_mod is not None or self.block_mask is not None

    def options_captured(self) -> tuple[Tensor, ...]:
        """The tensors that score_mod reads and that want gradients, in a fixed order."""
        if self.captured_as is None:
            return () if self.score_mod is None else captured_tensors(self.score_mod)
        return self.captured_as

    def as_now(self, device: torch.device) -> Operands:
        """The same with what its mods mean now, for a backward that comes after a loop variable in a closure has moved on.

        Mods without a trace stay as they are.
        """
        inside: Any = torch._C._functorch.peek_interpreter_stack  # what a transform wraps is another one outside
        if not self.has_functions or torch.compiler.is_compiling() or inside() is not None:
            return self
        try:
            traced_as = self._program(device)
        except (FlashgenError, AttributeError):  # the checks say what is wrong with a mod or a block mask
            traced_as = None
        found = {id(x): x for x in self.options_captured()}
        if traced_as is not None and self.score_mod is not None:  # a trace meets what a walk through objects may not
            reached = {number for number in traced_as[0].score_reads if traced_as[1][number].requires_grad}
            found |= {id(x): x for x in (traced_as[1][number] for number in sorted(reached))}
        return replace(self, traced_as=traced_as, captured_as=tuple(found.values()))

    def read_by_functions(self) -> tuple[Tensor, ...]:
        """The tensors that mods and a BlockMask read: a write into them before the backward has to be noticed."""
        if not self.has_functions:
            return ()
        if self.traced_as is not None:
            found = self.traced_as[1]
        else:
            found = tuple(fingerprint(tuple(self._mods.values())).tensors)
        parts = (getattr(self.block_mask, name, None) for name in block_lists.PARTS)
        return tuple(x for x in (*found, *parts) if isinstance(x, Tensor) and not x.is_inference())

    def require_as_traced(self, device: torch.device) -> None:
        """Refuse mods that mean something else than when they were traced, where Python runs them again.

        Raises:
            InvalidProblemError: names what is to be done.
        """
        if self.traced_as is None or not self.has_functions:
            return
        program, tensors = self.traced_as
        found, others = replace(self, traced_as=None)._program(device)
        pairs = zip(program.captures, tensors, others, strict=False)
        # A number of another device is copied; what no walk finds may be made anew each time.
        moved = any(x is not y for row, x, y in pairs if row.shape and row.tensor is None)
        if found.digest != program.digest or moved:
            raise InvalidProblemError(
                "score_mod or mask_mod (of a block_mask, too) means something else in the backward than it did in the forward: a "
                "variable that it reads was given another value in between (a loop variable in a lambda, a global, an "
                "attribute), and the torch backend runs it again. Bind the value: lambda ..., x=x: ..., or functools.partial."
            )

    def require_tensors(self, device: torch.device) -> None:
        """Refuse what is no tensor where one belongs, or lies elsewhere: an operator is sent to the wrong device by that.

        Raises:
            InvalidProblemError: names the operand.
        """
        for name in ("alibi_slopes", "sinks", "bias", "attn_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise InvalidProblemError(f"{name} is a {type(value).__name__}: it must be a torch.Tensor.")
            if value is not None and value.device != device:
                raise InvalidProblemError(
                    f"{name} is on {value.device}, q on {device}: they must be on one device. Move it."
                )
        for name in ("score_mod", "mask_mod"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InvalidProblemError(
                    f"{name} is a {type(value).__name__}: it must be a function, see FlexAttention."
                )

    def check(self, problem: Problem, device: torch.device, *, tried: bool = False) -> None:
        """Check shapes, dtypes and devices against the problem, and try the mods on a handful of zeros (`probe`).

        Args:
            problem: the call.
            device: of q.
            tried: the mods were tried before.

        Raises:
            InvalidProblemError: the message names the operand, what it is and what is allowed.
        """
        heads, batch = problem.num_heads_q, problem.batch
        scores = (batch, heads, problem.seqlen_q, problem.seqlen_k)
        for name in ("alibi_slopes", "sinks", "bias", "attn_mask"):
            value = getattr(self, name)
            if value is not None:
                checks.operand(name, value)
        if self.alibi_slopes is not None:
            checks.shape("alibi_slopes", self.alibi_slopes, [(heads,), (batch, heads)])
        if self.sinks is not None:
            checks.shape("sinks", self.sinks, [(heads,)])
        if self.bias is not None:
            checks.broadcasts("bias", self.bias, scores)
        if self.attn_mask is not None:
            checks.broadcasts("attn_mask", self.attn_mask, scores)
        if self.block_mask is not None:
            checks.block_mask(self.block_mask, scores, device)
        if not self.has_functions or tried or 0 in scores:
            return  # a mod of a call without scores never runs, and what it captured may be empty
        self._try_mods(device, _NONE if problem.varlen else scores)
        if torch.compiler.is_compiling():
            return
        try:
            traced = self._program(device)
        except FlashgenError:  # it runs as it is, and nothing is known of its indices
            return
        self._check_indices(*traced, problem)

    def _try_mods(self, device: torch.device, sizes: tuple[int, ...] = _NONE) -> None:
        known, given = self._untraced(device), self._mods
        on_blocks = dict(zip(given, self._on_blocks(device), strict=True))
        # Mapped, a mod is elementwise whatever it reduces: unless a trace knows what, it is tried as it was given.
        tried = {name: mod if known is None or name in known else given[name] for name, mod in on_blocks.items()}
        try:
            for name, mod in tried.items():
                if mod is not None and name == "score_mod":
                    probe.score_mod(mod, device)
                elif mod is not None:
                    probe.mask_mod(name, mod, device)
        except InvalidProblemError as error:
            if "device" in str(error.__cause__) or probe.BRANCHES in str(error):
                self._program(device)  # a trace names the tensor and the line
            raise
        sized = () if known is not None or torch.compiler.is_compiling() else self._program(device)[0].sized
        for name, mod in tried.items():
            if mod is not None and known is not None:
                probe.require_elementwise(name, mod, device, sizes if mod is on_blocks[name] else _NONE)
            elif mod is not None and name in sized:
                probe.require_as_alone(name, mod, device, sizes)

    def _on_blocks(self, device: torch.device) -> tuple[Mod | None, Mod | None, Mod | None]:
        """score_mod, mask_mod and the block mask's, to be called on blocks: those that are right for 0-d arguments alone are mapped."""
        mods = self._mods
        per_score: frozenset[str] = frozenset()
        if self.has_functions and not torch.compiler.is_compiling():
            try:
                per_score = self._program(device)[0].per_score
            except UnsupportedProblemError as error:
                # Nothing is known of what stands behind the operation that has no trace: a value at a time is what a mod is defined by.
                mapped = {name for name, mod in mods.items() if mod is not None and probe.maps(name, mod, device)}
                per_score = error.per_score | mapped
            except (FlashgenError, AttributeError):
                pass  # it runs as it is, or the checks say what is wrong
        score, mask, block = (
            probe.per_score(mod) if mod is not None and name in per_score else mod for name, mod in mods.items()
        )
        return score, mask, block

    @property
    def _mods(self) -> dict[str, Mod | None]:
        block_mod = getattr(self.block_mask, "mask_mod", None)
        return {"score_mod": self.score_mod, "mask_mod": self.mask_mod, _BLOCK: block_mod}

    def _untraced(self, device: torch.device) -> frozenset[str] | None:
        """Of mods of which one has no trace those that are known to be right for 0-d arguments alone; None where all have one."""
        try:
            if not torch.compiler.is_compiling():
                self._program(device)
        except FlashgenError as error:
            return error.per_score if isinstance(error, UnsupportedProblemError) else frozenset()
        return None

    def options(self, problem: Problem) -> Options:
        """Everything the torch backend's loops need."""
        score_mod, mask_mod, block_mod = self._on_blocks(torch.device(problem.device))
        return Options(
            sm_scale=problem.scale,
            causal=problem.causal,
            offset=problem.causal_offset,
            window=problem.window_size,
            softcap=problem.softcap,
            alibi=self.alibi_slopes,
            alibi_shift=problem.seqlen_k - problem.seqlen_q,
            sinks=self.sinks,
            bias=self.bias,
            attn_mask=self.attn_mask,
            score_mod=score_mod,
            mask_mod=mask_mod,
            block_mask=self.block_mask,
            block_mod=block_mod,
            dropout_p=problem.dropout_p,
            philox=self.philox if problem.dropout_p else None,
            captured=self.options_captured(),
        )

    def check_traced(self, problem: Problem, device: torch.device) -> Problem:
        """`check` and `traced`; mods that were tried once and have a trace, which depends on no content, are not tried again.

        Raises:
            InvalidProblemError: as of both.
        """
        plain, mods = self.has_functions and self.block_mask is None, (self.score_mod, self.mask_mod)
        key = fingerprint(mods, str(device), torch.get_default_dtype()).key if plain else None
        empty = 0 in (problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k)
        self.check(problem, device, tried=True)
        if self.has_functions and key not in _tried and not empty:
            with probe.on_the_cpu():
                self._try_mods(torch.device("cpu"))
        traced = self.traced(problem, device)
        if traced.untraced and not empty:  # they will run as they are
            p = problem
            self._try_mods(device, _NONE if p.varlen else (p.batch, p.num_heads_q, p.seqlen_q, p.seqlen_k))
        if key is not None and traced.mods is not None and not empty:
            if len(_tried) >= _MOST_TRIED:
                _tried.clear()
            _tried[key] = None
        return traced

    def traced(self, problem: Problem, device: torch.device) -> Problem:
        """The problem with its mods in the form that kernels have, or with the reason why they have none.

        Raises:
            InvalidProblemError: an index of a mod surely leaves a tensor that it captures.
        """
        if not self.has_functions:
            return problem
        try:
            program, tensors = self._program(device)
        except UnsupportedProblemError as error:
            return replace(problem, untraced=str(error))
        self._check_indices(program, tensors, problem)
        return replace(problem, mods=Mods(digest=program.digest, program=program))

    def _check_indices(self, program: Any, tensors: tuple[Tensor, ...], problem: Problem) -> None:
        """Refuse indices that surely leave a captured tensor; with FLASHGEN_CHECK_VALUES every one that does."""
        p, heads = problem, problem.num_heads_q
        program.check_bounds(tensors, batch=p.batch, num_heads=heads, seqlen_q=p.seqlen_q, seqlen_k=p.seqlen_k)
        if settings.read().check_values:
            for first, batch, seqlen_q, seqlen_k in self._sequences(problem):
                program.check_every_index(
                    tensors, batch=batch, num_heads=heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, first_batch=first
                )

    def _sequences(self, problem: Problem) -> Iterator[tuple[int, int, int, int]]:
        """First number, how many, and both lengths: of the whole batch, or of each packed sequence, which synchronises."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            yield 0, problem.batch, problem.seqlen_q, problem.seqlen_k
            return
        lengths = self.cu_seqlens_k.diff() if self.seqused_k is None else self.seqused_k
        for number, both in enumerate(zip(self.cu_seqlens_q.diff().tolist(), lengths.tolist(), strict=True)):
            yield number, 1, *both

    def _program(self, device: torch.device) -> tuple[Any, tuple[Tensor, ...]]:
        from flashgen import mods  # only where one is given

        if self.traced_as is not None:
            return self.traced_as
        masks = {} if self.mask_mod is None else {"mask_mod": self.mask_mod}
        block = None if self.block_mask is None else self.block_mask.mask_mod
        return mods.program(self.score_mod, masks, device, block)

    def of_mods(self, problem: Problem, config: KernelConfig | None, *, surely: bool = False) -> dict[str, Any]:
        """Captured tensors and the mask's ranges, by the names of the rendered launch; surely: as in `block_ranges.looked_up`."""
        if problem.mods is None:
            return {}
        values = _of_program(*self._program(torch.device(problem.device)), problem, config, surely)
        if self.block_mask is None:
            return values
        tiles = {} if config is None else by_name(config.variant).mask_tiles(config)
        return values | block_lists.launch_values(self.block_mask, problem, tiles)

    def captured_gradients(self, problem: Problem) -> dict[str, Tensor]:
        """The captured tensors that want gradients, by what the rendered launch of a backward calls theirs."""
        if problem.mods is None or self.score_mod is None:
            return {}
        program, tensors = self._program(torch.device(problem.device))
        masks = () if self.mask_mod is None else (self.mask_mod,)
        block = None if self.block_mask is None else self.block_mask.mask_mod
        # The user's own: a 0-d tensor of the CPU reaches a GPU as a copy, which nobody asks for its gradient.
        walked = fingerprint((self.score_mod, *masks, block)).tensors
        own = [x if at < 0 else walked[at] for x, at in zip(tensors, program.sources, strict=True)]
        reached = {one.capture for one in program.derivative.contributions}
        return {f"d{captured(program.captures[number].name)}": own[number] for number in sorted(reached)}

    def binder(self, problem: Problem, config: KernelConfig) -> tuple[set[str], Callable[..., dict[str, Any]]]:
        """What of `launch_values` follows from captured tensors: its names, and what makes it of the tensors of a fingerprint's walk.

        For calls whose mods have the fingerprint of these: another content, even other tensors.
        """
        from flashgen import mods

        device = torch.device(problem.device)
        program, tensors = self._program(device)

        def bind(walked: tuple[Tensor, ...]) -> dict[str, Any]:
            return _of_program(program, mods.bound(program, walked, device), problem, config)

        return set(_of_program(program, tensors, problem, None)), bind

    def launch_values(
        self,
        problem: Problem,
        config: KernelConfig | None = None,
        *,
        with_ranges: bool = True,
        spec: AttentionSpec | None = None,
        made: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What the rendered `launch` of a problem takes beside q, k, v, its outputs and the configuration, by its names.

        Args:
            problem: the call.
            config: of the kernel; its tile decides where a mask_mod leaves whole blocks out.
            with_ranges: whether those are looked for; else None stands in their place.
            spec: of the kernel, where it is not the problem's own.
            made: `of_mods` of the same problem and configuration, where the caller has it already.
        """
        left, right = problem.window_size
        numbers: dict[str, Any] = {
            "window_left": left,
            "window_right": right,
            "softcap": problem.softcap,
            "dropout_p": problem.dropout_p,
            "max_seqlen_q": problem.seqlen_q,
            "max_seqlen_k": problem.seqlen_k,
            "bottom_right": problem.causal_alignment == "bottom-right",
            **(self.of_mods(problem, config if with_ranges else None) if made is None else made),
        }
        wanted = (signature if config is None else by_name(config.variant).signature)(spec or problem.spec).launch
        values = {name: numbers[name] if name in numbers else getattr(self, name) for name in wanted}
        values = {name: x.resolve_neg() if isinstance(x, Tensor) else x for name, x in values.items()}
        if not problem.varlen:  # packed sequences have offsets of their own
            values["causal_offset"] = problem.causal_offset
        return {"sm_scale": problem.scale, **values}


def _of_program(
    program: Any, tensors: tuple[Tensor, ...], problem: Problem, config: KernelConfig | None, surely: bool = False
) -> dict[str, Any]:
    tiles = {} if config is None else by_name(config.variant).mask_tiles(config)
    return launch_values(program, tensors, problem, tiles, surely=surely)
