#!/usr/bin/env bash
# Runs a Python script under one exact version of Triton, the environment's own or one beside it in .cache.
#   scripts/with_triton.sh PYTHON 3.6.0 tests/compile_goldens.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 version=$2
shift 2
if [ "$("$python" -c 'from importlib.metadata import version; print(version("triton"))')" != "$version" ]; then
    folder=.cache/triton-$version
    if [ ! -e "$folder/.installed" ]; then
        echo "== Triton $version into $folder =="
        rm -rf "$folder"
        "$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$folder" "triton==$version"
        touch "$folder/.installed"
    fi
    export PYTHONPATH="$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -c "import sys, triton; sys.exit(triton.__version__ != sys.argv[1] and f'Triton {triton.__version__} came first')" "$version"
exec "$python" "$@"
