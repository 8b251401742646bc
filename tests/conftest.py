"""Shared by every test: a cache folder and an environment of their own, the `gpu` marker, `--update-golden`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import selection

ROOT = Path(__file__).resolve().parent.parent

# One thread a process, where no GPU waits for its references: what tests compute is small, and threads that spin while they
# wait for each other took most of the time of many tests. Before torch and NumPy are loaded, and for processes of tests, too.
if not Path("/proc/driver/nvidia/version").exists():
    for _library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

if importlib.util.find_spec("flashgen") is None:
    # A bare checkout: tests and the processes they start import the package from it.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from the templates")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped elsewhere")
    config.addinivalue_line("markers", "full_tune: tunes for real instead of with one pinned configuration")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[selection.LONG] = selection.choose(items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch.cuda is not available: no GPU, or a torch built without CUDA")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache or database, nor follows the user's settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FLASHGEN_")]:
            patch.delenv(name)
        cache, base = tmp_path_factory.mktemp("flashgen-cache"), tmp_path_factory.getbasetemp()
        patch.setenv("FLASHGEN_CACHE_DIR", str(cache))
        if "PYTEST_XDIST_WORKER" in os.environ:
            # What one process compiled (some seconds each), none of the others compiles again: files are written at once and keyed by content.
            facts = base.parent / "compiled-facts"
            facts.mkdir(exist_ok=True)
            (cache / "facts").symlink_to(facts)
        yield
