"""A kernel is a file that you can read: render one for a head size of your own, without a GPU, torch or Triton.

python examples/read_the_kernel.py
"""

from __future__ import annotations

import ast

from flashgen import AttentionSpec
from flashgen.render import render
from flashgen.variants import candidates


def main() -> None:
    """Render two specs and show where they differ."""
    causal = AttentionSpec(dtype="bf16", head_dim=96, head_dim_v=96, causal=True)
    full = AttentionSpec(dtype="bf16", head_dim=96, head_dim_v=96)
    variant = next(variant for variant in candidates(causal) if variant.template is not None)

    source = render(causal, variant)
    print(f"{source.name}: {len(source.text.splitlines())} lines from templates/{variant.template}\n")
    print(ast.get_docstring(ast.parse(source.text)))

    # Structure is generated, numbers are not: what the causal kernel needs is simply not there in the full one.
    lines = set(render(full, variant).text.splitlines())
    print("\nonly in the causal kernel:")
    print("\n".join(line for line in source.text.splitlines() if line.strip() and line not in lines))


if __name__ == "__main__":
    main()
