"""The house of ARCHITECTURE.md, held: a module imports only from rows above its own. Reads text, imports nothing."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "flashgen"

# Rooms (modules and packages directly below flashgen) in import order. Rooms of one row may not import each other;
# inside a package everything may. A new room stands nowhere yet: place it, and say where in ARCHITECTURE.md.
ROWS = (
    ("errors",),
    ("settings", "assets", "plot", "stream_capture", "launches", "patience", "lineless", "garbage"),
    ("compiling", "replays"),
    ("mods",),
    ("spec",),
    ("config",),
    ("target",),
    ("presets", "checks"),
    ("problem",),
    ("variants",),
    ("coverage",),
    ("render",),
    ("jit",),
    ("build",),
    ("simulator",),
    # The frames that workers talk in, and the interpreting worker itself.
    ("interpret_worker",),
    ("disassembly",),
    ("sass", "gcn", "facts_gluon"),
    ("facts",),
    ("compile_pool", "compile_worker"),
    ("costmodel", "proof"),
    ("reference",),
    ("accuracy",),
    ("mutation", "gradients"),
    ("mutation_backward",),
    ("interpret",),
    ("store",),
    ("torch_blocked", "bench"),
    ("dispatch",),
    ("memory",),
    ("probe", "scalars"),
    ("mask_words", "graph_memory"),
    ("block_ranges", "block_lists"),
    ("operands",),
    ("samples", "shared_masks"),
    ("stand_ins",),
    ("execution",),
    ("ops",),
    ("autograd",),
    ("recorded", "mod_ops"),
    ("mod_graphs",),
    ("compiled",),
    ("warm", "uncompiled", "merging"),
    ("api", "offline"),
    ("integrations", "peers"),
    ("tuner",),
    ("exporter",),
    ("report",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, row in enumerate(ROWS) for room in row}

# Imports that go upwards, inside a function or for the type checker alone, each with its reason.
UPWARDS = {
    ("offline", "tuner"): "tune() alone",
    ("offline", "exporter"): "export() alone",
    ("facts", "compile_pool"): "compile_facts() compiles in a worker, and the pool hands out facts",
}
STORE_MAY = {"store", "errors", "settings", "assets"}
PURE = ("errors", "assets", "spec", "config", "presets", "variants", "render")


def files(room: str) -> list[Path]:
    """The module, or every module of the package."""
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def rooms() -> list[str]:
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return sorted(found - {"__init__"})


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module that `from ... import` names, dots resolved."""
    if not node.level:
        return node.module or ""
    folders = ("flashgen", *path.relative_to(PACKAGE).parts[:-1])
    return ".".join((*folders[: len(folders) - node.level + 1], *filter(None, (node.module,))))


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """Every imported name with its line, dotted in full: `from flashgen import spec` is flashgen.spec."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def loaded_with(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: function bodies and `if TYPE_CHECKING:` are left out."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


@functools.cache
def imported(path: Path, *, when_loaded: bool = False) -> tuple[tuple[str, int], ...]:
    """What a file imports, ever or when it is loaded; read once for all tests."""
    tree = ast.parse(path.read_text())
    return tuple(imports(loaded_with(tree) if when_loaded else tree, path))


@functools.cache
def edges(*, when_loaded: bool) -> dict[str, dict[str, str]]:
    """Room -> rooms it imports -> the place of one such import."""
    found: dict[str, dict[str, str]] = {}
    for room in rooms():
        targets = found.setdefault(room, {})
        for path in files(room):
            for name, line in imported(path, when_loaded=when_loaded):
                parts = name.split(".")
                if parts[0] == "flashgen" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != room:
                    targets[parts[1]] = f"flashgen/{path.relative_to(PACKAGE)}:{line}"
    return found


def reachable(start: str, graph: dict[str, dict[str, str]]) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        for room in graph.get(todo.pop(), {}):
            if room not in seen:
                seen.add(room)
                todo.append(room)
    return seen


def test_every_module_has_its_place() -> None:
    lost = [room for room in rooms() if room not in FLOOR]
    assert not lost, f"{lost} stand in no row of ROWS: place them where everything they import is above"
    assert len(FLOOR) == sum(map(len, ROWS)), "a room stands in two rows"


def test_imports_go_up_the_list_only() -> None:
    wrong = [
        f"{place}: {room} imports {target}, which stands {'beside' if FLOOR[room] == FLOOR[target] else 'below'} it"
        for room, targets in edges(when_loaded=False).items()
        for target, place in targets.items()
        if room in FLOOR and FLOOR[target] >= FLOOR[room] and (room, target) not in UPWARDS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_exceptions_import_inside_a_function() -> None:
    now, ever = edges(when_loaded=True), edges(when_loaded=False)
    for (room, target), reason in UPWARDS.items():
        place = now.get(room, {}).get(target)
        assert place is None, f"{place}: {room} loads {target} when it is imported; allowed is only: {reason}"
        assert target in ever[room], f"{room} no longer imports {target}: drop the exception"


def test_the_package_itself_loads_nothing() -> None:
    path = PACKAGE / "__init__.py"
    names = {name for name, _ in imported(path, when_loaded=True)}
    assert {name.split(".")[0] for name in names} <= {"__future__", "importlib", "typing"}, names


def test_the_store_is_a_leaf() -> None:
    used = edges(when_loaded=False)["store"]
    assert set(used) <= STORE_MAY, {room: place for room, place in used.items() if room not in STORE_MAY}
    for path in files("store"):
        for name, line in imported(path):
            assert name.split(".")[0] not in ("torch", "triton"), f"{path}:{line} imports {name}"


@pytest.mark.parametrize("start", ["dispatch", "ops"])
def test_a_call_never_reaches_the_tuner(start: str) -> None:
    assert not reachable(start, edges(when_loaded=False)) & {"tuner", "exporter", "cli"}


def test_nothing_but_the_command_line_and_tune_imports_the_tuner() -> None:
    users = {room for room, targets in edges(when_loaded=False).items() if "tuner" in targets}
    assert users <= {"offline", "cli"}


@pytest.mark.parametrize("room", PURE)
def test_rendering_names_neither_torch_nor_triton(room: str) -> None:
    for path in files(room):
        for name, line in imported(path):
            assert name.split(".")[0] not in ("torch", "triton"), f"{path}:{line} imports {name}"


def test_rendering_works_where_neither_torch_nor_triton_is() -> None:
    """What the wheel test shows for the wheel, here for whatever a pure module imports in turn."""
    code = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None  # importing them is an ImportError
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name
print(render(AttentionSpec.from_key("attention_fwd-bf16-d128-causal"), by_name("triton_fwd")).digest)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) == 64


def test_the_reader_of_imports_sees_every_kind() -> None:
    text = """
import flashgen.spec as a
from flashgen import tuner
from . import models
from ..errors import FlashgenError
if TYPE_CHECKING:
    from flashgen.api import tune
def f():
    import_module("flashgen.cli")
"""
    path = PACKAGE / "store" / "x.py"
    every = {name for name, _ in imports(ast.parse(text), path)}
    assert every == {
        "flashgen.spec",
        "flashgen.tuner",
        "flashgen.store.models",
        "flashgen.errors.FlashgenError",
        "flashgen.api.tune",
        "flashgen.cli",
    }
    now = {name for name, _ in imports(loaded_with(ast.parse(text)), path)}
    assert every - now == {"flashgen.api.tune", "flashgen.cli"}
