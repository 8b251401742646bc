"""The simulated names against the installed Triton's, and what a file may import."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import pytest
from subjects import check_copy, check_matmul, text_of

from flashgen import simulator as sim
from flashgen.simulator import api
from flashgen.simulator.scalars import scalar

triton = pytest.importorskip("triton")
INSTALLED = ".".join(triton.__version__.split(".")[:2])
GLUON = "triton.experimental.gluon"
HOPPER = f"{GLUON}.language.nvidia.hopper"
TABLES = {
    f"{GLUON}.language": api.LANGUAGE,
    HOPPER: api.HOPPER,
    f"{HOPPER}.tma": api.TMA,
    f"{HOPPER}.mbarrier": api.MBARRIER,
    f"{GLUON}.nvidia.hopper": {"TensorDescriptor": api.tma.TensorDescriptor},
}
# Names of other versions of Triton than the newest, and parameters that they spell otherwise.
OLDER = {f"{GLUON}.language.thread_barrier"}
NEWER = (
    {f"{GLUON}.language.{name}" for name in ("barrier", "atomic_load", "atomic_store", "atomic_poll", "clamp")}
    | {f"{HOPPER}.mbarrier.allocate_mbarrier"}
    | {f"{HOPPER}.tma.{name}" for name in api.TMA if name.startswith(("async_load", "async_store", "async_atomic"))}
)
REMOVED = {f"{HOPPER}.tma.async_copy_global_to_shared", f"{HOPPER}.tma.async_copy_shared_to_global"}  # 3.9 raises
RENAMED = {"bytes_per_cta": "bytes"}  # newest name: what 3.6 calls it
# Their rarest parameters stand elsewhere in some version: only by keyword are they the same in all.
MOVED = {"load", "store", "PaddedSharedLayout"}
# Types and language constructs, which are no functions with a signature to compare; Python's own range is the language's.
UNCOMPARED = {"constexpr", "dtype", "tensor", "tuple", "range", "shared_memory_descriptor", "tensor_descriptor"}


def parameters(function: Any) -> list[str]:
    """The parameters a kernel may give, in order."""
    function = getattr(function, "fn", function)
    given = inspect.signature(function).parameters.values()
    return [
        one.name
        for one in given
        if not one.name.startswith("_") and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]


@pytest.mark.parametrize("module", TABLES)
def test_names_and_parameters_are_those_of_the_installed_triton(module: str) -> None:
    real, wrong = importlib.import_module(module), []
    for name, simulated in TABLES[module].items():
        full = f"{module}.{name}"
        if name in UNCOMPARED or isinstance(simulated, api.dtypes.DType):
            continue
        if not hasattr(real, name):
            if full not in OLDER | NEWER:
                wrong.append(f"{full} is not in Triton {INSTALLED}")
            continue
        if full in REMOVED and api.VERSIONS[1] == INSTALLED:
            continue
        if inspect.isclass(simulated) and issubclass(simulated, api.layouts.Layout):
            have, want = list(simulated.FIELDS), parameters(getattr(real, name))
        else:
            have, want = parameters(simulated), parameters(getattr(real, name))
        # A parameter of two names takes both; it stands where the newest one does.
        have = [RENAMED[one] if RENAMED.get(one) in want else one for one in dict.fromkeys(have)]
        have = list(dict.fromkeys(have))
        missing = [one for one in want if one not in have]
        moved = [one for one in have if one in want] != want and name not in MOVED
        if missing or moved:
            wrong.append(f"{full}{have}, but Triton {INSTALLED} takes {want}")
    assert not wrong, "\n".join(wrong)


def test_the_names_of_triton_3_6_work_as_those_of_3_9() -> None:
    names = {"async_load": "async_copy_global_to_shared", "async_store": "async_copy_shared_to_global"}
    for kernel, check in (("matmul", check_matmul), ("copy", check_copy)):
        text = text_of(kernel).replace("gl.barrier()", "gl.thread_barrier()")
        for new, old in names.items():
            assert f"tma.{new}(" in text
            text = text.replace(f"tma.{new}(", f"tma.{old}(")
        check(text)


def test_the_real_triton_stays_what_it_is() -> None:
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("triton", "torch")}
    check_copy(text_of("copy"))
    after = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("triton", "torch")}
    assert before == after
    from triton.experimental.gluon import language

    assert language.load is not api.LANGUAGE["load"]


def test_an_unknown_name_may_be_imported_but_not_used() -> None:
    head = "from triton.experimental.gluon.language.nvidia.blackwell import tcgen05_mma\n"
    with pytest.raises(sim.UnsupportedOperationError, match="blackwell"):
        sim.simulate(head, {})
    text = text_of("copy").replace("language as gl\n", "language as gl\nfrom triton.experimental.gluon import amd\n")
    check_copy(text)
    with pytest.raises(sim.UnsupportedOperationError, match=r"gluon\.amd\.cdna3\.mfma is not simulated\n.*`amd"):
        check_copy(text.replace("out.store(x * 2)", "amd.cdna3.mfma(x)"))


def test_the_bits_of_a_scalar_are_not_its_value() -> None:
    one = scalar(0x3F800000, sim.dtypes.int32)
    assert one.to(sim.dtypes.float32, bitcast=True) == 1.0 and one.to(sim.dtypes.float32) == 0x3F800000
    half = scalar(-0.5, sim.dtypes.float32)
    assert half.to(sim.dtypes.int32, bitcast=True) == 0xBF000000 - 2**32 and half.to(sim.dtypes.int32) == 0
