"""`import flashgen` is free: no heavy package, no disk, no thread, and next to no time beside `import torch`."""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"triton", "optuna", "sqlalchemy", "alembic", "jinja2", "rich", "platformdirs", "click", "torch"}

# What the process does to files is seen by an audit hook, so that reads count too. Bytecode is not written (-B).
WATCH = """
import json, os, sys, threading
opened, changed = [], []
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "sqlite3.connect",
           "socket.connect", "subprocess.Popen")
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        opened.append(os.fsdecode(path))
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            changed.append(["open", os.fsdecode(path)])
    elif event in CHANGES:
        changed.append([event, repr(arguments)])
def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
{before}
modules, threads = set(sys.modules), tasks()
sys.addaudithook(watch)
{statement}
found = {{name.split(".")[0] for name in set(sys.modules) - modules}}
seen = [path for path in opened if not path.endswith((".py", ".pyc", ".so"))]
print(json.dumps(dict(modules=sorted(found), changed=changed, seen=seen, threads=tasks() - threads)))
"""


def environment(home: Path) -> dict[str, str]:
    """A user's environment whose folders do not exist."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASHGEN_", "XDG_"))}
    return {**kept, "HOME": str(home), "FLASHGEN_CACHE_DIR": str(home / "cache"), "XDG_CACHE_HOME": str(home / "xdg")}


def python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-B", *arguments], cwd=ROOT, env=environment(home), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


def watched(statement: str, home: Path, before: str = "") -> dict[str, list[str]]:
    code = WATCH.format(before=before, statement=statement)
    answer: dict[str, list[str]] = json.loads(python("-c", code, home=home).stdout.splitlines()[-1])
    return answer


def test_importing_loads_nothing_heavy_and_touches_nothing(tmp_path: Path) -> None:
    home = tmp_path / "nobody"
    seen = watched("import flashgen", home)
    assert not HEAVY & set(seen["modules"])
    assert seen["changed"] == []
    assert seen["seen"] == [], "only modules may be read"
    assert seen["threads"] == 0
    assert not home.exists()


def test_the_public_function_costs_torch_alone(tmp_path: Path) -> None:
    home = tmp_path / "nobody"
    seen = watched("import flashgen; flashgen.attention, flashgen.tune, flashgen.explain", home, before="import torch")
    assert not HEAVY & set(seen["modules"])
    assert seen["changed"] == []
    assert seen["threads"] == 0
    assert not home.exists()


def test_the_watcher_sees(tmp_path: Path) -> None:
    """A check that cannot fail is none."""
    statement = f"""
import jinja2, threading
open({str(tmp_path / "x")!r}, "w").close()
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
    seen = watched(statement, tmp_path)
    assert "jinja2" in seen["modules"]
    assert seen["changed"] == [["open", str(tmp_path / "x")]]
    assert seen["threads"] == 1


LINE = re.compile(r"import time:\s*(?P<self>\d+) \|\s*(?P<total>\d+) \|(?P<indent> +)(?P<name>\S+)")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip leaves it, bytecode beside the source: torch has its own, and compiling is no part of an import."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "flashgen", folder / "flashgen", ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(folder, quiet=1)
    return folder


def share(statement: str, home: Path, installed: Path) -> float:
    """Time of the modules that `statement` adds, as a share of `import torch`, within one process."""
    result = subprocess.run(
        [sys.executable, "-B", "-X", "importtime", "-c", f"import torch; {statement}"],
        cwd=home, env={**environment(home), "PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [match for match in map(LINE.match, result.stderr.splitlines()) if match]
    (end,) = (number for number, row in enumerate(rows) if row["name"] == "torch" and row["indent"] == " ")
    added = rows[end + 1 :]
    assert any(row["name"] == "flashgen" for row in added)
    return sum(int(row["self"]) for row in added) / int(rows[end]["total"])


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["import flashgen", "import flashgen; flashgen.attention"])
def test_importing_adds_at_most_15_percent_to_torch(statement: str, tmp_path: Path, installed: Path) -> None:
    # The best of three: a neighbour on the machine can only add.
    assert any(share(statement, tmp_path, installed) <= 0.15 for _ in range(3))
