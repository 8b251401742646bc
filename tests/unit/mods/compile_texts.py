"""A process that compiles kernels for sm_90a without a GPU: `python compile_texts.py FILE`, a JSON list of [path, signature].

Prints a JSON list: per kernel the names of its stages of compilation, or the error. Never in a process that interprets.
"""

from __future__ import annotations

import json
import sys
from importlib import util
from pathlib import Path


def compiled(path: str, signature: dict[str, str]) -> list[str] | str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    spec = util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = module.kernel
    names = [parameter.name for parameter in kernel.params]
    kinds = {name: "constexpr" if name in ("M", "N") else signature.get(name, "i32") for name in names}
    constants = {(names.index(name),): 16 for name in ("M", "N")}
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    try:
        made = triton.compile(
            source(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert "sm_90a" in made.asm["ptx"]
    return sorted(made.asm)


if __name__ == "__main__":
    print(json.dumps([compiled(*row) for row in json.loads(Path(sys.argv[1]).read_text())]))
