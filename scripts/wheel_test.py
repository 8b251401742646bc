"""Build sdist and wheel, install the wheel outside the checkout, and use it there.

    python scripts/wheel_test.py

Rendering a kernel and reading a shipped row need neither torch nor triton, so the clean environment gets the few light
dependencies only and the test stays short. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
LIGHT = ("click", "filelock", "jinja2", "platformdirs", "rich")

# Run by the clean environment's Python: no torch, no triton, no checkout in sight.
USE = """
import sys
from importlib.util import find_spec
from pathlib import Path
import flashgen
from flashgen.assets import seeds_dir
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import seeds
from flashgen.variants import by_name

assert Path(flashgen.__file__).is_relative_to(sys.prefix), f"not the installed package: {flashgen.__file__}"
assert find_spec("torch") is None and find_spec("triton") is None, "the environment is not clean"
source = render(AttentionSpec.from_key("attention_fwd-bf16-d128-causal"), by_name("triton_fwd"))
assert "def attention_fwd(" in source.text and "def launch(" in source.text
rows = [row for gpu in seeds.gpus() for row in seeds.load(gpu, "attention_fwd")]
assert rows, f"no shipped rows below {seeds_dir()}"
print(f"rendered {source.name}")
print(f"read {len(rows)} shipped rows of {', '.join(seeds.gpus())}; the first: {rows[0].spec_key} {rows[0].config}")
"""

# Run by this Python, which has torch: the installed package computes.
CALL = """
import sys
from pathlib import Path
import torch
import flashgen

assert Path(flashgen.__file__).is_relative_to(sys.argv[1]), f"not the installed package: {flashgen.__file__}"
q = torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(0))
expected = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, is_causal=True).transpose(1, 2)
torch.testing.assert_close(flashgen.attention(q, q, q, causal=True), expected)
print("flashgen.attention computes from the wheel")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Run a command in an environment that does not see the checkout; loud where it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASHGEN_", "PYTHON"))}
    parts = [str(part) for part in command]
    result = subprocess.run(parts, cwd=cwd, check=False, env={**kept, **environment})
    if result.returncode:
        raise SystemExit(f"wheel test failed: exit code {result.returncode} of {' '.join(parts[:6])} ...")


def build(outside: Path) -> Path:
    """Build the sdist, the wheel from it, and the wheel from the checkout; both wheels must hold the same.

    Returns:
        The wheel that came from the sdist.
    """
    # The build environment obeys the pins too; a copy, since pip splits this variable at spaces.
    pins = outside / "constraints.txt"
    pins.write_text((CHECKOUT / "constraints.txt").read_text())
    for folder, options in (("from-sdist", ()), ("from-checkout", ("--wheel",))):
        command = (sys.executable, "-m", "build", *options, "--outdir", outside / folder, CHECKOUT)
        run(*command, cwd=outside, PIP_CONSTRAINT=str(pins))
    (wheel,), (direct,) = (outside / "from-sdist").glob("*.whl"), (outside / "from-checkout").glob("*.whl")
    names, others = contents(wheel), contents(direct)
    if names != others:
        raise SystemExit(f"the sdist is incomplete, or not clean: {sorted(names ^ others)} in one wheel only")
    return wheel


def contents(wheel: Path) -> set[str]:
    """The names in a wheel, after a look at what should not be there and what must."""
    listed = zipfile.ZipFile(wheel).namelist()
    names = set(listed)
    if len(listed) != len(names):
        raise SystemExit(f"{wheel.name} holds a file twice")
    strangers = {name.split("/")[0] for name in names if not name.startswith(("flashgen/", "flashgen-"))}
    if strangers:
        raise SystemExit(f"{wheel.name} puts {sorted(strangers)} beside flashgen")
    litter = [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    if litter:
        raise SystemExit(f"{wheel.name} holds bytecode: {litter}")
    for source in ("templates", "tuning_db"):
        wanted = {
            f"flashgen/{path.relative_to(CHECKOUT).as_posix()}"
            for path in (CHECKOUT / source).rglob("*")
            if path.is_file()
        }
        if not wanted or wanted - names:
            raise SystemExit(f"{wheel.name} lacks {sorted(wanted - names) or source}")
    if "flashgen/py.typed" not in names:
        raise SystemExit(f"{wheel.name} lacks flashgen/py.typed: type checkers would ignore its types")
    return names


def main() -> int:
    """Do it all; an exception is a failure."""
    with tempfile.TemporaryDirectory(prefix="flashgen-wheel-") as folder:
        outside = Path(folder).resolve()
        wheel = build(outside)
        with tarfile.open(next((outside / "from-sdist").glob("*.tar.gz"))) as sdist:
            print(f"{wheel.name}: {len(contents(wheel))} files; sdist: {len(sdist.getnames())}")

        run(sys.executable, "-m", "venv", "clean", cwd=outside)
        python = outside / "clean" / "bin" / "python"
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        run(*pip, "--constraint", outside / "constraints.txt", *LIGHT, cwd=outside)
        run(*pip, "--no-deps", wheel, cwd=outside)
        run(python, "-c", USE, cwd=outside)

        # The heavy packages are this environment's; the package is the wheel's, first on the path.
        target = outside / "target"
        run(*pip, "--no-deps", "--target", target, wheel, cwd=outside)
        run(sys.executable, "-c", CALL, target, cwd=outside, PYTHONPATH=str(target))
    print("wheel test passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
