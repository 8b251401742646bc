"""Reverse mode on the graph of a score_mod: the gradient of the raw score, and what each captured tensor gets.

Conventions are PyTorch's: |x| has slope 0 at 0, a tie of maximum or minimum halves, clamp hands on at its bounds, relu does not at 0.
Everything is computed in fp32 (fp64 where the function does), whatever 16-bit types the function passes through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashgen.mods.captures import Capture
from flashgen.mods.dtypes import computing, is_float
from flashgen.mods.graph import INDICES, Graph, Node, ordered

Pull = Callable[[Graph, Node, Node], tuple[Node | None, ...]]  # graph, node, its gradient -> its operands' gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one element read gets: `value` is to be added to the gradient of capture[indices], for every b, h, q_idx and kv_idx.

    Attributes:
        capture: number of the captured tensor.
        indices: of the element; negative ones count from the end.
        value: to be added; in fp32 (fp64 of an fp64 tensor).
    """

    capture: int
    indices: tuple[Node, ...]
    value: Node

    @property
    def summed_over(self) -> frozenset[str]:
        """Arguments that the element does not depend on: contributions of all their values meet in one element."""
        used = frozenset[str]().union(*(index.depends for index in self.indices))
        return frozenset(INDICES) - used


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivative:
    """Gradients as nodes of the argument `grad`, the gradient of the new score.

    Attributes:
        score: of the raw score, fp32; a zero where the new one does not depend on it.
        contributions: to captured tensors that want gradients, one a load.
    """

    score: Node
    contributions: tuple[Contribution, ...]


def derive(graph: Graph, root: Node, captures: Sequence[Capture]) -> Derivative:
    """Differentiate a score_mod.

    Args:
        graph: makes nodes; the one that made the root, so that the derivative shares them.
        root: the new score.
        captures: the captured tensors that loads number.
    """
    nodes = ordered(root)
    wanted = {id(node) for node in nodes if _is_leaf(node, captures)}
    for node in nodes:
        if any(id(arg) in wanted for arg in node.args) and is_float(node.dtype) and node.value != "detach":
            wanted.add(id(node))
    gradients: dict[int, Node] = {id(root): graph.input("grad")}
    contributions: list[Contribution] = []
    score = graph.const(0.0, "float32")
    for node in reversed(nodes):
        gradient = gradients.get(id(node))
        if gradient is None or id(node) not in wanted:
            continue
        if node.op == "input":
            score = gradient
        elif node.op == "load":
            contributions.append(Contribution(capture=node.value, indices=node.args, value=gradient))
        else:
            for arg, part in zip(node.args, _pull(graph, node, gradient), strict=True):
                if part is None or id(arg) not in wanted:
                    continue
                part = graph.cast(part, computing(arg.dtype))
                known = gradients.get(id(arg))
                gradients[id(arg)] = part if known is None else graph.make("add", known, part)
    return Derivative(score=score, contributions=tuple(reversed(contributions)))


def _is_leaf(node: Node, captures: Sequence[Capture]) -> bool:
    if node.op == "input":
        return bool(node.value == "score")
    return node.op == "load" and is_float(node.dtype) and captures[node.value].requires_grad


def _pull(graph: Graph, node: Node, g: Node) -> tuple[Node | None, ...]:
    rule = _RULES.get(node.op)
    return rule(graph, node, g) if rule is not None else (None,) * len(node.args)


def _unary(build: Callable[[Graph, Node, Node], Node]) -> Pull:
    """A factor of the operand x and the result y."""
    return lambda graph, node, g: (graph.make("mul", g, build(graph, node.args[0], node)),)


def _scaled(graph: Graph, x: Node, factor: float) -> Node:
    return graph.make("mul", x, graph.const(factor, x.dtype))


def _inverse(graph: Graph, x: Node, factor: float = 1.0) -> Node:
    return graph.make("div", graph.const(factor, x.dtype), x)


def _cube(graph: Graph, x: Node) -> Node:
    return graph.make("mul", graph.make("mul", x, x), x)


def _one_minus(graph: Graph, x: Node) -> Node:
    return graph.make("sub", graph.const(1.0, x.dtype), x)


def _gaussian(graph: Graph, x: Node) -> Node:
    slope = graph.make("exp", graph.make("neg", graph.make("mul", x, x)))
    return _scaled(graph, slope, 2.0 / math.sqrt(math.pi))


def _product(graph: Graph, node: Node, g: Node) -> tuple[Node, Node]:
    x, y = node.args
    return graph.make("mul", g, y), graph.make("mul", g, x)


def _quotient(graph: Graph, node: Node, g: Node) -> tuple[Node, Node]:
    _, y = node.args
    by_y = graph.make("div", g, y)
    return by_y, graph.make("neg", graph.make("mul", by_y, node))


def _either(graph: Graph, node: Node, g: Node) -> tuple[None, Node, Node]:
    condition, x, _ = node.args
    g = graph.cast(g, computing(x.dtype))
    zero = graph.const(0.0, g.dtype)
    return None, graph.make("where", condition, g, zero), graph.make("where", condition, zero, g)


def _extreme(wins: str, loses: str) -> Pull:
    def pull(graph: Graph, node: Node, g: Node) -> tuple[Node, Node]:
        x, y = node.args
        zero, half = graph.const(0.0, g.dtype), _scaled(graph, g, 0.5)
        shared = graph.make("where", graph.make("eq", x, y), half, g)
        return (
            graph.make("where", graph.make(loses, x, y), zero, shared),
            graph.make("where", graph.make(wins, x, y), zero, shared),
        )

    return pull


def _number_extreme(wins: str) -> Pull:
    def pull(graph: Graph, node: Node, g: Node) -> tuple[Node, Node]:
        x, y = node.args
        takes_x = graph.make("or", graph.make(wins, x, y), graph.make("ne", y, y))
        zero = graph.const(0.0, g.dtype)
        return graph.make("where", takes_x, g, zero), graph.make("where", takes_x, zero, g)

    return pull


def _power(graph: Graph, node: Node, g: Node) -> tuple[Node, Node]:
    x, y = node.args
    zero, one = graph.const(0.0, x.dtype), graph.const(1.0, x.dtype)
    slope = graph.make("mul", y, graph.make("pow", x, graph.make("sub", y, one)))
    to_base = graph.make("where", graph.make("eq", y, zero), zero, graph.make("mul", g, slope))
    flat = graph.make("and", graph.make("eq", x, zero), graph.make("ge", y, zero))
    to_exponent = graph.make("mul", g, graph.make("mul", node, graph.make("log", x)))
    return to_base, graph.make("where", flat, zero, to_exponent)


_RULES: dict[str, Pull] = {
    "cast": lambda graph, node, g: (g if is_float(node.args[0].dtype) and node.value != "detach" else None,),
    "neg": lambda graph, node, g: (graph.make("neg", g),),
    "add": lambda graph, node, g: (g, g),
    "sub": lambda graph, node, g: (g, graph.make("neg", g)),
    "mul": _product,
    "div": _quotient,
    "pow": _power,
    "where": _either,
    "max": _extreme("gt", "lt"),
    "min": _extreme("lt", "gt"),
    "fmax": _number_extreme("ge"),
    "fmin": _number_extreme("le"),
    "abs": _unary(lambda graph, x, y: graph.make("sign", x)),
    "exp": _unary(lambda graph, x, y: y),
    "exp2": _unary(lambda graph, x, y: _scaled(graph, y, math.log(2.0))),
    "expm1": _unary(lambda graph, x, y: graph.make("exp", x)),
    "log1p": _unary(lambda graph, x, y: _inverse(graph, graph.make("add", x, graph.const(1.0, x.dtype)))),
    "log": _unary(lambda graph, x, y: _inverse(graph, x)),
    "log2": _unary(lambda graph, x, y: _inverse(graph, x, 1.0 / math.log(2.0))),
    "sqrt": _unary(lambda graph, x, y: _inverse(graph, y, 0.5)),
    "rsqrt": _unary(lambda graph, x, y: _scaled(graph, _cube(graph, y), -0.5)),
    "tanh": _unary(lambda graph, x, y: _one_minus(graph, graph.make("mul", y, y))),
    "sigmoid": _unary(lambda graph, x, y: graph.make("mul", y, _one_minus(graph, y))),
    "sin": _unary(lambda graph, x, y: graph.make("cos", x)),
    "cos": _unary(lambda graph, x, y: graph.make("neg", graph.make("sin", x))),
    "erf": _unary(lambda graph, x, y: _gaussian(graph, x)),
}
