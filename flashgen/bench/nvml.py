"""A door to NVML (package nvidia-ml-py): clocks, throttling and other processes of one card, round by round.

The package is optional: where it, the driver's library or the card's entry is missing, `watch` gives None and nothing is logged.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a card down; idling and clocks that were asked for do not count.
_SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One reading.

    Attributes:
        sm_mhz, memory_mhz: clocks.
        power_w: drawn.
        temperature_c: of the chip.
        throttle: why it is slowed down; empty where it is not.
        others: processes besides this one that compute on it.
    """

    sm_mhz: int
    memory_mhz: int
    power_w: float
    temperature_c: int
    throttle: tuple[str, ...]
    others: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {**asdict(self), "throttle": list(self.throttle)}


class Watch:
    """One card; made by `watch`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> GpuState | None:
        """The state now; None when NVML does not answer (the card is gone, say)."""
        nvml, handle = self._nvml, self._handle
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None
        )
        try:
            bits = int(reasons(handle)) if reasons is not None else 0
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return GpuState(
                sm_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                memory_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0,
                temperature_c=int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                throttle=tuple(name for bit, name in _SLOWDOWNS.items() if bits & bit),
                others=sum(int(process.pid) != os.getpid() for process in processes),
            )
        except nvml.NVMLError:
            return None

    def close(self) -> None:
        """Let go of NVML."""
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def watch(uuid: str) -> Watch | None:
    """Watch the card of a UUID (torch's spelling, without `GPU-`); None where nothing can be read."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
        return Watch(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode()))
    except pynvml.NVMLError:
        return None
