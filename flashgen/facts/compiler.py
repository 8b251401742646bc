"""One kernel compiled in this process, and what its log and machine code say."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from flashgen import facts_gluon, gcn, sass
from flashgen.build import load_module, write_source
from flashgen.config import KernelConfig
from flashgen.errors import BuildError
from flashgen.facts.cache import DIVISIBLE, specialised
from flashgen.facts.record import CompiledFacts, Constants, Strides
from flashgen.render import KernelSource
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name, features

_LOG = {
    "n_regs": re.compile(r"Used (\d+) registers"),
    "stack_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spill_store_bytes": re.compile(r"(\d+) bytes spill stores"),
    "spill_load_bytes": re.compile(r"(\d+) bytes spill loads"),
}
_SERIALISED = re.compile(r"\(C75(1\d)\)")
_FP32_POINTERS = ("lse_ptr", "dlse_ptr", "safe_lse_ptr", "delta_ptr")


def compile_kernel(
    source: KernelSource,
    target: Target,
    config: KernelConfig,
    name: str,
    values: Constants,
    strides: Strides | None = None,
) -> CompiledFacts:
    """Compile one of a file's kernels with these values and read the facts; nothing is cached here but Triton's own binary.

    Raises:
        BuildError: the compiler refused.
    """
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
                        kernel, source.spec, config, constants_have_attributes=constants_have_attributes(kernel)
                    )
                else:
                    ast_source = ASTSource(kernel, *signature_of(kernel, source.spec, values, strides))
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


def signature_of(
    kernel: Any, spec: AttentionSpec, values: Constants, strides: Strides | None = None
) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """What a call specialises on: 16-byte aligned pointers, and the strides by Triton's rule (`specialised`).

    `strides` may also give a kernel's constant, and 0 for a pointer that is None.
    """
    given = strides or {}
    elements = features.elements(spec)
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    aligned = [["tt.divisibility", 16]]
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        absent = name.endswith("_ptr") and (values.get(name, ...) is None or given.get(name) == 0)
        if parameter.is_constexpr or absent:  # a pointer that is None is a constant, too
            signature[name] = "constexpr"
            value = None if absent else values[name]
            if name in given and not absent:
                value = bool(given[name]) if isinstance(value, bool) else given[name]
            constants[(index,)] = value
        elif name.endswith("_ptr"):
            signature[name] = f"*{elements.get(name, 'fp32' if name in _FP32_POINTERS else spec.dtype)}"
            attributes[(index,)] = aligned
        elif name in features.FLOATS:
            signature[name] = "fp32"
        elif parameter.do_not_specialize:
            signature[name] = "i32"
        else:
            form = specialised(given.get(name, 1 if name in facts_gluon.unit_strides(spec) else 16))
            signature[name] = form.removesuffix(DIVISIBLE)
            if form == "constexpr":
                constants[(index,)] = 1
            else:
                attributes[(index,)] = aligned if form.endswith(DIVISIBLE) else []
    if constants_have_attributes(kernel):
        attributes |= {path: [] for path in constants}
    return signature, constants, dict(sorted(attributes.items()))


def constants_have_attributes(kernel: Any) -> bool:
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


def _resources(log: str) -> dict[str, int]:
    found = {name: [int(value) for value in pattern.findall(log)] for name, pattern in _LOG.items()}
    if not found["n_regs"]:
        raise BuildError(f"ptxas left no resource report; its log was: {log[:400]!r}")
    return {name: max(values, default=0) for name, values in found.items()}
