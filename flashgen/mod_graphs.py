"""Mods that a compiler has read, as functions: one for each, of single values or blocks, with what it reads as keyword arguments.

Their lines are the user's, by the compiler's notes, so that a refusal names them; their parameters have the user's names, as far as the
compiler kept these, so that a kernel is the one that runs without it.
"""

from __future__ import annotations

import ast
import hashlib
import keyword
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashgen.errors import UnsupportedProblemError
from flashgen.mod_ops import KINDS, Mods, Read, keep

_ARGUMENTS = ("score", "b", "h", "q_idx", "kv_idx")
_WAY = re.compile(r"^(?:.*_(?:parameters|buffers|modules)_|[lg]_(?:self_)?)")
_CELL = re.compile(r"_closure_(\d+)_cell_contents")
_FROM = re.compile(r'File "(.+)", line (\d+), in ')


def kept(
    body: fx.GraphModule, inputs: Mapping[fx.Node, Any], lists: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[str, Read, list[int]]:
    """Keep the mods of a call for its operators.

    Args:
        body: a graph in which `flashgen::mod_arguments` gives what each mod is called with, and `flashgen::mod_result` takes what it returns.
        inputs: what its placeholders stand for, as it is now.
        lists, sizes: of a BlockMask.

    Returns:
        (digest, read, learnable): the name they were kept under, what the operators take of this call, and which tensors may want gradients.
    """
    made: dict[str, _Function] = {}
    steps: list[fx.Node] = []
    for node in body.graph.nodes:
        steps = [] if _is(node, "mod_arguments") else [*steps, node]
        if _is(node, "mod_result"):
            name, _, closure = str(node.args[1]).partition(":")
            made[name] = _Function(steps[:-1], node.args[0], name, closure.split(","))
    captured = [node for node in inputs if any(node in one.words for one in made.values())]
    reads = {name: tuple(one.words.get(node) for node in captured) for name, one in made.items()}
    kinds = tuple(_kind(inputs[node]) for node in captured)
    texts = [f"{len(lists)}:{' '.join(kinds)}", *(f"{name}{one.text}{reads[name]}" for name, one in made.items())]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]
    functions = {name: one.compiled() for name, one in made.items()}
    keep(digest, Mods(functions=functions, reads=reads, kinds=kinds, lists=len(lists)))
    found = {own: [inputs[node] for node, kind in zip(captured, kinds, strict=True) if kind == own] for own in KINDS}
    floats = [torch.scalar_tensor(x, dtype=torch.float64, device="cpu") for x in found["float"]]
    read = Read(tensors=[*lists, *found["tensor"]], numbers=[*sizes, *found["int"]], floats=floats, wanted=[])
    of_score = [word for word, kind in zip(reads.get("score_mod", ()), kinds, strict=False) if kind == "tensor"]
    return digest, read, [len(lists) + at for at, word in enumerate(of_score) if word is not None]


def _is(node: fx.Node, name: str) -> bool:
    return str(node.target) in (f"flashgen.{name}", f"flashgen.{name}.default")


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return "tensor"
    return "float" if isinstance(x, (float, torch.SymFloat)) else "int"


class _Function:
    """What computes one result, as a function of a mod's arguments and of what the mod reads.

    Attributes:
        words: the keyword of each placeholder of the body that it reads.
        text: its source.

    Raises:
        UnsupportedProblemError: it calls a graph of its own, as a `torch.autograd.Function` is to the compiler, whose backward would be lost.
    """

    def __init__(self, steps: list[fx.Node], result: Any, name: str, closure: list[str]) -> None:
        self.words: dict[fx.Node, str] = {}
        self._name, self._closure = name, closure
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._taken = Counter(_ARGUMENTS)
        self._arguments = [self._graph.placeholder(one) for one in _ARGUMENTS]
        for step in steps:  # whatever they give: one may write into another's result, or turn gradients off
            self._copied(step)
        self._graph.output(fx.node.map_arg(result, self._copied))
        if name != "score_mod":
            self._graph.erase_node(self._arguments[0])
        self._code = self._graph.python_code(root_module="self")
        self.text = self._code.src

    def _copied(self, node: fx.Node) -> fx.Node:
        if node not in self._copies:
            self._copies[node] = self._made(node)
        return self._copies[node]

    def _made(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem and _is(node.args[0], "mod_arguments"):  # type: ignore[arg-type]
            return self._arguments[node.args[1]]  # type: ignore[index]
        if node.op == "get_attr":
            raise UnsupportedProblemError(
                f"{self._name} calls a torch.autograd.Function or a higher-order operator, which flashgen.attention inside of torch.compile "
                "does not take. Write it with PyTorch's operators, or call attention in a function under @torch.compiler.disable."
            )
        if node.op != "placeholder":
            return self._graph.node_copy(node, self._copied)
        own = _own_name(node.name, self._closure)
        self._taken[own] += 1
        self.words[node] = own if self._taken[own] == 1 else f"{own}_{self._taken[own]}"
        with self._graph.inserting_after(self._graph.find_nodes(op="placeholder")[-1]):
            return self._graph.placeholder(self.words[node])

    def compiled(self) -> Callable[..., Any]:
        """The function, on the user's lines."""
        tree = ast.parse(self.text)
        (made,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
        made.name, made.args.args = self._name, made.args.args[1:]  # no `self`
        sites = {node.name: _site(node) for node in self._graph.nodes if node.op != "placeholder"}
        files = Counter(site[0] for site in sites.values() if site is not None)
        file = files.most_common(1)[0][0] if files else f"<{self._name}>"
        for statement in made.body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            site = sites.get(target.id) if isinstance(target, ast.Name) else None
            if site is not None and site[0] == file:
                for part in ast.walk(statement):
                    if hasattr(part, "lineno"):
                        part.lineno = part.end_lineno = site[1]  # type: ignore[attr-defined]
        space = dict(self._code.globals)
        exec(compile(tree, file, "exec"), space)  # what the compiler wrote of the user's own function
        return space[self._name]  # type: ignore[no-any-return]


def _own_name(given: str, closure: list[str]) -> str:
    """What the user calls what the compiler calls by the way to it: `l_self_buffers_ids_`, `l_mod_closure_1_cell_contents_`."""
    cells = _CELL.findall(given)
    if len(cells) == 1 and int(cells[0]) < len(closure):
        return closure[int(cells[0])]
    own = _WAY.sub("", given).strip("_")
    return own if own.isidentifier() and not keyword.iskeyword(own) else f"captured_{own}"


def _site(node: fx.Node) -> tuple[str, int] | None:
    """The user's line that a compiler made a node of."""
    found = _FROM.findall(str(node.meta.get("stack_trace", "")))
    return (found[-1][0], int(found[-1][1])) if found else None
