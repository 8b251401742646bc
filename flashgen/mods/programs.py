"""`Program`: a call's score_mod and masks as one traced graph, and what a template asks of it."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashgen.errors import FlashgenError, InvalidProblemError, UnsupportedProblemError
from flashgen.mods import bounds, emit
from flashgen.mods.captures import Capture, Captures
from flashgen.mods.classes import arrays_of
from flashgen.mods.conjuncts import Conjunction, split
from flashgen.mods.derivative import Derivative, derive
from flashgen.mods.emit import TRITON, DerivativeEmission, Dialect, Emission, Names
from flashgen.mods.fingerprint import fingerprint
from flashgen.mods.graph import Graph, Node, ordered
from flashgen.mods.trace import Site, trace
from flashgen.stream_capture import apart

Mod = Callable[..., Any]
_BLOCK = "block_mask.mask_mod"
_KEPT = 512  # traces; each is some kilobytes


@dataclass(frozen=True, kw_only=True)
class Program:
    """What score_mod and the masks of a call compute; equal for functions of equal meaning.

    Attributes:
        score: the new score, fp32; None without a score_mod.
        mask: whether a key may be attended to, all masks ANDed; None without one.
        block: what a BlockMask's own mask_mod says, which counts in its partial blocks alone; None without one.
        captures: captured tensors, by the number that loads name.
        sources: per capture, which tensor of the functions' walk it is; -1 where the program holds it.
        title: what the user calls the functions, for a comment.
        sites: the user's line of each load, by id of its node.
        graph: makes nodes that are shared with these.
        looked_up: keys of a block of words, where the mask is one that looks up tables which say all of it (`shared_masks`); else 0.
        per_score: the functions, by the name that a message uses, that are right for 0-d arguments alone.
        sized: of the others those that ask a single value for its dimensions: on blocks they may mean something else.
    """

    score: Node | None
    mask: Node | None
    block: Node | None
    captures: tuple[Capture, ...]
    sources: tuple[int, ...]
    title: str
    sites: Mapping[int, Site]
    graph: Graph
    looked_up: int = 0
    per_score: frozenset[str] = frozenset()
    sized: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of all that a rendered kernel takes from it; sizes of captured tensors are not among that."""
        roots = [root for root in self.roots if root is not None]
        numbers: dict[int, int] = {}
        lines = [f"{self.score is not None}:{self.mask is not None}{':block' if self.block is not None else ''}"]
        for node in ordered(*roots):
            numbers[id(node)] = len(numbers)
            lines.append(f"{node.op}:{node.dtype}:{node.value!r}:{[numbers[id(arg)] for arg in node.args]}")
        lines += [str(numbers[id(root)]) for root in roots]
        lines += [f"{row.name}:{row.dtype}:{len(row.shape)}:{row.requires_grad}" for row in self.captures]
        lines += [f"looked up by {self.looked_up}"] if self.looked_up else []
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @cached_property
    def mask_reads(self) -> tuple[int, ...]:
        """The numbers of the captured tensors that the masks read."""
        return _reads(self.mask)

    @cached_property
    def score_reads(self) -> tuple[int, ...]:
        """The numbers of the captured tensors that score_mod reads."""
        return _reads(self.score)

    @cached_property
    def gathers_scores(self) -> bool:
        """Whether score_mod reads a captured tensor anew for each pair of a query and a key."""
        return bool(self._gathers())

    @cached_property
    def gathers_by_expression(self) -> bool:
        """Whether one of those reads is at an index that is computed of both, such as a distance, not of one of them in each dimension."""
        return any(x.depends >= {"q_idx", "kv_idx"} for node in self._gathers() for x in node.args)

    def _gathers(self) -> list[Node]:
        nodes = () if self.score is None else ordered(self.score)
        return [node for node in nodes if node.op == "load" and node.depends >= {"q_idx", "kv_idx"}]

    @property
    def roots(self) -> tuple[Node | None, Node | None, Node | None]:
        """The values of the functions: score, mask, block."""
        return self.score, self.mask, self.block

    @property
    def parameters(self) -> tuple[str, ...]:
        """The kernel's parameters for captured tensors: of each its pointer, strides and sizes."""
        return tuple(name for row in self.captures for name in emit.parameters(row))

    def arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What to pass for `parameters`."""
        return [value for tensor in tensors for value in (tensor, *tensor.stride(), *tensor.shape)]

    def emit_score(self, *, dialect: Dialect = TRITON, names: Names | None = None, like: str | None = None) -> Emission:
        """The statements of score_mod; the result in fp32.

        Args:
            dialect: the language.
            names: what the arguments are called.
            like: an expression of the result's shape, usually the score's name.

        Raises:
            ValueError: there is no score_mod.
        """
        return self._emit(self.score, "score_mod", dialect, names, like, "")

    def emit_mask(self, *, dialect: Dialect = TRITON, names: Names | None = None, like: str | None = None) -> Emission:
        """The statements of the masks; the result is a bool of the smallest shape unless `like` gives one.

        Raises:
            ValueError: there is no mask.
        """
        return self._emit(self.mask, "mask_mod", dialect, names, like, "")

    def emit_block(self, *, dialect: Dialect = TRITON, names: Names | None = None, like: str | None = None) -> Emission:
        """The statements of a BlockMask's mask_mod, as `emit_mask`; their names begin with `block_`.

        Raises:
            ValueError: there is no BlockMask.
        """
        return self._emit(self.block, "block_mask", dialect, names, like, "block_")

    @cached_property
    def conjunction(self) -> Conjunction:
        """The masks in parts, for a kernel whose threads hold keys.

        Raises:
            ValueError: there is no mask.
        """
        if self.mask is None:
            raise ValueError("this program has no mask_mod")
        return split(self.graph, self.mask)

    def emit_nodes(self, roots: Sequence[Node], *, dialect: Dialect, names: Names, prefix: str = "") -> Emission:
        """The statements of some values of the graph, each result of the smallest shape that holds it."""
        return emit.emit(roots, self.captures, dialect=dialect, names=names, prefix=prefix)

    @cached_property
    def derivative(self) -> Derivative:
        """The gradients of score_mod.

        Raises:
            ValueError: there is no score_mod.
        """
        if self.score is None:
            raise ValueError("this program has no score_mod")
        return derive(self.graph, self.score, self.captures)

    def emit_derivative(
        self,
        *,
        dialect: Dialect = TRITON,
        names: Names | None = None,
        like: str | None = None,
        of_captures: bool = True,
    ) -> DerivativeEmission:
        """The statements of score_mod's derivative: of the raw score, and what captured tensors get.

        Args:
            dialect: the language.
            names: what the arguments are called; `score` is the raw score, `grad` the gradient of the new one.
            like: an expression of the results' shape.
            of_captures: whether what captured tensors get is wanted too.

        Raises:
            ValueError: there is no score_mod.
        """
        derivative = self.derivative if of_captures else replace(self.derivative, contributions=())
        return emit.emit_derivative(derivative, self.captures, dialect=dialect, names=names, like=like, prefix="d_")

    def _emit(
        self, root: Node | None, kind: str, dialect: Dialect, names: Names | None, like: str | None, prefix: str
    ) -> Emission:
        if root is None:
            raise ValueError(f"this program has no {kind}")
        return emit.emit([root], self.captures, dialect=dialect, names=names, like=like, prefix=prefix)

    def check_bounds(
        self, tensors: Sequence[Tensor], *, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int
    ) -> None:
        """Refuse indices that surely leave a captured tensor.

        Raises:
            InvalidProblemError: names the tensor, the index's range and the user's line.
        """
        self._check(tensors, batch, num_heads, seqlen_q, seqlen_k, every=False)

    def check_every_index(
        self,
        tensors: Sequence[Tensor],
        *,
        batch: int,
        num_heads: int,
        seqlen_q: int,
        seqlen_k: int,
        first_batch: int = 0,
    ) -> None:
        """Refuse indices that leave a captured tensor, by evaluating each for every pair: for debugging.

        Raises:
            InvalidProblemError: names the tensor, the index, where it occurs and the user's line.
        """
        self._check(tensors, batch, num_heads, seqlen_q, seqlen_k, every=True, first_batch=first_batch)

    def _check(
        self,
        tensors: Sequence[Tensor],
        batch: int,
        num_heads: int,
        seqlen_q: int,
        seqlen_k: int,
        *,
        every: bool,
        first_batch: int = 0,
    ) -> None:
        sizes = {"b": batch, "h": num_heads, "q_idx": seqlen_q, "kv_idx": seqlen_k}
        if 0 in sizes.values():
            return
        for root in self.roots:
            if root is not None and every:
                bounds.check_values(root, self.captures, arrays_of(tensors), sizes, self.sites, first_batch)
            elif root is not None:
                bounds.check(root, self.captures, [tuple(tensor.shape) for tensor in tensors], sizes, self.sites)


def _reads(root: Node | None) -> tuple[int, ...]:
    found = () if root is None else ordered(root)
    return tuple(sorted({node.value for node in found if node.op == "load"}))


_cache: OrderedDict[str, Program] = OrderedDict()
_lock = threading.Lock()


def program(
    score_mod: Mod | None, mask_mods: Mapping[str, Mod], device: torch.device | None, block_mod: Mod | None = None
) -> tuple[Program, tuple[Tensor, ...]]:
    """The program of a call and the tensors that it captures now.

    Traces are kept by the functions' content: a new lambda of the same meaning finds the old trace, a changed constant does not.

    Args:
        score_mod: FlexAttention's score_mod(score, b, h, q_idx, kv_idx), or None.
        mask_mods: mask_mod(b, h, q_idx, kv_idx) by the name that a message is to use.
        device: of q; None for the CPU.
        block_mod: the mask_mod of a BlockMask.

    Returns:
        (program, tensors): the tensors in the order of `Program.captures`, on the device.

    Raises:
        UnsupportedProblemError: an operation that kernels do not have; names it and the user's line.
        InvalidProblemError: see `trace`.
    """
    functions = (score_mod, *mask_mods.values(), block_mod)
    device = device or torch.device("cpu")
    found = fingerprint(functions, *mask_mods, str(device), torch.get_default_dtype())
    if found.key is not None:
        with _lock:
            known = _cache.get(found.key)
            if known is not None:
                _cache.move_to_end(found.key)
        if known is not None:
            return known, bound(known, found.tensors, device)
    made = _traced(score_mod, mask_mods, block_mod, device, found.tensors, found.names)
    # A capture that the walk did not meet could not be bound anew: such a trace serves this call alone.
    if found.key is not None and all(row.tensor is None or row.constant for row in made.captures):
        with _lock:
            _cache[found.key] = made
            while len(_cache) > _KEPT:
                _cache.popitem(last=False)
    return made, bound(made, found.tensors, device)


def _traced(
    score_mod: Mod | None,
    mask_mods: Mapping[str, Mod],
    block_mod: Mod | None,
    device: torch.device,
    tensors: Sequence[Tensor],
    names: Sequence[str],
) -> Program:
    graph, sites = Graph(), dict[int, Site]()
    per_score, sized = set[str](), set[str]()
    captures = Captures({id(tensor): name for tensor, name in zip(tensors, names, strict=True)}, device)
    refused: list[UnsupportedProblemError] = []

    def traced(function: Mod, kind: str) -> Node | None:
        try:
            return trace(function, kind, graph, captures, sites, per_score, sized)
        except UnsupportedProblemError as error:
            refused.append(error)  # the others are traced all the same, for `per_score`
        except FlashgenError:
            if not refused:
                raise
        return None

    score = None if score_mod is None else traced(score_mod, "score_mod")
    mask: Node | None = None
    for name, mod in mask_mods.items():
        found = traced(mod, name)
        mask = found if mask is None or found is None else graph.make("and", mask, found)
    block = None if block_mod is None else traced(block_mod, _BLOCK)
    if refused:
        refused[0].per_score = frozenset(per_score)
        raise refused[0]
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    return Program(
        score=score,
        mask=mask,
        block=block,
        captures=tuple(captures.rows),
        sources=tuple(places.get(id(tensor), -1) for tensor in captures.tensors),
        title=", ".join(
            f"{kind.rpartition('.')[2]} {_name(mod)}"
            for kind, mod in (("score_mod", score_mod), *mask_mods.items(), (_BLOCK, block_mod))
            if mod is not None
        ),
        sites=sites,
        graph=graph,
        per_score=frozenset(per_score),
        sized=frozenset(sized - per_score),
    )


def bound(made: Program, tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """What a program captures now, on the device, from the walk of the functions that it was traced from.

    Raises:
        InvalidProblemError: a tensor is gone.
    """
    found = []
    for row, source in zip(made.captures, made.sources, strict=True):
        tensor = tensors[source] if source >= 0 else row.tensor
        if tensor is None:
            raise InvalidProblemError(f"the tensor {row.shown} that a mod captures is gone.")
        found.append(tensor if tensor.device == device else _moved(tensor, device))
    return tuple(found)


_numbers: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
# A captured graph, or another stream, may still read a number that is forgotten: sixteen thousand more are kept, some bytes each.
_dropped: deque[Tensor] = deque(maxlen=1 << 14)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A 0-d tensor of the CPU on another device: each number once, so that its address tells its value and nothing is copied again."""
    if tensor.dim() or tensor.device.type != "cpu" or tensor.requires_grad:
        return tensor.to(device)
    number = tensor.item()
    key = (type(number), repr(number), tensor.dtype, device)
    with _lock:
        known = _numbers.get(key)
        if known is None:
            with apart(device):
                known = _numbers[key] = tensor.detach().to(device)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()  # whatever stream asks next finds it there
            while len(_numbers) > _KEPT:
                _dropped.append(_numbers.popitem(last=False)[1])
    return known


def _name(function: Any) -> str:
    while hasattr(function, "func"):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__name__)
    return str(name).rpartition("<locals>.")[2]


def forget() -> None:
    """Drop every kept trace."""
    with _lock:
        _cache.clear()
