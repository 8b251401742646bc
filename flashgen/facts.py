"""Compile a configuration without a GPU and read what the compiler knows: registers, spills, shared memory, loop.

`compile_facts` is the door: it answers from the disk cache, or compiles in a worker process, never in the caller, which may have
no business importing triton. `inspect` is what a worker runs. A cached answer is keyed by the kernel's text, the
configuration, the architecture and the version of Triton.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from flashgen import facts_gluon, gcn, sass, settings
from flashgen.build import load_module, write_source
from flashgen.config import KernelConfig, Tunable
from flashgen.errors import BuildError, InvalidProblemError, UnsupportedProblemError
from flashgen.render import KernelSource, render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name, features

_FORMAT = 5  # of the cache's files
_LOG = {
    "n_regs": re.compile(r"Used (\d+) registers"),
    "stack_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spill_store_bytes": re.compile(r"(\d+) bytes spill stores"),
    "spill_load_bytes": re.compile(r"(\d+) bytes spill loads"),
}
_SERIALISED = re.compile(r"\(C75(1\d)\)")
_DIVISIBLE = ":16"
_FP32_POINTERS = ("lse_ptr", "dlse_ptr", "safe_lse_ptr", "delta_ptr")
_OPTIONS = ("num_warps", "num_stages")


Strides = Mapping[str, int]  # a kernel's stride parameter -> elements
Constants = Mapping[str, Tunable | None]  # a kernel's parameter -> what it is compiled with


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledFacts:
    """What the compiler says about one configuration.

    A thread is a lane, a warp a wavefront on AMD.

    Attributes:
        arch: e.g. `sm_90`, `gfx942`.
        triton_version: which compiled it.
        n_regs: registers of a thread; on gfx942 vector registers, accumulation registers included (one file of 512).
        spill_store_bytes, spill_load_bytes: of a thread, over the whole kernel.
        stack_bytes: local (private) memory of a thread.
        smem_bytes: shared memory (LDS) of a block, exact.
        num_warps: warps of a block.
        serialised: whether ptxas warned (C7510 to C7519) that it serialised asynchronous products; always false elsewhere.
        undefined_registers: instructions that read a register nothing wrote (`sass.undefined_registers`): miscompiled. Not
            looked for on AMD, where it is 0.
        loop: instructions of one warp in one pass of the unmasked main loop (of a backward, that of dK/dV), by class (`flashgen.sass`, `flashgen.gcn`); UTCHMMA
            (`utcmma`) is issued by one warp for the whole block. Empty where no loop was found.
        compile_s: seconds it took.
        loop_macs: multiply-adds that the tensor cores do for a block in such a pass, as issued: more than the tile's own
            where warps compute the same products or the loop is unrolled. 0 without tensor cores, or where it cannot be read.
        tmem_columns: columns of tensor memory of a block (sm_100: 512 of 128 x 32 bit on an SM), else 0.
        accumulation_regs: those of `n_regs` that are AMD's accumulation registers, else 0.
        scalar_regs: scalar registers of a wavefront (AMD), else 0: NVIDIA reports none.
    """

    arch: str
    triton_version: str
    n_regs: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    smem_bytes: int
    num_warps: int
    serialised: bool
    undefined_registers: int
    loop: dict[str, int]
    compile_s: float
    loop_macs: int = 0
    tmem_columns: int = 0
    accumulation_regs: int = 0
    scalar_regs: int = 0

    @property
    def spill_bytes(self) -> int:
        """Bytes spilled, stores and loads."""
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def loop_spill_ops(self) -> int:
        """Spill instructions of one warp in one pass of the main loop: the ones that cost."""
        return self.loop.get("spill", 0)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CompiledFacts:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: it is no such form.
        """
        return cls(**{field.name: data[field.name] for field in fields(cls)})


def compile_facts(spec: AttentionSpec, config: KernelConfig, target: Target) -> CompiledFacts:
    """Compile a configuration for a target, with no GPU needed; cached on disk.

    Args:
        spec: what to compile.
        config: the knobs; its variant renders the kernel.
        target: for which architecture.

    Returns:
        The facts.

    Raises:
        InvalidProblemError: the config is not legal, or the target is no GPU.
        UnsupportedProblemError: the variant does not cover the spec on that target.
        BuildError: the compiler refused or died.
    """
    from flashgen.compile_pool import CompilePool  # it imports this module's facts

    variant = by_name(config.variant)
    require_gpu(target)
    reason = variant.supports(spec, target)
    if reason is not None:
        raise UnsupportedProblemError(f"{spec.key} cannot be compiled for {target.name}:", {variant.name: reason})
    config = variant.parse_config(config, spec, target)
    source = render(spec, variant)
    known = cached(source, target, config)
    if known is not None:
        return known
    with CompilePool(workers=1) as pool:
        for _, result in pool.map(source, target, [config]):
            if isinstance(result, BaseException):
                raise result
            return result
    raise BuildError(f"the compiling worker gave no answer for {config.label}.")


def require_gpu(target: Target) -> None:
    """Refuse the CPU.

    Raises:
        InvalidProblemError: the target is no GPU.
    """
    if target.backend == "cpu":
        raise InvalidProblemError(
            f"target {target.name!r} is no GPU: nothing is compiled for it. Name one, e.g. Target.named('h100') or --target h100."
        )


def inspect(
    source: KernelSource, target: Target, config: KernelConfig, strides: Strides | None = None
) -> CompiledFacts:
    """Compile in this process and read the facts; answers and writes the disk cache.

    Never call it in a process that interprets kernels: `compile_facts` keeps them apart.

    Args:
        source: the rendered kernel.
        target: for which architecture.
        config: the knobs.
        strides: those of the call that is compiled for, by the kernel's names; None for multiples of 16 that fit 32 bits.

    Raises:
        BuildError: the compiler refused; the message holds its first useful lines.
    """
    known = cached(source, target, config, strides)
    if known is not None:
        return known
    kernels = by_name(source.variant).kernels(source.spec, config)
    inspect_one = _compile if len(kernels) == 1 else _inspect
    facts = _joined([inspect_one(source, target, config, name, values, strides) for name, values in kernels.items()])
    _write(_cache_path(source, target, config, strides), {"format": _FORMAT, **facts.to_json()})
    return facts


def _inspect(
    source: KernelSource,
    target: Target,
    config: KernelConfig,
    kernel: str,
    constants: Constants,
    strides: Strides | None,
) -> CompiledFacts:
    """The facts of one of a file's kernels; cached apart, since configurations that differ elsewhere share it."""
    options = {name: config[name] for name in _OPTIONS if name in config}
    path = _cache_file(source.digest, kernel, {**constants, **options}, target.arch, strides)
    known = _read(path)
    if known is not None:
        return known
    facts = _compile(source, target, config, kernel, constants, strides)
    _write(path, {"format": _FORMAT, **facts.to_json()})
    return facts


def _joined(parts: list[CompiledFacts]) -> CompiledFacts:
    """The facts of a launch of several kernels: the most that any needs; the main loop is the first's.

    What spoils a kernel counts wherever it stands: spill instructions of all main loops are added up.
    """
    first, *others = parts
    if not others:
        return first
    spills = sum(part.loop_spill_ops for part in parts)
    most = ("n_regs", "stack_bytes", "smem_bytes", "tmem_columns", "accumulation_regs", "scalar_regs")
    total = ("spill_store_bytes", "spill_load_bytes", "undefined_registers", "compile_s")
    return replace(
        first,
        **{name: max(getattr(part, name) for part in parts) for name in most},
        **{name: sum(getattr(part, name) for part in parts) for name in total},
        serialised=any(part.serialised for part in parts),
        loop={**first.loop, "spill": spills} if spills else first.loop,
    )


# -- the compiler --


def _compile(
    source: KernelSource,
    target: Target,
    config: KernelConfig,
    name: str,
    values: Constants,
    strides: Strides | None = None,
) -> CompiledFacts:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel: Any = getattr(load_module(write_source(source)), name)
    variant = by_name(source.variant)
    gluon = variant.backend == "gluon"
    warps = variant.num_warps(source.spec, config)
    options = {"num_warps": warps, "enable_fp_fusion": True} if gluon else compile_options(config)
    log = io.StringIO()
    start = time.perf_counter()
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope():
            with contextlib.redirect_stdout(log):
                # ptxas's log is only printed when ptxas runs: the compiler's own cache must not answer. It is written, so
                # that a launch of this configuration finds its binary there.
                knobs.nvidia.dump_ptxas_log = True
                knobs.compilation.always_compile = True
                if gluon:
                    ast_source = facts_gluon.ast_source(
                        kernel, source.spec, config, constants_have_attributes=_constants_have_attributes(kernel)
                    )
                else:
                    ast_source = ASTSource(kernel, *_signature(kernel, source.spec, values, strides))
                compiled = triton.compile(
                    ast_source,
                    target=GPUTarget(target.backend, target.compiler_arch, target.warp_size),
                    options=options,
                )
            read = _of_amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _of_nvidia(compiled, log.getvalue())
    except Exception as error:
        lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        what = source.spec.key if name == source.spec.op else f"{name} of {source.spec.key}"
        raise BuildError(
            f"{what} with {config.label} does not compile for {target.arch}: {' | '.join(lines[:6])}"
        ) from error
    loop, num_warps = read.pop("main_loop"), int(compiled.metadata.num_warps)
    return CompiledFacts(
        arch=target.arch,
        triton_version=triton.__version__,
        smem_bytes=int(compiled.metadata.shared),
        num_warps=num_warps,
        loop=loop.counts if loop else {},
        loop_macs=loop.macs(variant.multiplying_warps(source.spec, config) if gluon else num_warps) if loop else 0,
        compile_s=round(time.perf_counter() - start, 3),
        **read,
    )


def _of_nvidia(compiled: Any, log: str) -> dict[str, Any]:
    """The fields that ptxas's log and the machine code fill, and the main loop."""
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="flashgen-") as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    return {
        **_resources(log),
        "serialised": _SERIALISED.search(log) is not None,
        "undefined_registers": len(sass.undefined_registers(text)),
        "tmem_columns": int(getattr(compiled.metadata, "tmem_size", 0) or 0),
        "main_loop": sass.main_loop(text),
    }


def _of_amd(text: str) -> dict[str, Any]:
    """The fields that AMD's assembly fills, and the main loop."""
    found = gcn.resources(text)
    return {
        "n_regs": found.vgprs,
        "accumulation_regs": found.agprs,
        "scalar_regs": found.sgprs,
        "stack_bytes": found.scratch_bytes,
        "spill_store_bytes": found.spill_store_bytes,
        "spill_load_bytes": found.spill_load_bytes,
        "serialised": False,
        "undefined_registers": 0,
        "main_loop": gcn.main_loop(text),
    }


def _signature(
    kernel: Any, spec: AttentionSpec, values: Constants, strides: Strides | None = None
) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """What a call specialises on: 16-byte aligned pointers, and the strides by Triton's rule (`specialised`)."""
    elements = features.elements(spec)
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    aligned = [["tt.divisibility", 16]]
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or values.get(name, ...) is None:  # a pointer that is None is a constant, too
            signature[name] = "constexpr"
            constants[(index,)] = values[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{elements.get(name, 'fp32' if name in _FP32_POINTERS else spec.dtype)}"
            attributes[(index,)] = aligned
        elif name in features.FLOATS:
            signature[name] = "fp32"
        elif parameter.do_not_specialize:
            signature[name] = "i32"
        else:
            form = specialised((strides or {}).get(name, 1 if name in _unit_strides(spec) else 16))
            signature[name] = form.removesuffix(_DIVISIBLE)
            if form == "constexpr":
                constants[(index,)] = 1
            else:
                attributes[(index,)] = aligned if form.endswith(_DIVISIBLE) else []
    if _constants_have_attributes(kernel):
        attributes |= {path: [] for path in constants}
    return signature, constants, dict(sorted(attributes.items()))


def _unit_strides(spec: AttentionSpec) -> tuple[str, ...]:
    """Strides that are 1 in a contiguous operand."""
    rows = () if spec.mods is None else spec.mods.program.captures
    last = (f"{row.name}_stride{len(row.shape) - 1}" for row in rows)
    return (*features.UNIT_STRIDES, *last)


def _constants_have_attributes(kernel: Any) -> bool:
    """Whether a launch gives constants empty attributes (Triton 3.9 does, 3.6 does not).

    They are part of the compiler's key: where they differ, the first launch compiles everything once more.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    ones = dict.fromkeys((parameter.name for parameter in kernel.params), 1)
    try:
        backend, options = make_backend(GPUTarget("cuda", 80, 32)), {"enable_fp_fusion": True}
        packed = kernel._pack_args(backend, options, ones, [("constexpr", 1)] * len(ones), {})
    except (AttributeError, TypeError):  # another Triton: at worst it compiles twice
        return False
    return bool(packed[3])


def compile_options(config: KernelConfig) -> dict[str, Any]:
    """Triton's options of a candidate, as the rendered `launch` passes them."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def specialised(value: int) -> str:
    """What Triton compiles an integer argument as: a constant where it is 1, else its width and whether 16 divides it."""
    if value == 1:
        return "constexpr"
    return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64") + (_DIVISIBLE if value % 16 == 0 else "")


def _resources(log: str) -> dict[str, int]:
    found = {name: [int(value) for value in pattern.findall(log)] for name, pattern in _LOG.items()}
    if not found["n_regs"]:
        raise BuildError(f"ptxas left no resource report; its log was: {log[:400]!r}")
    return {name: max(values, default=0) for name, values in found.items()}


# -- the disk cache --


@cache
def triton_version() -> str:
    """Version of the installed Triton, without importing it.

    Raises:
        BuildError: it is not installed.
    """
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise BuildError("triton is not installed: pip install triton") from None


def cached(
    source: KernelSource, target: Target, config: KernelConfig, strides: Strides | None = None
) -> CompiledFacts | None:
    """The facts from the disk cache, or None; a corrupt file counts as none."""
    return _read(_cache_path(source, target, config, strides))


def _read(path: Path) -> CompiledFacts | None:
    try:
        data = json.loads(path.read_text())
        return CompiledFacts.from_json(data) if data["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cache_path(source: KernelSource, target: Target, config: KernelConfig, strides: Strides | None = None) -> Path:
    return _cache_file(source.digest, "", config.to_dict(), target.arch, strides)


def _cache_file(digest: str, kernel: str, values: Constants, arch: str, strides: Strides | None) -> Path:
    parts = [_FORMAT, digest, kernel, values, arch, triton_version()]
    # Equal forms are equal binaries; the usual one (multiples of 16) is the one that no strides mean.
    forms = {name: form for name, value in (strides or {}).items() if (form := specialised(value)) != "i32:16"}
    key = json.dumps([*parts, forms] if forms else parts, sort_keys=True)
    return settings.read().cache_dir / "facts" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _write(path: Path, data: dict[str, Any]) -> None:
    """Atomic, so that processes may race; a cache that cannot be written is no failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(data, file)
        os.replace(temporary, path)
    except OSError:
        return
