"""A graph as a function of PyTorch: for references, which differentiate it, and for exported files, which test themselves with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashgen.mods.captures import Capture
from flashgen.mods.graph import COMPARISONS, INDICES, Node, ordered

READ = '''def read(table, *places):
    """Elements of a captured tensor: negative indices count from the end, what lies beyond it reads 0."""
    if not places:
        return table
    inside, at = torch.ones((), dtype=torch.bool, device=table.device), []
    for place, size in zip(places, table.shape):
        place = place.long()
        place = torch.where(place < 0, place + size, place)
        inside = inside & (place >= 0) & (place < size)
        at.append(place.clamp(0, max(0, size - 1)))
    return torch.where(inside, table[tuple(at)], table.new_zeros(()))
'''

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "and": "&",
    "or": "|",
    "xor": "^",
    "shl": "<<",
    "shr": ">>",
    **dict(zip(COMPARISONS, ("<", "<=", ">", ">=", "==", "!="), strict=True)),
}
_CALLS = {
    op: f"torch.{op}" for op in ("abs", "sign", "floor", "ceil", "round", "trunc", "exp", "exp2", "log", "log2", "sqrt")
}
_CALLS |= {
    op: f"torch.{op}"
    for op in ("rsqrt", "tanh", "sigmoid", "expm1", "log1p", "sin", "cos", "erf", "pow", "fmod", "fmin", "fmax")
}
_CALLS |= {"mod": "torch.remainder", "min": "torch.minimum", "max": "torch.maximum"}
_ROUNDING = {"floordiv": "floor", "truncdiv": "trunc"}
# Of these PyTorch takes no Python number in the place of a tensor.
_TENSORS_ONLY = {"min", "max", "fmin", "fmax", "pow", "fmod", "mod", "floordiv", "truncdiv", "where", "shl", "shr"}


def source(root: Node, captures: Sequence[Capture], name: str) -> str:
    """The text of `name(score, b, h, q_idx, kv_idx, *captured)`, of a mask without `score`; it calls `read` (`READ`).

    A value of fp32 that the function is given in fp64 stays in fp64.

    Args:
        root: the new score, or the mask.
        captures: captured tensors; each is a parameter of its name.
        name: of the function.
    """
    nodes = ordered(root)
    uses: dict[int, int] = {}
    for node in nodes:
        for arg in node.args:
            uses[id(arg)] = uses.get(id(arg), 0) + 1
    first = [] if root.dtype == "bool" else ["score"]
    parameters = [*first, *INDICES, *(f"captured_{row.name}" for row in captures)]
    lines, text = [f"def {name}({', '.join(parameters)}):"], dict[int, str]()
    for node in nodes:
        written = _expression(node, text, captures)
        if node.args and (uses.get(id(node), 0) > 1 or len(written) > 80):
            variable = f"x{len(lines)}"
            lines.append(f"    {variable} = {_bare(written)}")
            written = variable
        text[id(node)] = written
    lines.append(f"    return {_bare(_tensor(root, text))}")
    return "\n".join(lines) + "\n"


def _expression(node: Node, text: dict[int, str], captures: Sequence[Capture]) -> str:
    if node.op == "input":
        return str(node.value)
    if node.op == "const":
        return _number(node)
    if node.op == "load":
        return (
            f"read({', '.join([f'captured_{captures[node.value].name}', *(_tensor(arg, text) for arg in node.args)])})"
        )
    args = [_tensor(arg, text) if node.op in _TENSORS_ONLY else text[id(arg)] for arg in node.args]
    if node.op == "cast" and node.value == "detach":
        return f"{_tensor(node.args[0], text)}.detach()"
    if node.op == "cast":
        return f"{_tensor(node.args[0], text)}.to(torch.{node.dtype})"
    if node.op in _INFIX:
        return f"({args[0]} {_INFIX[node.op]} {args[1]})"
    if node.op in ("neg", "not"):
        return f"({'-' if node.op == 'neg' else '~'}{args[0]})"
    if node.op in _ROUNDING:
        return f'torch.div({args[0]}, {args[1]}, rounding_mode="{_ROUNDING[node.op]}")'
    return f"{'torch.where' if node.op == 'where' else _CALLS[node.op]}({', '.join(args)})"


def _number(node: Node) -> str:
    value = node.value
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return f"({value})" if isinstance(value, (int, float)) and value < 0 else repr(value)


def _tensor(node: Node, text: dict[int, str]) -> str:
    """A value where a number alone would not do: on the device of the indices, in its own type."""
    written = text[id(node)]
    return f"torch.full_like(b, {_bare(written)}, dtype=torch.{node.dtype})" if node.op == "const" else written


def _bare(written: str) -> str:
    """Without brackets round the whole."""
    if not (written.startswith("(") and written.endswith(")")):
        return written
    depth = 0
    for place, letter in enumerate(written):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return written[1:-1] if place == len(written) - 1 else written
    return written


def function(root: Node, captures: Sequence[Capture]) -> Callable[..., Tensor]:
    """`source` as a function."""
    space: dict[str, Any] = {"torch": torch}
    exec(READ + "\n\n" + source(root, captures, "mod"), space)
    made: Callable[..., Tensor] = space["mod"]
    return made
