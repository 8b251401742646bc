"""The small kernels are Gluon: the real compiler takes what the simulator runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from subjects import KERNELS

from flashgen.simulator import api

triton = pytest.importorskip("triton")

BF16, FP32 = "bf16", "fp32"
# Kernel -> its entry, and each parameter: a box of a descriptor, a type, or a compile-time value.
ENTRIES = {
    "matmul": ("matmul", [(BF16, [64, 32]), (BF16, [32, 64]), (BF16, [64, 64]), "*i32", "i32", 2, 32]),
    "copy": ("double", [(FP32, [32, 16]), (FP32, [32, 16]), "i32", 2]),
    "ordered_sum": ("ordered_sum", ["*fp32", "*fp32", "*i32", "i32", 64]),
    "tickets": ("triple", ["*fp32", "*fp32", "*i32", "i32", "i32", 32]),
}
COMPILE = """
import importlib.util, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

path, name, given = sys.argv[1], sys.argv[2], eval(sys.argv[3])
spec = importlib.util.spec_from_file_location("kernel", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
kernel, signature, constants = getattr(module, name), {}, {}
for index, (parameter, value) in enumerate(zip(kernel.params, given, strict=True)):
    if isinstance(value, int):
        signature[parameter.name], constants[(index,)] = "constexpr", value
    elif isinstance(value, tuple):
        element, box = value
        layout = gl.NVMMASharedLayout.get_default_for(box, {"bf16": gl.bfloat16, "fp32": gl.float32}[element])
        signature[parameter.name] = f"tensordesc<{element}[{','.join(map(str, box))}],{layout!r}>"
    else:
        signature[parameter.name] = value
compiled = triton.compile(
    GluonASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
)
print(len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.sampled(every=2)
@pytest.mark.slow
@pytest.mark.skipif(
    not triton.__version__.startswith(api.VERSIONS[1]), reason=f"written with the names of Triton {api.VERSIONS[1]}"
)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_real_compiler_takes_it(name: str) -> None:
    entry, given = ENTRIES[name]
    command = [sys.executable, "-c", COMPILE, str(KERNELS / f"{name}.py"), entry, repr(given)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.strip() == "True", result.stderr
