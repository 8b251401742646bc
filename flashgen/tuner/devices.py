"""Which GPUs this host has, without loading torch where there obviously is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flashgen.target import Target
from flashgen.tuner.worker import Device

# What the drivers of NVIDIA, of NVIDIA under WSL, and of AMD put there; without any no process can reach a GPU.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def has_driver() -> bool:
    """Whether a process of this host might reach a GPU."""
    return sys.platform != "linux" or any(Path(path).exists() for path in _DRIVERS)


def installed() -> Target:
    """The target of this host's current GPU, or the CPU."""
    return Target.detect() if has_driver() else Target.named("cpu")


def local(target: Target, most: int | None) -> list[Device]:
    """The devices of this host that are that target.

    Args:
        target: what is tuned for.
        most: how many at most; None for the current one alone, which any environment may rely on being the only one used.
    """
    if most is None or most == 1:
        return [Device()]
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    same = [index for index in range(torch.cuda.device_count()) if Target.detect(f"cuda:{index}").name == target.name]
    return [Device(visible=names[index] if names else str(index)) for index in same[:most]] or [Device()]
