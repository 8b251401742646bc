"""A CUDA driver that does nothing, so that the host's way to a launch can be timed, Triton's launcher included, without a GPU.

The driver is a library of some twenty functions that return at once, compiled here; Triton's own `CudaDriver`, its launchers and its TMA
descriptors run above it as they are, and so do compiled kernels' launch functions. What is missing is what the real driver takes: some
microseconds a launch, and half of one for each pointer that it is asked about.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

_RETURN_AT_ONCE = (
    "cuInit cuCtxSetCurrent cuDevicePrimaryCtxRetain cuCtxSetLimit cuFuncSetAttribute cuFuncSetCacheConfig cuTensorMapEncodeTiled "
    "cuTensorMapEncodeIm2col cuDriverGetVersion cuStreamIsCapturing cuLaunchKernel cuMemcpyDtoH_v2 cuMemcpyDtoH cuModuleUnload"
)
_FILL = {  # type of what the first argument points at, and what is put there
    "cuCtxGetCurrent": ("long", "1"), "cuDeviceGet": ("int", "0"), "cuCtxGetDevice": ("int", "0"), "cuModuleLoadData": ("long", "1"), "cuModuleGetFunction": ("long", "1"),
    "cuOccupancyMaxActiveClusters": ("int", "132"), "cuCtxGetLimit": ("long", "1048576"), "cuFuncGetAttribute": ("int", "b == 0 ? 1024 : 0"),
    "cuDeviceGetAttribute": ("int", "b == 97 || b == 8 || b == 81 ? 232448 : b == 16 ? 132 : b == 10 ? 32 : 1024"),
    "cuGetErrorString": ("char *", '"none"'),
}  # fmt: skip


def _source() -> str:
    plain = [f"int {name}(void) {{ return 0; }}" for name in _RETURN_AT_ONCE.split()]
    filled = [f"int {name}({kind} *a, long b) {{ *a = {value}; return 0; }}" for name, (kind, value) in _FILL.items()]
    own = """
long launched = 0;
int cuLaunchKernelEx(void) { launched++; return 0; }
int cuPointerGetAttribute(unsigned long *a, int b, unsigned long pointer) { *a = pointer; return 0; }
"""
    return "\n".join([*plain, *filled, own])


def _library(folder: Path) -> Any:
    path = folder / "libcuda.so.1"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        "-fno-builtin",
        "-Wl,-soname,libcuda.so.1",
        "-xc",
        "-",
        "-o",
        str(path),
    ]
    subprocess.run(command, input=_source(), text=True, check=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # found by its name from now on


@contextmanager
def idle_driver() -> Iterator[Any]:
    """Triton launches on a driver that does nothing; CPU tensors pass for a GPU's. Yields a function that says how many launches there were."""
    with tempfile.TemporaryDirectory(prefix="flashgen-idle-driver-") as folder, mock.patch.dict(os.environ):
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        library = _library(Path(folder))
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime.driver import driver as drivers

        driver = CudaDriver()
        driver.get_current_device = driver.set_current_device = lambda *_: 0
        driver.get_current_stream = lambda device: 0
        driver.get_device_capability = lambda device=None: (9, 0)
        before = drivers._active
        drivers.set_active(driver)
        try:
            # Launch functions remember their kernels where tensors are a GPU's.
            properties = SimpleNamespace(multi_processor_count=132)
            with (
                mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True)),
                mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
            ):
                yield lambda: ctypes.c_long.in_dll(library, "launched").value
        finally:
            drivers._active = before
