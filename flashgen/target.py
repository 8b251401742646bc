"""`Target`: where a kernel is to run, with the published figures that legality and prediction need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from flashgen.errors import InvalidProblemError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A GPU (or the CPU, where kernels are interpreted).

    Attributes:
        name: short name, key of shipped and stored results, e.g. `h100`.
        gpu: the marketing name.
        arch: compute capability as `sm_90`, or `cpu`.
        backend: Triton's word for the code generator.
        warp_size: threads of a warp.
        num_sms: streaming multiprocessors.
        smem_bytes: shared memory that one thread block may use (opt-in maximum).
        smem_per_sm_bytes: shared memory of one SM.
        registers_per_sm: 32-bit registers of one SM.
        max_threads_per_sm: resident threads of one SM.
        l2_bytes: L2 cache.
        hbm_gbps: memory bandwidth, GB/s (10^9 bytes).
        clock_mhz: boost clock.
        bf16_tflops: dense bf16 tensor-core peak.
        source: where the figures are published.
    """

    name: str
    gpu: str
    arch: str
    backend: Literal["cuda", "cpu"] = "cuda"
    warp_size: int = 32
    num_sms: int
    smem_bytes: int
    smem_per_sm_bytes: int
    registers_per_sm: int = 65536
    max_threads_per_sm: int = 2048
    l2_bytes: int
    hbm_gbps: float
    clock_mhz: float
    bf16_tflops: float
    source: str

    @property
    def capability(self) -> int:
        """The compute capability as Triton's number, e.g. 90. Only for CUDA targets."""
        return int(self.arch.removeprefix("sm_"))

    @classmethod
    def named(cls, name: str) -> Target:
        """A known target by its short name.

        Raises:
            InvalidProblemError: the name is not known; the message lists those that are.
        """
        try:
            return TARGETS[name.lower()]
        except KeyError:
            raise InvalidProblemError(
                f"target {name!r} is not known: allowed are {', '.join(TARGETS)}. See `flashgen show targets`."
            ) from None

    @classmethod
    def detect(cls, device: Any = None) -> Target:
        """The target that a torch device is (default: the current GPU, or the CPU where there is none).

        Args:
            device: a torch device, its name or index; None for the current one.

        Returns:
            A known target when the GPU's name matches one, else one made from the driver's figures
            (bandwidth and peaks 0: nothing is predicted for it).
        """
        import torch  # here, since specs, variants and rendering must work without it

        if device is not None:
            device = torch.device(device)
            if device.type != "cuda":
                return CPU
        if not torch.cuda.is_available():
            return CPU
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        return _from_properties(torch.cuda.get_device_properties(index))


def _from_properties(properties: Any) -> Target:
    name = str(properties.name)
    arch = f"sm_{properties.major}{properties.minor}"
    for target in TARGETS.values():
        pattern = rf"\b{target.name}\b"
        if (
            target.arch == arch
            and re.search(pattern, name, re.IGNORECASE)
            and target.num_sms == properties.multi_processor_count
        ):
            return target
    return Target(
        name=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        gpu=name,
        arch=arch,
        num_sms=properties.multi_processor_count,
        smem_bytes=properties.shared_memory_per_block_optin,
        smem_per_sm_bytes=properties.shared_memory_per_multiprocessor,
        registers_per_sm=properties.regs_per_multiprocessor,
        max_threads_per_sm=properties.max_threads_per_multi_processor,
        l2_bytes=properties.L2_cache_size,
        hbm_gbps=0.0,
        clock_mhz=0.0,
        bf16_tflops=0.0,
        source="read from the driver; bandwidth and peaks unknown",
    )


_KB = 1024
_HOPPER = {
    "arch": "sm_90",
    "num_sms": 132,
    "smem_bytes": 227 * _KB,
    "smem_per_sm_bytes": 228 * _KB,
    "l2_bytes": 50 * _KB * _KB,
}
_GUIDE = "; shared memory and registers: CUDA C++ Programming Guide, compute capabilities"

CPU = Target(
    name="cpu",
    gpu="none (kernels are interpreted)",
    arch="cpu",
    backend="cpu",
    num_sms=1,
    smem_bytes=227 * _KB,
    smem_per_sm_bytes=228 * _KB,
    l2_bytes=0,
    hbm_gbps=0.0,
    clock_mhz=0.0,
    bf16_tflops=0.0,
    source="no figures: nothing is predicted for the interpreter",
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="a100",
            gpu="NVIDIA A100-SXM4-80GB",
            arch="sm_80",
            num_sms=108,
            smem_bytes=163 * _KB,
            smem_per_sm_bytes=164 * _KB,
            l2_bytes=40 * _KB * _KB,
            hbm_gbps=2039.0,
            clock_mhz=1410.0,
            bf16_tflops=312.0,
            source="NVIDIA A100 Tensor Core GPU Architecture whitepaper and 80GB datasheet" + _GUIDE,
        ),
        Target(
            name="h100",
            gpu="NVIDIA H100 SXM5 80GB",
            hbm_gbps=3350.0,
            clock_mhz=1830.0,
            bf16_tflops=989.4,
            source="NVIDIA H100 Tensor Core GPU Architecture whitepaper and H100 datasheet" + _GUIDE,
            **_HOPPER,  # type: ignore[arg-type]  # one literal dict for both Hopper cards
        ),
        Target(
            name="h200",
            gpu="NVIDIA H200 SXM 141GB",
            hbm_gbps=4800.0,
            clock_mhz=1980.0,
            bf16_tflops=989.4,
            source="NVIDIA H200 datasheet; the GH100 chip of the H100 whitepaper" + _GUIDE,
            **_HOPPER,  # type: ignore[arg-type]
        ),
        CPU,
    )
}
