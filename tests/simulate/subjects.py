"""The small kernels of this folder: how each is called, and what it must compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flashgen.simulator import SimulationError, simulate

KERNELS = Path(__file__).parent / "kernels"
SCHEDULES = ("eager", "lazy", "random", "priority")


@functools.cache
def text_of(name: str) -> str:
    return (KERNELS / f"{name}.py").read_text()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


def check_matmul(text: str, **options: Any) -> None:
    for m, k, n, stages, dtype in ((130, 200, 64, 2, torch.bfloat16), (64, 72, 32, 3, torch.float16)):
        a, b = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype)
        c = nan_like(a.new_empty(m, n))
        simulate(text, {"a": a, "b": b, "c": c, "note": torch.zeros(8, dtype=torch.int32), "STAGES": stages}, **options)
        want = a.double() @ b.double()
        unit = torch.finfo(dtype).eps
        assert ((c.double() - want).abs() <= unit * want.abs() + 1e-4).all()


def check_copy(text: str, **options: Any) -> None:
    for rows, columns, stages in ((70, 100, 2), (32, 64, 3)):
        x = normal(rows, columns)
        y = nan_like(x)
        simulate(text, {"x": x, "y": y, "STAGES": stages}, **options)
        assert torch.equal(y, 2 * x)


def check_ordered_sum(text: str, **options: Any) -> None:
    x, turn = normal(7, 50), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):  # the semaphore must stand ready for the next launch
        total = torch.zeros(50)
        simulate(text, {"x": x, "total": total, "turn": turn}, **options)
        want = torch.zeros(50)
        for row in x:
            want = want + row
        assert torch.equal(total, want)  # bit for bit: the order is part of the result
        assert turn.item() == 0


def check_tickets(text: str, **options: Any) -> None:
    x, counter = normal(300), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        y = nan_like(x)
        simulate(text, {"x": x, "y": y, "counter": counter}, **options)
        assert torch.equal(y, 3 * x)
        assert counter.item() == 0


SUBJECTS: dict[str, Callable[..., None]] = {
    "matmul": check_matmul,
    "copy": check_copy,
    "ordered_sum": check_ordered_sum,
    "tickets": check_tickets,
}


def verdict(name: str, text: str, schedule: str, seed: int) -> str | None:
    """How a mutant is caught: a kind of defect, "numbers", or None where it survives."""
    try:
        SUBJECTS[name](text, schedule=schedule, seed=seed, max_steps=5_000)
    except SimulationError as error:
        return error.kind
    except AssertionError:
        return "numbers"
    return None
