"""Mods that a compiler has read, as functions: one for each, of single values or blocks, with what it reads as keyword arguments.

Their lines are the user's, by the compiler's notes, so that a refusal names them; their parameters have the user's names, as far as the
compiler kept these, so that a kernel is the one that runs without it.
"""

from __future__ import annotations

import ast
import hashlib
import keyword
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashgen.mod_ops import Mods, Read, keep

_INDICES = ("b", "h", "q_idx", "kv_idx")
_WAY = re.compile(r"^(?:.*_(?:parameters|buffers|modules)_|[lg]_(?:self_)?)")
_CELL = re.compile(r"_closure_(\d+)_cell_contents")
_FROM = re.compile(r'File "(.+)", line (\d+), in ')


def kept(
    graph: fx.GraphModule, captured: Sequence[Any], lists: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[str, Read, list[int]]:
    """Keep the mods of a call for its operators.

    Args:
        graph: of score, b, h, q_idx, kv_idx and what was captured; ends in `flashgen::mod_results`.
        captured: tensors and numbers, as they are now.
        lists, sizes: of a BlockMask.

    Returns:
        (digest, read, learnable): the name they were kept under, what the operators take of this call, and which tensors may want gradients.
    """
    end = next(node for node in graph.graph.nodes if str(node.target).startswith("flashgen.mod_results"))
    described = [word.partition(":") for word in str(end.args[2]).split()]
    functions: dict[str, Callable[..., Any]] = {}
    reads: dict[str, tuple[str | None, ...]] = {}
    texts = [str(len(lists))]
    for (name, _, closure), result in zip(described, end.args[1], strict=True):
        functions[name], reads[name], text = _function(graph, result, name, closure.split(","))
        texts += [name, text]
    kinds = tuple("tensor" if isinstance(x, Tensor) else _kind(x) for x in captured)
    texts += kinds
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]
    if any(True for _ in graph.children()):  # its text does not say what they do
        digest += f"-{id(graph)}"
    keep(digest, Mods(functions=functions, reads=reads, kinds=kinds, lists=len(lists)))
    by_kind = {kind: [x for x, own in zip(captured, kinds, strict=True) if own == kind] for kind in ("tensor", "int", "float")}
    tensors = [*lists, *by_kind["tensor"]]
    read = Read(tensors=tensors, numbers=[*sizes, *by_kind["int"]], floats=by_kind["float"], wanted=[])
    of_score = [word for word, kind in zip(reads.get("score_mod", ()), kinds, strict=False) if kind == "tensor"]
    return digest, read, [len(lists) + at for at, word in enumerate(of_score) if word is not None]


def _kind(x: Any) -> str:
    return "float" if isinstance(x, (float, torch.SymFloat)) else "int"


def _function(graph: fx.GraphModule, result: fx.Node, name: str, closure: list[str]) -> tuple[Callable[..., Any], tuple[str | None, ...], str]:
    """What gives one result: a function, the keywords of what was captured, None of what it does not read, and its text."""
    made = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    made.graph_copy(graph.graph, values)
    made.output(values[result])
    made.eliminate_dead_code()
    given, captured = _arguments(made)
    words: list[str | None] = []
    taken: Counter[str] = Counter(("score", *_INDICES))
    for node in captured:
        word = _name(node.name, closure)
        taken[word] += 1
        words.append((word if taken[word] == 1 else f"{word}_{taken[word]}") if node.users else None)
    for node, word in zip((*given, *captured), ("score", *_INDICES, *words), strict=True):
        node.type = None
        if word is None:
            made.erase_node(node)
        else:
            _rename(made, node, word)
    if name != "score_mod":
        made.erase_node(given[0])
    made.lint()
    text = made.python_code(root_module="self")
    return _compiled(text.src, {**text.globals, "self": graph}, made, name), tuple(words), text.src


def _arguments(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    placeholders = graph.find_nodes(op="placeholder")
    return placeholders[:5], placeholders[5:]


def _name(given: str, closure: list[str]) -> str:
    """What the user calls a tensor that the compiler calls by the way to it: `l_self_buffers_ids_`, `l_mod_closure_1_cell_contents_`."""
    cells = _CELL.findall(given)
    if len(cells) == 1 and int(cells[0]) < len(closure):
        return closure[int(cells[0])]
    own = _WAY.sub("", given).strip("_")
    return own if own.isidentifier() and not keyword.iskeyword(own) else f"captured_{own}"


def _rename(graph: fx.Graph, node: fx.Node, word: str) -> None:
    for other in graph.nodes:
        if other.name == word and other is not node:
            other._rename(f"{word}_value")
    node.target = word
    node.name = word


def _compiled(source: str, names: dict[str, Any], graph: fx.Graph, name: str) -> Callable[..., Any]:
    """A graph's text as a function on the user's lines."""
    tree = ast.parse(source)
    (made,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    made.name, made.args.args = name, made.args.args[1:]  # `self` is among its globals
    sites = {node.name: _site(node) for node in graph.nodes if node.op != "placeholder"}
    files = Counter(site[0] for site in sites.values() if site is not None)
    file = files.most_common(1)[0][0] if files else f"<{name}>"
    for statement in made.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        site = sites.get(target.id) if isinstance(target, ast.Name) else None
        if site is not None and site[0] == file:
            for part in ast.walk(statement):
                if hasattr(part, "lineno"):
                    part.lineno = part.end_lineno = site[1]  # type: ignore[attr-defined]
    space = dict(names)
    exec(compile(tree, file, "exec"), space)  # what the compiler wrote of the user's own function
    return space[name]  # type: ignore[no-any-return]


def _site(node: fx.Node) -> tuple[str, int] | None:
    """The user's line that a compiler made a node of."""
    found = _FROM.findall(str(node.meta.get("stack_trace", "")))
    return (found[-1][0], int(found[-1][1])) if found else None
