"""Which target an installed GPU is, from what its driver reports; and where it is none, in words why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from flashgen.target.known import TARGETS
from flashgen.target.value import Target

_MAKER = re.compile(r"^(nvidia|amd)\s+")


@dataclass(frozen=True, slots=True)
class Recognised:
    """A target, and what is to be known about how it was found.

    Attributes:
        target: a known one, or one made from the driver's figures.
        known: whether its figures are the published ones.
        note: one or two sentences for a reader.
    """

    target: Target
    known: bool
    note: str


def recognise(properties: Any) -> Recognised:
    """The target of a GPU.

    Names are matched whole: an H100 PCIe is no H100 SXM, a slice of a GPU not the GPU, and figures of another card would
    make predictions silently wrong.

    Args:
        properties: as `torch.cuda.get_device_properties` returns them, of CUDA's or ROCm's torch.
    """
    name, sms = str(properties.name).strip(), int(properties.multi_processor_count)
    plain = _plain(name)
    same = [target for target in TARGETS.values() if plain in map(_plain, target.driver_names)]
    if same and same[0].num_sms == sms:
        return Recognised(same[0], True, f"known, with the published figures of the {same[0].gpu}")
    made = _made(properties, name, sms)
    return Recognised(made, False, f"{_why(name, sms, same)}. {_how(made)}")


def _plain(name: str) -> str:
    return _MAKER.sub("", " ".join(name.lower().split()))


def _why(name: str, sms: int, same: list[Target]) -> str:
    if same:
        target = same[0]
        return f"{name} has {sms} SMs where {target.name} has {target.num_sms}: a slice or a variant of it, not {target.name}"
    squeezed = _plain(name).replace(" ", "")
    near = max(
        (t for t in TARGETS.values() if t.driver_names and t.name in squeezed), key=lambda t: len(t.name), default=None
    )
    if near is None:
        return f"{name} is not among the known GPUs ({', '.join(t.name for t in TARGETS.values() if t.driver_names)})"
    differs = f" and has {sms} SMs, not {near.num_sms}" if sms != near.num_sms else ""
    return (
        f"{name} is not {near.name}: that is the {near.gpu}, which the driver calls {' or '.join(near.driver_names)}; "
        f"this one has another name{differs}, so its clocks or memory differ"
    )


def _how(made: Target) -> str:
    if made.backend == "cuda" and made.capability < 80:
        return f"Generated kernels need compute capability 8.0 (this is {made.arch}): attention() runs on its torch backend"
    return (
        "SMs, shared memory and registers are read from the driver; bandwidth and peak are unknown, so nothing is predicted "
        f"for it. Tune it as it is: `flashgen tune --preset NAME` measures here and stores the results under {made.name!r}"
    )


def _made(properties: Any, name: str, sms: int) -> Target:
    """From the driver's figures. ROCm's torch lacks some; then the least that every GPU it supports has."""
    gfx = str(getattr(properties, "gcnArchName", "") or "").split(":")[0]
    hip = gfx.startswith("gfx")
    block = getattr(properties, "shared_memory_per_block_optin", 0) or getattr(properties, "shared_memory_per_block", 0)
    block = int(block) or (64 if hip else 48) * 1024
    return Target(
        name=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown",
        gpu=name,
        arch=gfx if hip else f"sm_{properties.major}{properties.minor}",
        backend="hip" if hip else "cuda",
        warp_size=int(getattr(properties, "warp_size", 0) or (64 if gfx.startswith("gfx9") else 32)),
        num_sms=sms,
        smem_bytes=block,
        smem_per_sm_bytes=max(block, int(getattr(properties, "shared_memory_per_multiprocessor", 0) or 0)),
        registers_per_sm=int(getattr(properties, "regs_per_multiprocessor", 0) or 65536),
        max_threads_per_sm=int(getattr(properties, "max_threads_per_multi_processor", 0) or 1024),
        l2_bytes=int(getattr(properties, "L2_cache_size", 0) or 0),
        hbm_gbps=0.0,
        clock_mhz=0.0,
        bf16_tflops=0.0,
        source="read from the driver; bandwidth and peaks unknown",
    )
