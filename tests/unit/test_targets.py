"""The known GPUs: their figures fit together, and an installed one is recognised by its whole name or not at all."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashgen import AttentionSpec, InvalidProblemError, Problem, Target
from flashgen.cli.main import run
from flashgen.costmodel import predict
from flashgen.facts import CompiledFacts
from flashgen.target import TARGETS
from flashgen.target.driver import recognise
from flashgen.variants import REGISTRY, by_name

GPUS = [target for target in TARGETS.values() if target.backend != "cpu"]
# FLOP of dense bf16 products with fp32 accumulation a clock and SM.
RATES = {
    "a100": 2048,
    "a10g": 512,
    "l40s": 1024,
    "rtx3090": 512,
    "rtx4090": 512,
    "rtx5090": 512,
    "h100": 4096,
    "h200": 4096,
    "gh200": 4096,
    "b200": 8192,
    "mi300x": 2048,
}


def properties(name: str, sms: int, **more: Any) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` returns, of CUDA's torch unless a gcnArchName is given."""
    values = {
        "major": 9,
        "minor": 0,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "shared_memory_per_multiprocessor": 228 * 1024,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "L2_cache_size": 50 * 1024 * 1024,
        "warp_size": 32,
        **more,
    }
    return SimpleNamespace(name=name, multi_processor_count=sms, **values)


def test_every_gpu_of_the_list_is_there() -> None:
    assert set(RATES) == {target.name for target in GPUS}
    assert {target.arch for target in GPUS} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_a_peak_is_its_sms_times_their_rate_at_the_clock(target: Target) -> None:
    # The H200's clock is the driver's maximum, 8 % above the one its peak is published for; all others agree to 1.3 %.
    peak = target.num_sms * RATES[target.name] * target.clock_mhz * 1e-6
    assert peak == pytest.approx(target.bf16_tflops, rel=0.09 if target.name == "h200" else 0.013)
    assert len(target.source) > 60 and (
        "doubtful" in target.source or "datasheet" in target.source or "whitepaper" in target.source
    )


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_limits_of_an_architecture(target: Target) -> None:
    blocks = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    threads = {"sm_86": 1536, "sm_89": 1536, "sm_120": 1536}
    assert target.smem_bytes == blocks[target.arch] * 1024
    assert target.smem_per_sm_bytes - target.smem_bytes == (0 if target.backend == "hip" else 1024)
    assert target.max_threads_per_sm == threads.get(target.arch, 2048)
    assert (target.warp_size, target.registers_per_sm) == ((64, 131072) if target.backend == "hip" else (32, 65536))
    if target.backend == "cuda":
        assert target.compiler_arch == target.capability == int(target.arch[3:])
    else:
        assert target.compiler_arch == "gfx942"
        with pytest.raises(InvalidProblemError, match=r"mi300x.*gfx942.*no compute capability"):
            _ = target.capability


@pytest.mark.parametrize(
    ("name", "sms", "target"),
    [
        ("NVIDIA A100-SXM4-80GB", 108, "a100"),
        ("A100-SXM4-80GB", 108, "a100"),  # drivers before 470 leave the maker out
        ("NVIDIA A10G", 80, "a10g"),
        ("NVIDIA L40S", 142, "l40s"),
        ("NVIDIA GeForce RTX 3090", 82, "rtx3090"),
        ("NVIDIA GeForce RTX 4090", 128, "rtx4090"),
        ("NVIDIA GeForce RTX 5090", 170, "rtx5090"),
        ("NVIDIA H100 80GB HBM3", 132, "h100"),
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA GH200 480GB", 132, "gh200"),
        ("NVIDIA B200", 148, "b200"),
    ],
)
def test_the_drivers_names(name: str, sms: int, target: str) -> None:
    found = recognise(properties(name, sms))
    assert found.known and found.target == Target.named(target)


@pytest.mark.parametrize("name", ["AMD Instinct MI300X", "AMD Instinct MI300X OAM", "AMD Instinct MI300X VF"])
def test_an_amd_gpu_is_recognised(name: str) -> None:
    assert recognise(properties(name, 304, minor=4, gcnArchName="gfx942:sramecc+:xnack-")).target.name == "mi300x"


@pytest.mark.parametrize(
    ("name", "sms", "says"),
    [
        ("NVIDIA H100 PCIe", 114, ["not h100", "NVIDIA H100 SXM5 80GB", "114 SMs, not 132"]),
        ("NVIDIA H100 NVL", 132, ["not h100", "another name"]),
        ("NVIDIA H200 NVL", 132, ["not h200", "another name"]),
        ("NVIDIA GH200 144G HBM3e", 132, ["not gh200", "NVIDIA GH200 96GB HBM3"]),
        ("NVIDIA A100-SXM4-40GB", 108, ["not a100", "A100-SXM4-80GB"]),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, ["not rtx4090", "76 SMs, not 128"]),
        ("NVIDIA GeForce RTX 3090 Ti", 84, ["not rtx3090"]),
        ("NVIDIA H100 80GB HBM3", 16, ["has 16 SMs where h100 has 132", "a slice"]),
        ("NVIDIA GB200", 148, ["not b200"]),
        ("NVIDIA A10", 72, ["not among the known GPUs", "a10g"]),
        ("Some GPU", 10, ["not among the known GPUs", "mi300x"]),
    ],
)
def test_another_gpu_is_told_apart_and_how_to_proceed(name: str, sms: int, says: list[str]) -> None:
    found = recognise(properties(name, sms))
    assert not found.known and found.target.name not in TARGETS
    assert found.target.num_sms == sms and found.target.hbm_gbps == found.target.bf16_tflops == 0
    for text in (*says, name, "nothing is predicted", "flashgen tune", repr(found.target.name)):
        assert text in found.note


def test_a_gpu_too_old_is_told_so() -> None:
    found = recognise(properties("Tesla V100-SXM2-16GB", 80, major=7))
    assert found.target.arch == "sm_70" and "compute capability 8.0" in found.note and "torch backend" in found.note
    reason = by_name("triton_fwd").supports(AttentionSpec(dtype="fp16", head_dim=64, head_dim_v=64), found.target)
    assert reason is not None and "8.0" in reason


def test_rocms_torch_may_lack_figures() -> None:
    """ROCm's properties have no opt-in shared memory, in some versions no registers either."""
    bare = SimpleNamespace(
        name="AMD Instinct MI250X", major=9, minor=0, multi_processor_count=104, gcnArchName="gfx90a:sramecc+:xnack-"
    )
    target = recognise(bare).target
    assert (target.backend, target.arch, target.warp_size, target.smem_bytes) == ("hip", "gfx90a", 64, 64 * 1024)
    assert target.name == "amd-instinct-mi250x" and target.smem_per_sm_bytes >= target.smem_bytes
    spec = AttentionSpec(dtype="bf16", head_dim=128, head_dim_v=128)
    variant = by_name("triton_fwd")
    assert (
        variant.supports(spec, target) is None and variant.illegal(spec, target, variant.default(spec, target)) is None
    )


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: SimpleNamespace) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=0: gpus[device])


def test_detect_reads_the_current_or_the_named_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, properties("NVIDIA L40S", 142), properties("NVIDIA H100 PCIe", 114))
    assert Target.detect().name == Target.detect("cuda").name == Target.detect("cuda:0").name == "l40s"
    assert Target.detect("cuda:1").name == "nvidia-h100-pcie"
    assert Target.detect("cpu").name == "cpu"


def test_doctor_names_each_gpu_and_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The backends would run on the GPU that is not there.
    monkeypatch.setattr("flashgen.cli.doctor._backends", lambda broken: {})
    fake_gpus(monkeypatch, properties("NVIDIA H100 80GB HBM3", 132), properties("NVIDIA H100 PCIe", 114))
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "GPU 0         NVIDIA H100 80GB HBM3 (sm_90, 132 SMs): known, with the published figures" in shown
    assert "GPU 1         NVIDIA H100 PCIe (sm_90, 114 SMs): NVIDIA H100 PCIe is not h100" in shown
    assert "target        h100" in shown


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim"),
    list(itertools.product((t.name for t in GPUS), ("fp16", "fp32"), (1, 64, 80, 128, 192, 256))),
)
def test_every_gpu_has_a_default_that_is_legal(target: str, dtype: str, head_dim: int) -> None:
    spec, where = AttentionSpec(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim), Target.named(target)  # type: ignore[arg-type]
    for variant in REGISTRY:
        if variant.supports(spec, where) is None and variant.knobs:
            default = variant.default(spec, where)
            assert variant.illegal(spec, where, default) is None
            assert default in [row.config for row in variant.known_good(spec, where)]
            # A Hopper kernel of a large head dim hardly has a choice: shared memory and registers leave a handful.
            assert len(variant.space(spec, where)) >= (6 if variant.modelled else 4)


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_a_forecast_is_given_for_every_gpu_and_called_uncalibrated(target: Target) -> None:
    facts = CompiledFacts(
        arch=target.arch,
        triton_version="3.9.0",
        n_regs=128,
        spill_store_bytes=0,
        spill_load_bytes=0,
        stack_bytes=0,
        smem_bytes=32768,
        num_warps=4,
        serialised=False,
        undefined_registers=0,
        loop={"total": 100, "mufu": 33, "fp32": 84},
        compile_s=1.0,
    )
    config = by_name("triton_fwd").config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
    forecast = predict(facts, Problem.preset("llama3-8b", seqlen=2048, batch=1), target, config)
    assert forecast.cost > 0
    assert forecast.calibrated == (target.name in ("h100", "h200"))
