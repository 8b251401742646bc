"""A free-form kernel reads as if written by hand: the user's expressions in the middle, and no trace of them elsewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specs import GOLDEN
from torch import Tensor

from flashgen import mods
from flashgen.render import filled, render, render_template
from flashgen.shared_masks import shared
from flashgen.spec import AttentionSpec, Mods, Op
from flashgen.variants import by_name

DOCUMENTS = torch.zeros(64, dtype=torch.int32)
TABLE = torch.zeros(4, 5, requires_grad=True)


def from_a_table(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * torch.sigmoid(TABLE[h, (q_idx - kv_idx) % 5])


def document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) & (kv_idx <= q_idx)


def spec(op: Op = "attention_fwd", *, listed: bool = False) -> AttentionSpec:
    """With score_mod and a mask: as mask_mod, or as that of a BlockMask."""
    masks = {} if listed else {"mask_mod": document}
    program, _ = mods.program(from_a_table, masks, torch.device("cpu"), document if listed else None)
    return AttentionSpec(
        op=op, dtype="bf16", head_dim=128, head_dim_v=128, has_score_mod=True, has_mask_mod=not listed, has_block_mask=listed,
        has_lse=op == "attention_fwd", mods=Mods(digest=program.digest, program=program),
    )  # fmt: skip


SPECS = {
    "attention_fwd_tables_document": ("triton_fwd", spec()),
    "attention_bwd_tables_document": ("triton_bwd", spec("attention_bwd")),
    "attention_fwd_tables_block_mask": ("triton_fwd", spec(listed=True)),
    "attention_bwd_tables_block_mask": ("triton_bwd", spec("attention_bwd", listed=True)),
    "attention_bwd_sm90_tables_document": ("gluon_bwd_sm90", spec("attention_bwd")),
    "attention_bwd_sm90_tables_block_mask": ("gluon_bwd_sm90", spec("attention_bwd", listed=True)),
    "attention_fwd_sm90_tables_document": ("gluon_fwd_sm90", spec()),
    "attention_fwd_sm90_tables_block_mask": ("gluon_fwd_sm90", spec(listed=True)),
}


_ANY_MASK = AttentionSpec(dtype="bf16", head_dim=128, head_dim_v=128, has_mask_mod=True)
SHARED = {
    "attention_fwd_sm90_any_mask_of_128": ("gluon_fwd_sm90", shared(_ANY_MASK, 128)),
    "attention_fwd_sm90_any_mask_of_32": ("gluon_fwd_sm90", shared(_ANY_MASK, 32)),
}


def golden(name: str, variant: str, given: AttentionSpec, pytestconfig: pytest.Config) -> str:
    """The text, which is the golden one."""
    text, path = render(given, by_name(variant)).text, GOLDEN / "mods" / f"{name}.py"
    if pytestconfig.getoption("update_golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "if that is what you meant: pytest tests/golden --update-golden"
    return text


@pytest.mark.parametrize("name", SPECS)
def test_the_golden(name: str, pytestconfig: pytest.Config) -> None:
    text = golden(name, *SPECS[name], pytestconfig)
    assert "* sigmoid(" in text and "visible " in text


@pytest.mark.parametrize("name", SHARED)
def test_the_golden_of_masks_that_share_a_kernel(name: str, pytestconfig: pytest.Config) -> None:
    text = golden(name, *SHARED[name], pytestconfig)
    assert "tile_slots_ptr" in text and "is_other" not in text, "its tables are never of another content"


@pytest.mark.parametrize("name", ["attention_fwd_sm90_tables_document", "attention_bwd_sm90_tables_block_mask"])
def test_lists_of_arguments_fill_their_lines(name: str) -> None:
    """Python reads what the template says; nobody scrolls through forty arguments at each call."""
    variant, given = by_name(SPECS[name][0]), SPECS[name][1]
    as_templates_say = render_template(
        str(variant.template), spec=given, variant=variant, meta={"template": f"templates/{variant.template}"}
    )
    text = render(given, variant).text
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(as_templates_say))
    assert not re.search(r"^( +)\w+,\n\1\w+,\n\1\w+,\n\1[)\]]", text, re.MULTILINE)
    assert len(text.splitlines()) < 0.72 * len(as_templates_say.splitlines())


def test_they_are_formatted_and_clean() -> None:
    beside = Path(sys.executable).parent / "ruff"
    program = str(beside) if beside.exists() else "ruff"
    paths = [str(GOLDEN / "mods" / f"{name}.py") for name in (*SPECS, *SHARED)]
    for arguments in (["format", "--check", "--diff"], ["check", "--select", "E9,F"]):
        command = [program, *arguments, "--isolated", "--no-cache", "--line-length", "120", *paths]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_other_words_for_the_same_mods_are_one_kernel() -> None:
    again = mods.program(lambda s, b, h, i, j: s * torch.sigmoid(TABLE[h, (i - j) % 5]), {"mask_mod": document}, torch.device("cpu"))[0]  # fmt: skip
    other = mods.program(lambda s, b, h, i, j: s * torch.sigmoid(TABLE[h, (i - j) % 4]), {"mask_mod": document}, torch.device("cpu"))[0]  # fmt: skip
    assert again.digest == spec().mods.digest != other.digest  # type: ignore[union-attr]


# Set anew in either branch of the compile-time choice that follows.
SET_ANEW = {("write_dq", "is_first")}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/**/*.py")), ids=lambda path: path.stem)
def test_no_branch_is_there_that_is_never_taken(path: Path) -> None:
    """A name that holds True or False may not decide alone: in a kernel it is a number, and its branch stays.

    Triton 3.6 dies of one (an assertion in its lowering): its analysis of axes leaves out what is never reached.
    """
    for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
        values: dict[str, set[bool]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value.value, bool):
                        values.setdefault(target.id, set()).add(node.value.value)
        held = {name for name, known in values.items() if len(known) == 1}  # one that holds both changes in a loop
        static = {
            id(one)
            for node in ast.walk(function)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("is not None")
            for inner in node.body
            for one in ast.walk(inner)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name) and id(node) not in static:
                if (function.name, node.test.id) in SET_ANEW:
                    continue
                assert node.test.id not in held, f"{function.name}: {ast.unparse(node.test)}"


def test_lists_fill_their_lines_but_texts_stay() -> None:
    listed = "call(\n    a,\n    b,\n)\n"
    text = (
        f'"""A kernel\n"""\n\nimport torch\n\n\n@gluon.jit\ndef kernel():\n    """Names:\n\n{listed}\n    """\n{listed}'
    )
    assert filled(text).endswith('    """Names:\n\ncall(\n    a,\n    b,\n)\n\n    """\ncall(a, b)\n')
