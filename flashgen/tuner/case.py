"""The tuned problem on a device: the tensors of one launch, each between guard bytes, made once and used for every candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flashgen import accuracy, torch_blocked
from flashgen.build import build
from flashgen.coverage import has_options
from flashgen.problem import Problem
from flashgen.render import KernelSource
from flashgen.spec import AttentionSpec, Mods
from flashgen.tuner.providers import Provider
from flashgen.variants import Variant, by_name

if TYPE_CHECKING:
    from torch import Tensor

    from flashgen.operands import Operands

_POISON = 0xFF  # bytes of all ones: NaN in every float dtype
_GUARD_BYTES = 4096
_MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class Guarded:
    """A dense tensor between guard bytes."""

    tensor: Tensor
    allocation: Tensor

    def intact(self) -> bool:
        """Whether nothing was written beside the tensor."""
        end = self.allocation.numel() - _GUARD_BYTES
        return bool((self.allocation[:_GUARD_BYTES] == _POISON).all() & (self.allocation[end:] == _POISON).all())


def guarded(shape: Sequence[int], dtype: Any, device: str) -> Guarded:
    """A tensor of NaN in an allocation with guards; it starts at a multiple of 16 bytes, as torch's own do."""
    import torch

    size = math.prod(shape) * dtype.itemsize
    padded = -(-size // 16) * 16
    allocation = torch.full((padded + 2 * _GUARD_BYTES,), _POISON, dtype=torch.uint8, device=device)
    return Guarded(allocation[_GUARD_BYTES : _GUARD_BYTES + size].view(dtype).view(tuple(shape)), allocation)


def bits(tensor: Tensor) -> Tensor:
    """A sum of the tensor's bits that no order of addition changes; stays on the device."""
    import torch

    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(words).sum(dtype=torch.int64)


@dataclass(slots=True, kw_only=True)
class Case:
    """The tuned problem on the device.

    Attributes:
        key: which kernel and problem.
        inputs, outputs: the tensors of a launch by name, in its order; None where it gets None.
        sums: bits of the inputs, before anything was launched.
        copies: more inputs, where short kernels rotate.
        reference: what the outputs are held against (`spot`), once it was computed.
        given: the problem's options, drawn (`samples.operands`); None for plain attention.
    """

    key: str
    problem: Problem
    spec: AttentionSpec
    variant: Variant
    launch: Callable[..., None]
    provider: Provider
    inputs: Mapping[str, Guarded | None]
    outputs: Mapping[str, Guarded | None]
    sums: dict[str, int] = field(default_factory=dict)
    copies: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    reference: Any = None
    given: Operands | None = None
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums = {name: int(bits(x)) for name, x in self._read().items()}

    def scalars(self, config: dict[str, Any]) -> dict[str, Any]:
        """What the launch takes besides its tensors and tunables; of a problem with options their tensors too."""
        p = self.problem
        if self.given is None:
            return {"sm_scale": p.scale, "causal_offset": p.causal_offset, **self.variant.launch_options(p)}
        from flashgen import samples  # only where there are options: it loads what a call loads

        name = str(sorted(config.items()))
        if (
            name not in self.values
        ):  # what is derived of a mask is derived once, as in the calls that follow a first one
            made = samples.launch_values(p, self.given, self.variant.config(**config))
            if p.op == "attention_bwd":
                made |= samples.sums(p, self.given)
            self.values[name] = made
        return self.values[name]

    def _read(self) -> dict[str, Tensor]:
        """Every tensor that a launch only reads."""
        named = {name: one.tensor for name, one in self.inputs.items() if one is not None}
        if self.given is not None:
            optional = ("alibi_slopes", "sinks", "bias", "attn_mask", "philox")
            named |= {name: x for name in optional if (x := getattr(self.given, name)) is not None}
            captured = () if self.given.traced_as is None else self.given.traced_as[1]
            named |= {f"captured tensor {number}": x for number, x in enumerate(captured)}
        return named

    @property
    def own(self) -> tuple[Tensor | None, ...]:
        """The inputs as a launch takes them."""
        return tuple(None if one is None else one.tensor for one in self.inputs.values())

    def run_on(self, inputs: tuple[Tensor | None, ...], config: dict[str, Any]) -> None:
        """One launch."""
        outputs = (None if one is None else one.tensor for one in self.outputs.values())
        self.launch(*inputs, *outputs, **self.scalars(config), **config)

    def poison(self) -> None:
        """Fill the outputs with NaN."""
        for tensor in self.results():
            tensor.fill_(math.nan)

    def results(self, *, but: tuple[str, ...] = ()) -> list[Tensor]:
        """The outputs that there are, `but` some."""
        return [one.tensor for name, one in self.outputs.items() if one is not None and name not in but]

    def touched(self) -> list[str]:
        """What was written where it must not be, in words."""
        buffers = {**self.inputs, **self.outputs}
        beside = [name for name, one in buffers.items() if one is not None and not one.intact()]
        written = [name for name, x in self._read().items() if int(bits(x)) != self.sums[name]]
        found = [f"bytes beside {name} were written to" for name in beside]
        return found + [f"{name} is an input and was written to" for name in written]

    def rotated(self) -> list[tuple[Tensor | None, ...]]:
        """The inputs and as many copies that all together outgrow the cache."""
        size = sum(x.numel() * x.element_size() for x in self.own if x is not None) or 1
        wanted = min(_MOST_COPIES, 1 + self.provider.cache_bytes // size)
        while len(self.copies) < wanted - 1:
            self.copies.append(tuple(None if x is None else x.clone() for x in self.own))
        return [self.own, *self.copies]


def prepare(request: dict[str, Any], provider: Provider) -> Case:
    """Import the kernel and make the problem's tensors."""
    fields = dict(request["problem"])
    fields |= {name: tuple(fields[name]) for name in ("window_size", "copies", "unaligned")}
    problem, spec = Problem(**fields), AttentionSpec.from_key(request["spec"])
    if request.get("mods") is not None:
        from flashgen.mods import transport

        program, tensors = transport.from_json(request["mods"])
        problem = replace(problem, mods=Mods(digest=program.digest, program=program, samples=tensors))
        spec = problem.spec
    problem = replace(problem, device=provider.device)
    given: Operands | None = None
    if has_options(spec):
        from flashgen import samples

        given = samples.operands(problem, device=provider.device)
    source = KernelSource(text=request["text"], spec=spec, variant=request["variant"])
    make = _backward if spec.op == "attention_bwd" else _forward
    inputs, outputs = make(problem, spec, provider.device, given)
    return Case(
        key=request["key"],
        problem=problem,
        spec=spec,
        variant=by_name(request["variant"]),
        launch=build(source).launch,
        provider=provider,
        inputs=inputs,
        outputs=outputs,
        given=given,
    )


_Tensors = tuple[Mapping[str, Guarded | None], Mapping[str, Guarded | None]]


def _shapes(p: Problem) -> dict[str, tuple[int, ...]]:
    return {
        "q": (p.batch, p.seqlen_q, p.num_heads_q, p.head_dim),
        "k": (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim),
        "v": (p.batch, p.seqlen_k, p.num_heads_kv, p.head_dim_v),
        "o": (p.batch, p.seqlen_q, p.num_heads_q, p.head_dim_v),
        "lse": (p.batch, p.num_heads_q, p.seqlen_q),
    }


def _drawn(p: Problem, names: Sequence[str], device: str) -> dict[str, Guarded]:
    """Normal data: zeros draw less power and clock higher than what users run."""
    import torch

    generator = torch.Generator(device=device).manual_seed(0)
    made = {name: guarded(_shapes(p)[name], accuracy.TORCH_DTYPES[p.dtype], device) for name in names}
    for one in made.values():
        one.tensor.normal_(generator=generator)
    return made


def _forward(p: Problem, spec: AttentionSpec, device: str, given: Operands | None) -> _Tensors:
    import torch

    shapes, dtype = _shapes(p), accuracy.TORCH_DTYPES[p.dtype]
    lse = guarded(shapes["lse"], torch.float32, device) if spec.has_lse else None
    return _drawn(p, "qkv", device), {"o": guarded(shapes["o"], dtype, device), "lse": lse}


def _backward(p: Problem, spec: AttentionSpec, device: str, given: Operands | None) -> _Tensors:
    """Out and lse are those of the blocked torch forward; lse has no gradient, as in training."""
    import torch

    shapes, dtype = _shapes(p), accuracy.TORCH_DTYPES[p.dtype]
    drawn = _drawn(p, "qkvo", device)
    dout = drawn.pop("o")
    out, lse = guarded(shapes["o"], dtype, device), guarded(shapes["lse"], torch.float32, device)
    options = torch_blocked.Options(sm_scale=p.scale, causal=p.causal, offset=p.causal_offset)
    if given is not None:
        options = given.options(p)
    q, k, v = (one.tensor for one in drawn.values())
    torch_blocked.forward(q, k, v, options, out.tensor, lse.tensor)
    gradients = {f"d{name}": guarded(shapes[name], dtype, device) for name in "qkv"}
    return {"dout": dout, "dlse": None, **drawn, "out": out, "lse": lse}, gradients
