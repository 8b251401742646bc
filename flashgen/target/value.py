"""`Target`: where a kernel is to run, with the published figures that legality and prediction need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flashgen.errors import InvalidProblemError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A GPU (or the CPU, where kernels are interpreted).

    NVIDIA's words stand for AMD's too: an SM is a compute unit, shared memory the LDS, a warp a wavefront, a thread block a
    workgroup.

    Attributes:
        name: short name, key of shipped and stored results, e.g. `h100`.
        gpu: the marketing name.
        arch: `sm_90` (compute capability) or `gfx942` (AMD), or `cpu`.
        backend: Triton's word for the code generator.
        driver_names: what the driver calls this GPU, without the maker's name; nothing else is taken for it.
        warp_size: threads of a warp.
        num_sms: streaming multiprocessors.
        smem_bytes: shared memory that one thread block may use (opt-in maximum).
        smem_per_sm_bytes: shared memory of one SM.
        registers_per_sm: 32-bit registers of one SM.
        max_threads_per_sm: resident threads of one SM.
        l2_bytes: L2 cache.
        hbm_gbps: memory bandwidth, GB/s (10^9 bytes); 0 where unknown.
        clock_mhz: the clock at which the peak is reached: the published boost clock, unless `source` says otherwise; 0
            where unknown.
        bf16_tflops: peak of bf16 products with fp32 accumulation on the tensor cores, dense; 0 where unknown.
        source: where the figures are published, and which of them are doubtful.
    """

    name: str
    gpu: str
    arch: str
    backend: Literal["cuda", "hip", "cpu"] = "cuda"
    driver_names: tuple[str, ...] = ()
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
        """The compute capability as Triton's number, e.g. 90; ask `backend` first.

        Raises:
            InvalidProblemError: the target is no NVIDIA GPU.
        """
        if self.backend != "cuda":
            raise InvalidProblemError(
                f"target {self.name!r} ({self.arch}) has no compute capability: only NVIDIA GPUs have one."
            )
        return int(self.arch.removeprefix("sm_"))

    @property
    def compiler_arch(self) -> int | str:
        """The architecture in the form that `triton.backends.compiler.GPUTarget` takes: 90, or `gfx942`."""
        return self.capability if self.backend == "cuda" else self.arch

    @classmethod
    def named(cls, name: str) -> Target:
        """A known target by its short name.

        Raises:
            InvalidProblemError: the name is not known; the message lists those that are.
        """
        from flashgen.target.known import TARGETS  # its rows are Targets

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
            A known target when the driver reports one of its names and its number of SMs, else one made from the driver's
            figures (bandwidth and peaks 0: nothing is predicted for it). `flashgen doctor` says why.
        """
        import torch  # here, since specs, variants and rendering must work without it

        from flashgen.target.driver import recognise

        if device is not None:
            device = torch.device(device)
            if device.type != "cuda":  # ROCm's torch calls AMD's GPUs cuda, too
                return cls.named("cpu")
        if not torch.cuda.is_available():
            return cls.named("cpu")
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        return recognise(torch.cuda.get_device_properties(index)).target
