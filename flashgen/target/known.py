"""The known GPUs, with their published figures and where each stands.

Peaks are dense ones, of bf16 products accumulated in fp32. GeForce cards, and the A10G, run those at half the rate of fp16
accumulation; the professional cards of the same chips do not. Each peak is num_sms * FLOP a clock and SM * clock_mhz, which
`tests/unit/test_targets.py` checks, where the rate is: 512 (sm_86, sm_89 and sm_120 at half rate), 1024 (sm_89), 2048 (sm_80,
gfx942), 4096 (sm_90), 8192 (sm_100).
"""

from __future__ import annotations

from typing import TypedDict

from flashgen.target.value import Target

_KB = 1024
_MB = 1024 * 1024


class _PerBlock(TypedDict):
    """What follows from the compute capability alone."""

    arch: str
    smem_bytes: int
    smem_per_sm_bytes: int
    max_threads_per_sm: int


def _capability(arch: str, smem_per_sm_kb: int, max_threads_per_sm: int) -> _PerBlock:
    # 1 KB of each block's shared memory belongs to the system.
    return {
        "arch": arch,
        "smem_bytes": (smem_per_sm_kb - 1) * _KB,
        "smem_per_sm_bytes": smem_per_sm_kb * _KB,
        "max_threads_per_sm": max_threads_per_sm,
    }


_SM80 = _capability("sm_80", 164, 2048)
_SM86 = _capability("sm_86", 100, 1536)
_SM89 = _capability("sm_89", 100, 1536)
_SM90 = _capability("sm_90", 228, 2048)
_SM100 = _capability("sm_100", 228, 2048)
_SM120 = _capability("sm_120", 100, 1536)
_GUIDE = "; shared memory, registers and threads: CUDA C++ Programming Guide, table of compute capabilities"
_HALF = " (half rate)"

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
            driver_names=("A100-SXM4-80GB",),
            num_sms=108,
            l2_bytes=40 * _MB,
            hbm_gbps=2039.0,
            clock_mhz=1410.0,
            bf16_tflops=312.0,
            source="NVIDIA A100 Tensor Core GPU Architecture whitepaper; bandwidth: A100 80GB datasheet" + _GUIDE,
            **_SM80,
        ),
        Target(
            name="a10g",
            gpu="NVIDIA A10G",
            driver_names=("A10G",),
            num_sms=80,
            l2_bytes=6 * _MB,
            hbm_gbps=600.0,
            clock_mhz=1710.0,
            bf16_tflops=70.0,
            source="NVIDIA A10G datasheet (made for AWS, not openly published: doubtful): 70 TFLOP/s"
            + _HALF
            + ", which is also what 80 SMs give at 1710 MHz, and 600 GB/s; L2: full GA102 chip, NVIDIA Ampere GA102 whitepaper"
            + _GUIDE,
            **_SM86,
        ),
        Target(
            name="l40s",
            gpu="NVIDIA L40S",
            driver_names=("L40S",),
            num_sms=142,
            l2_bytes=96 * _MB,
            hbm_gbps=864.0,
            clock_mhz=2520.0,
            bf16_tflops=362.05,
            source="NVIDIA L40S datasheet; L2: full AD102 chip, NVIDIA Ada GPU Architecture whitepaper; clock: product "
            "brief, doubtful by 1 % (2520 MHz gives 366 TFLOP/s, the datasheet says 362.05)" + _GUIDE,
            **_SM89,
        ),
        Target(
            name="rtx3090",
            gpu="NVIDIA GeForce RTX 3090",
            driver_names=("GeForce RTX 3090",),
            num_sms=82,
            l2_bytes=6 * _MB,
            hbm_gbps=936.0,
            clock_mhz=1695.0,
            bf16_tflops=71.0,
            source="NVIDIA Ampere GA102 GPU Architecture whitepaper, bf16 with fp32 accumulate" + _HALF + _GUIDE,
            **_SM86,
        ),
        Target(
            name="rtx4090",
            gpu="NVIDIA GeForce RTX 4090",
            driver_names=("GeForce RTX 4090",),
            num_sms=128,
            l2_bytes=72 * _MB,
            hbm_gbps=1008.0,
            clock_mhz=2520.0,
            bf16_tflops=165.2,
            source="NVIDIA Ada GPU Architecture whitepaper, bf16 with fp32 accumulate" + _HALF + _GUIDE,
            **_SM89,
        ),
        Target(
            name="rtx5090",
            gpu="NVIDIA GeForce RTX 5090",
            driver_names=("GeForce RTX 5090",),
            num_sms=170,
            l2_bytes=96 * _MB,
            hbm_gbps=1792.0,
            clock_mhz=2407.0,
            bf16_tflops=209.5,
            source="NVIDIA RTX Blackwell GPU Architecture whitepaper, bf16 with fp32 accumulate" + _HALF + _GUIDE,
            **_SM120,
        ),
        Target(
            name="h100",
            gpu="NVIDIA H100 SXM5 80GB",
            driver_names=("H100 80GB HBM3",),
            num_sms=132,
            l2_bytes=50 * _MB,
            hbm_gbps=3350.0,
            clock_mhz=1830.0,
            bf16_tflops=989.4,
            source="NVIDIA H100 Tensor Core GPU Architecture whitepaper and H100 datasheet" + _GUIDE,
            **_SM90,
        ),
        Target(
            name="h200",
            gpu="NVIDIA H200 SXM 141GB",
            driver_names=("H200",),
            num_sms=132,
            l2_bytes=50 * _MB,
            hbm_gbps=4800.0,
            clock_mhz=1980.0,
            bf16_tflops=989.4,
            source="NVIDIA H200 datasheet; SMs and L2: H100 SXM5 of the H100 whitepaper, L2 doubtful (the full GH100 chip "
            "has 60 MB); clock: the driver's maximum (the peak is published for 1830 MHz)" + _GUIDE,
            **_SM90,
        ),
        Target(
            name="gh200",
            gpu="NVIDIA GH200 96GB HBM3",
            driver_names=("GH200 480GB", "GH200 120GB"),  # they count the CPU's memory; both have 96 GB of HBM3
            num_sms=132,
            l2_bytes=50 * _MB,
            hbm_gbps=4000.0,
            clock_mhz=1830.0,
            bf16_tflops=989.4,
            source="NVIDIA GH200 Grace Hopper Superchip datasheet (990 TFLOP/s, 4 TB/s); SMs, clock and L2: H100 SXM5 of "
            "the H100 whitepaper, L2 doubtful (the full GH100 chip has 60 MB)" + _GUIDE,
            **_SM90,
        ),
        Target(
            name="b200",
            gpu="NVIDIA B200 SXM (HGX, 1000 W)",
            driver_names=("B200",),
            num_sms=148,
            l2_bytes=126 * _MB,
            hbm_gbps=7700.0,
            clock_mhz=1856.0,
            bf16_tflops=2250.0,
            source="NVIDIA Blackwell datasheet, HGX B200 (earlier documents say 8 TB/s); L2: CUDA Blackwell Tuning Guide; "
            "SMs: the driver's; clock is not published: what the peak implies at 8192 FLOP a clock and SM" + _GUIDE,
            **_SM100,
        ),
        Target(
            name="mi300x",
            gpu="AMD Instinct MI300X",
            arch="gfx942",
            backend="hip",
            driver_names=("Instinct MI300X", "Instinct MI300X OAM", "Instinct MI300X VF"),
            warp_size=64,
            num_sms=304,
            smem_bytes=64 * _KB,
            smem_per_sm_bytes=64 * _KB,
            registers_per_sm=512 * _KB // 4,
            max_threads_per_sm=2048,
            l2_bytes=32 * _MB,
            hbm_gbps=5300.0,
            clock_mhz=2100.0,
            bf16_tflops=1307.4,
            source="AMD Instinct MI300X datasheet; LDS, registers (512 KiB VGPR file) and L2 (4 MiB per XCD, eight of them; the "
            "256 MiB Infinity Cache behind it not counted): AMD GPU specifications of the ROCm documentation; "
            "threads (8 waves of 64 per SIMD, four SIMDs): CDNA 3 ISA reference guide",
        ),
        CPU,
    )
}
