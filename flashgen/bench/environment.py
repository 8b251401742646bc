"""Where something was measured: what has to stand beside a time for it to be a fact."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_CPU_CACHE_BYTES = 64 << 20  # where the system does not say
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine, the libraries and the date.

    Attributes:
        device: `cuda` or `cpu`.
        gpu: the card's name; empty on a CPU.
        driver: of the card; empty where nothing tells it.
        cpu: the host's model.
        threads: threads that torch uses on the host.
        versions: library -> version, those that are installed.
        date: UTC, ISO 8601.
    """

    device: str
    gpu: str
    driver: str
    cpu: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    @classmethod
    def read(cls, device: str) -> Environment:
        """Of this process, for work on `device`."""
        import torch

        cuda = device.startswith("cuda")
        versions = {name: found for name in ("torch", "triton", "numpy") if (found := version(name)) is not None}
        return cls(
            device=device,
            gpu=torch.cuda.get_device_name(device) if cuda else "",
            driver=(gpu_state().get("driver", "") if cuda else ""),
            cpu=cpu_model(),
            threads=torch.get_num_threads(),
            versions={"flashgen": own_version(), "python": platform.python_version(), **versions},
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def own_version() -> str:
    """Of flashgen."""
    from flashgen import __version__

    return __version__


def version(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_state() -> dict[str, Any]:
    """Driver, SM clock (MHz), power (W), temperature (C) of the current card; what nothing tells is left out.

    Asks NVML (package nvidia-ml-py) where it is installed, else the program nvidia-smi.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    try:
        return _nvml(torch.cuda.get_device_properties(torch.cuda.current_device()))
    except Exception:  # a missing package, a driver without NVML, a card it does not list: ask the program
        return _nvidia_smi(torch.cuda.current_device())


def _nvml(properties: Any) -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode())
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000.0,
            "temperature_c": int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        }
    finally:
        pynvml.nvmlShutdown()


_SMI_FIELDS = ("driver_version", "clocks.sm", "power.draw", "temperature.gpu")


def _nvidia_smi(index: int) -> dict[str, Any]:
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_nvidia_smi(answer)


def parse_nvidia_smi(answer: str) -> dict[str, Any]:
    """The fields of one line of nvidia-smi's CSV; those it does not know ("[N/A]") are left out."""
    words = [word.strip() for word in answer.strip().split(",")]
    if len(words) != len(_SMI_FIELDS):
        return {}
    state: dict[str, Any] = {"driver": words[0]}
    for name, word in zip(("sm_mhz", "power_w", "temperature_c"), words[1:], strict=True):
        with suppress(ValueError):
            state[name] = float(word)
    return state


def cache_bytes(device: str) -> int:
    """The last cache between the work and its memory: a GPU's L2, or the host's largest cache."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [_size(path.read_text()) for path in sorted(_CACHES.glob("index*/size"))]
    return max(found, default=0) or _CPU_CACHE_BYTES


def _size(text: str) -> int:
    text = text.strip()
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text or 0)


def free_bytes(device: str) -> int:
    """Memory that could be allocated now."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    return 2 << 30
