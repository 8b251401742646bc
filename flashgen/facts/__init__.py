"""Compile a configuration without a GPU and read what the compiler knows: registers, spills, shared memory, loop.

`compile_facts` is the door: it answers from the disk cache, or compiles in a worker process, never in the caller, which may have
no business importing triton. `inspect` is what a worker runs. A cached answer is keyed by the kernel's text, the
configuration, the architecture and the version of Triton.
"""

from __future__ import annotations

from dataclasses import replace

from flashgen.config import KernelConfig
from flashgen.errors import BuildError, InvalidProblemError, UnsupportedProblemError
from flashgen.facts.cache import FORMAT, cached, file_of, path_of, read, specialised, triton_version, write
from flashgen.facts.compiler import compile_kernel, compile_options
from flashgen.facts.record import CompiledFacts, Constants, Strides
from flashgen.render import KernelSource, render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

__all__ = [
    "CompiledFacts",
    "Constants",
    "Strides",
    "cached",
    "compile_facts",
    "compile_options",
    "inspect",
    "require_gpu",
    "specialised",
    "triton_version",
]

_OPTIONS = ("num_warps", "num_stages")


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
    inspect_one = compile_kernel if len(kernels) == 1 else _inspect
    facts = _joined([inspect_one(source, target, config, name, values, strides) for name, values in kernels.items()])
    write(path_of(source, target, config, strides), {"format": FORMAT, **facts.to_json()})
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
    path = file_of(source.digest, kernel, {**constants, **options}, target.arch, strides)
    known = read(path)
    if known is not None:
        return known
    facts = compile_kernel(source, target, config, kernel, constants, strides)
    write(path, {"format": FORMAT, **facts.to_json()})
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
