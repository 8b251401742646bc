"""The inline PTX of held references, statement by statement on the 32 lanes of a warp, beside what the simulator takes it for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from flashgen.simulator import held

Lanes = Any  # 32 numbers or truth values, or one for all lanes
F32 = np.float32


def shuffled(x: Lanes, mask: int) -> Lanes:
    return x[np.arange(32) ^ mask]


def run(text: str, registers: dict[str, Lanes]) -> tuple[dict[str, Lanes], int]:
    """Registers after a text, and how many statements ran; a branch must be taken by all lanes or none."""
    r, ran, skip = dict(registers), 0, ""
    body = text.removeprefix("{ ").removesuffix(" }").replace(": ", ":; ").replace(":", ": ", 0)
    for statement in re.split(r"; ?", body.replace("HELD:", "HELD:;").replace("SAME:", "SAME:;")):
        words = re.findall(r"[^\s,]+", statement)
        if not words or words[0] == ".reg" or words[0].endswith(":"):
            skip = "" if words and words[0] == skip + ":" else skip
            continue
        if skip:
            continue
        ran += 1
        value = [r[w] if w in r else held_number(w) for w in words[2:]] if words[0][0] != "@" else []
        match words[0].split("."):
            case ["mul", "f32"]:
                r[words[1]] = value[0] * value[1]
            case ["fma", "rn", "f32"]:
                r[words[1]] = (value[0].astype(np.float64) * value[1] + value[2]).astype(F32)
            case ["sub", "f32"]:
                r[words[1]] = value[0] - value[1]
            case ["neg", "f32"]:
                r[words[1]] = -value[0]
            case ["max", "f32"]:
                r[words[1]] = np.fmax(value[0], value[1])
            case ["min", "f32"]:
                r[words[1]] = np.fmin(value[0], value[1])
            case ["mov", "f32"]:
                r[words[1]] = value[0] + np.zeros(32, F32)
            case ["lg2", *_]:
                r[words[1]] = np.log2(value[0])
            case ["ex2", *_]:
                r[words[1]] = np.exp2(value[0])
            case ["setp", relation, *more]:
                holds = value[0] > value[1] if relation == "gt" else ~(value[0] == value[1])
                r[words[1]] = holds | value[2] if "or" in more else holds
            case ["vote", "sync", "any", "pred"]:
                r[words[1]] = np.full(32, value[0].any())
            case ["shfl", "sync", "bfly", "b32"]:
                r[words[1]] = shuffled(value[0], int(words[3]))
            case [branch, *_] if branch.startswith("@!"):
                taken = ~r[branch[2:]]
                assert taken.all() or not taken.any()
                skip = words[2] if taken.all() else ""
            case _:
                raise AssertionError(f"unknown statement {statement!r}")
    return r, ran


def held_number(word: str) -> Lanes:
    return np.uint32(int(word[2:], 16)).view(F32) if word.startswith("0f") else int(word, 0)


def of_lanes(tensor: Lanes) -> tuple[Lanes, Lanes]:
    """Rows r and r + 8 of a 16 x 4 tensor, as the 32 lanes hold them."""
    return tensor[:8].reshape(32), tensor[8:].reshape(32)


@pytest.mark.parametrize("seed", range(40))
def test_references(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = F32(0.18)
    reference = np.repeat(rng.normal(0, 3, (16, 1)), 4, 1).astype(F32)
    sums = rng.choice([0.0, 0.5, 1.0, 4.0, 40.0, 1e6], (16, 4)).astype(F32)
    # Few rows or none are above their share; some have seen no key, or see none now.
    largest = ((reference + rng.normal(-3, (0.5, 2, 6)[seed % 3], (16, 4))) / scale).astype(F32)
    if seed % 4 == 0:
        reference[rng.integers(16)] = np.finfo(F32).min
    if seed % 4 == 1:
        largest[rng.integers(16)] = -np.inf
    operands = {}
    for first, tensor in ((0, reference), (4, largest), (8, np.full((16, 4), scale)), (10, sums)):
        for i, lanes in enumerate(of_lanes(tensor)):
            operands[f"${first + i}"] = lanes
    with np.errstate(divide="ignore", over="ignore"):
        found, _ = run(held.HOLD, operands)
        wanted = held.hold(largest, reference, scale, sums)
    for first, tensor in ((0, wanted[0]), (2, wanted[1])):
        for i, lanes in enumerate(of_lanes(tensor)):
            np.testing.assert_allclose(found[f"${first + i}"], lanes, rtol=1e-6)


def test_a_held_warp_jumps() -> None:
    ones = np.ones(32, F32)
    operands = {f"${i}": ones for i in (0, 1, 4, 5, 10, 11)} | {"$8": ones, "$9": ones}
    _, short = run(held.HOLD, operands)
    _, long = run(held.HOLD, {**operands, "$4": np.where(np.arange(32) == 17, F32(3), ones)})
    assert short == 18 and long == short + 18


@pytest.mark.parametrize("count", [32, 64, 128])
def test_corrections(count: int) -> None:
    """Each register by its own row's correction; a warp whose corrections are all 1 multiplies nothing."""
    rng = np.random.default_rng(count)
    values = [rng.normal(size=32).astype(F32) for _ in range(count)]
    for alphas in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.25)):
        operands = {f"${i}": value for i, value in enumerate(values)}
        operands |= {f"${2 * count + i}": np.full(32, alphas[i >> 1 & 1], F32) for i in range(count)}
        found, ran = run(held.rescale(count), operands)
        assert ran == 4 + (count if alphas != (1.0, 1.0) else 0)
        for i, value in enumerate(values):
            np.testing.assert_array_equal(found[f"${i}"], value * F32(alphas[i >> 1 & 1]))


def test_another_text_is_not_known() -> None:
    assert held.parse(held.HOLD) is held.hold and held.parse(held.rescale(64)) is np.multiply
    for old, new in (("0f41000000", "0f41800000"), ("setp.gt.or", "setp.gt"), ("bfly.b32 u, t, 2", "bfly.b32 u, t, 1")):
        assert held.parse(held.HOLD.replace(old, new)) is None
    assert held.parse(held.rescale(64).replace("mul.f32 $3, $3, $131", "mul.f32 $3, $3, $128")) is None
