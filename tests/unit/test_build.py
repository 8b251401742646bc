"""Rendered kernels on disk: written once, atomically, readable; processes that start at once do not collide."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashgen import AttentionSpec, BuildError
from flashgen.build import load_module, write_source
from flashgen.render import KernelSource, render
from flashgen.variants import by_name

SPEC = AttentionSpec(dtype="bf16", head_dim=64, head_dim_v=64, causal=True)
SOURCE = render(SPEC, by_name("triton_fwd"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_written_once_under_its_name_and_readable(own_cache: Path) -> None:
    path = write_source(SOURCE)
    assert path == own_cache / "kernels" / f"{SPEC.key}-{SOURCE.digest[:8]}.py"
    assert path.read_text() == SOURCE.text and path.stat().st_mode & 0o444 == 0o444
    before = path.stat()
    assert write_source(SOURCE) == path and path.stat().st_mtime_ns == before.st_mtime_ns
    path.write_text("torn")
    assert write_source(SOURCE).read_text() == SOURCE.text
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_processes_that_start_at_once_do_not_collide(own_cache: Path) -> None:
    code = (
        "import sys, time; from flashgen.build import write_source; from flashgen.render import render\n"
        "from flashgen.spec import AttentionSpec; from flashgen.variants import by_name\n"
        "sources = [render(AttentionSpec.from_key(f'attention_fwd-bf16-d{d}'), by_name('triton_fwd')) for d in range(1, 60)]\n"
        "time.sleep(max(0.0, float(sys.argv[1]) - time.time()))\n"
        "assert all(write_source(source).read_text() == source.text for source in sources)\n"
    )
    command = [sys.executable, "-c", code, str(time.time() + 2.0)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    names = [path.name for path in (own_cache / "kernels").iterdir()]
    assert len(names) == 59 and not any(name.startswith(".") for name in names)


def test_a_cache_that_cannot_be_written_names_the_way_out(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = own_cache / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(blocked))
    with pytest.raises(BuildError, match="FLASHGEN_CACHE_DIR"):
        write_source(SOURCE)


def test_a_file_that_does_not_import_is_a_build_error() -> None:
    broken = KernelSource(text="import nothing_of_that_name\n", spec=SPEC, variant="triton_fwd")
    with pytest.raises(BuildError, match="nothing_of_that_name"):
        load_module(write_source(broken))
