"""The same emissions as Gluon, in the simulator; and both languages through the real compiler, for sm_90a."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flex_mods import MASK_MODS, SCORE_MODS
from mods_running import CPU, gluon_text, in_gluon, in_torch, triton_text
from test_mods_derivative import CASES
from test_mods_operations import CLOSE, EXACT, LOADS, scores

from flashgen import mods

# The simulator calls these mistakes, loudly: int32 that wraps round, and narrow integers outside blocks.
_NOT_SIMULATED = {"shifts too far", "overflow", "of a number"}
OPERATIONS = {name: function for name, function in {**EXACT, **LOADS, **CLOSE}.items() if name not in _NOT_SIMULATED}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_in_gluon_are_pytorchs(name: str) -> None:
    score = scores()
    found, expected = (run("score_mod", OPERATIONS[name], score, 1, 2) for run in (in_gluon, in_torch))
    bound = 4e-6 if name in CLOSE else 0
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("name", MASK_MODS)
def test_masks_in_gluon_are_pytorchs(name: str) -> None:
    score = torch.zeros(16, 16)
    found, expected = (run("mask_mod", MASK_MODS[name], score, 1, 2, 36, 32) for run in (in_gluon, in_torch))
    assert torch.equal(found, expected)


_POINTERS = {"bool": "*i1", "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64"}
_POINTERS |= {"uint8": "*u8", **{f"int{bits}": f"*i{bits}" for bits in (8, 16, 32, 64)}}


def whole_program(language: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Kernels that hold everything: name -> (text, types of pointers)."""
    made = {}
    groups = {
        "exact": EXACT,
        "loads": LOADS,
        "close": CLOSE,
        "scores": SCORE_MODS,
        "masks": MASK_MODS,
        "derivatives": {name: CASES[name] for name in ("powers", "maximum", "tanh", "erf", "a table by distance")},
    }
    dialect = mods.GLUON if language == "gluon" else mods.TRITON
    for group, functions in groups.items():
        helpers: dict[str, None] = {}
        statements: list[str] = []
        types: dict[str, str] = {"score_ptr": "*fp32", "grad_ptr": "*fp32", "out_ptr": "*fp32"}
        parameters: list[str] = []
        for number, function in enumerate(functions.values()):
            scores_too = group != "masks"
            program, _ = mods.program(
                function if scores_too else None, {} if scores_too else {"mask_mod": function}, CPU
            )
            # Tables of one name in several functions become parameters of their own.
            renamed = {row.name: f"{row.name}_of_{number}" for row in program.captures}
            if group == "derivatives":
                gradient = program.emit_derivative(dialect=dialect, like="score")
                lines, values, texts = (
                    gradient.statements,
                    (gradient.score, *(g.value for g in gradient.gradients)),
                    gradient.helpers,
                )
            else:
                emission = (program.emit_score if scores_too else program.emit_mask)(dialect=dialect, like="score")
                lines, values, texts = emission.statements, emission.results, emission.helpers
            helpers.update(dict.fromkeys(texts))
            for old, new in renamed.items():
                parts = ("ptr", *(f"{part}{d}" for part in ("stride", "size") for d in range(4)))
                for part in parts:
                    lines = tuple(line.replace(f"{old}_{part}", f"{new}_{part}") for line in lines)
            # Stored at once, since the next function takes the same names for its own values.
            kind = "gl" if language == "gluon" else "tl"
            statements += [
                *lines,
                *(f"{kind}.store(out_ptr + place, ({value}).to({kind}.float32))" for value in values),
            ]
            parameters += [
                f"{renamed[row.name]}{name.removeprefix(row.name)}"
                for row in program.captures
                for name in mods.parameters(row)
            ]
            types |= {f"{renamed[row.name]}_ptr": _POINTERS[row.dtype] for row in program.captures}
        text = (gluon_text if language == "gluon" else triton_text)(parameters, list(helpers), statements, [])
        made[group] = text, types
    return made


@pytest.mark.slow
@pytest.mark.parametrize("language", ["triton", "gluon"])
def test_every_emission_compiles_for_hopper(language: str, tmp_path: Path) -> None:
    rows = []
    for name, (text, types) in whole_program(language).items():
        path = tmp_path / f"{language}_{name}.py"
        path.write_text(text)
        rows.append([str(path), types])
    request = tmp_path / "request.json"
    request.write_text(json.dumps(rows))
    script = Path(__file__).with_name("compile_texts.py")
    done = subprocess.run([sys.executable, str(script), str(request)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(isinstance(answer, list) and "cubin" in answer for answer in answers), answers
