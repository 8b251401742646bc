#!/usr/bin/env bash
# Makes the virtual environment of a checkout, or brings it up to date. `make` calls it; see the variables there.
#   scripts/setup_venv.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?which folder?}
python=${PYTHON:-python3}
torch=${TORCH_INSTALL:-torch==2.13.0}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "flashgen needs Python 3.11 or newer, $python is $("$python" --version 2>&1): say make PYTHON=python3.12, for instance" >&2
    exit 1
}
echo "== virtual environment in $venv: torch first; minutes when nothing is cached =="
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
index=()
if [ -n "${TORCH_INDEX:-}" ]; then
    index=(--extra-index-url "$TORCH_INDEX")
elif ! nvidia-smi >/dev/null 2>&1; then
    echo "no NVIDIA GPU here, torch's CPU build is enough. Should pip offer the CUDA build alone (gigabytes), stop it and say"
    echo "  make ... TORCH_INDEX=<the address of PyTorch's CPU packages, see its installation page>"
fi
# Torch before everything else, so that nothing pulls another build of it. $torch may be several words.
# shellcheck disable=SC2086
"${pip[@]}" install --quiet --constraint constraints.txt ${index[@]+"${index[@]}"} $torch
# torch's CUDA build requires a Triton of its own, its CPU build brings none.
grep -qi '^Requires-Dist: triton' "$venv"/lib/python*/site-packages/torch-*.dist-info/METADATA ||
    "${pip[@]}" install --quiet "triton==3.9.0"
echo "== the other dependencies, and flashgen itself (editable) =="
"${pip[@]}" install --quiet --constraint constraints.txt --editable ".[dev,plot,quickstart,ray]"
"$venv/bin/python" - <<'PY'
from importlib.metadata import version
print("== ready:", ", ".join(f"{name} {version(name)}" for name in ("flashgen", "torch", "triton", "numpy")), "==")
PY
