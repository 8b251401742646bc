"""Activations and their kind, put together from the graph's operations, so that they are differentiated and emitted like any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashgen.mods.graph import Graph, Node


def _number(graph: Graph, x: Node, value: float) -> Node:
    return graph.const(value, x.dtype)


def _scaled(graph: Graph, x: Node, factor: float) -> Node:
    return graph.make("mul", x, _number(graph, x, factor))


def _plus(graph: Graph, x: Node, term: float) -> Node:
    return graph.make("add", x, _number(graph, x, term))


def _clamped(graph: Graph, x: Node, low: float, high: float) -> Node:
    """Between two numbers; a NaN stays, and the bounds hand no gradient on beyond them, as `hardtanh`."""
    low_node, high_node = _number(graph, x, low), _number(graph, x, high)
    found = graph.make("where", graph.make("le", x, low_node), low_node, x)
    return graph.make("where", graph.make("ge", x, high_node), high_node, found)


def _softplus(graph: Graph, x: Node, beta: float = 1.0, threshold: float = 20.0) -> Node:
    scaled = _scaled(graph, x, beta)
    far = graph.make("gt", scaled, _number(graph, x, threshold))
    safe = graph.make("where", far, _number(graph, x, 0.0), scaled)
    bent = _scaled(graph, graph.make("log1p", graph.make("exp", safe)), 1.0 / beta)
    return graph.make("where", far, x, bent)


def _gelu(graph: Graph, x: Node, approximate: str = "none") -> Node:
    if approximate == "tanh":
        cube = graph.make("mul", graph.make("mul", x, x), x)
        inner = _scaled(graph, graph.make("add", x, _scaled(graph, cube, 0.044715)), math.sqrt(2.0 / math.pi))
        bent = graph.make("tanh", inner)
    else:
        bent = graph.make("erf", _scaled(graph, x, math.sqrt(0.5)))
    return graph.make("mul", _scaled(graph, x, 0.5), _plus(graph, bent, 1.0))


def _elu(graph: Graph, x: Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Node:
    positive = graph.make("gt", x, _number(graph, x, 0.0))
    safe = graph.make("where", positive, _number(graph, x, 0.0), x)
    bent = _scaled(graph, graph.make("expm1", _scaled(graph, safe, input_scale)), alpha * scale)
    return graph.make("where", positive, _scaled(graph, x, scale), bent)


def _leaky_relu(graph: Graph, x: Node, slope: float = 0.01) -> Node:
    positive = graph.make("gt", x, _number(graph, x, 0.0))
    return graph.make("where", positive, x, _scaled(graph, x, slope))


def _hardsigmoid(graph: Graph, x: Node) -> Node:
    return graph.make("div", _clamped(graph, _plus(graph, x, 3.0), 0.0, 6.0), _number(graph, x, 6.0))


# Of one tensor and numbers; what they are called is PyTorch's schema.
ACTIVATIONS: dict[str, Callable[..., Node]] = {
    "silu": lambda graph, x: graph.make("mul", x, graph.make("sigmoid", x)),
    "gelu": _gelu,
    "softplus": _softplus,
    "mish": lambda graph, x: graph.make("mul", x, graph.make("tanh", _softplus(graph, x))),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "hardtanh": lambda graph, x, low=-1.0, high=1.0: _clamped(graph, x, low, high),
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda graph, x: graph.make("mul", x, _hardsigmoid(graph, x)),
    "log10": lambda graph, x: _scaled(graph, graph.make("log2", x), math.log10(2.0)),
    "erfc": lambda graph, x: graph.make("sub", _number(graph, x, 1.0), graph.make("erf", x)),
}
_NAMES = {"negative_slope": "slope", "min_val": "low", "max_val": "high"}


def activation(name: str, graph: Graph, x: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Node:
    """One of `ACTIVATIONS`, its numbers as PyTorch's operator takes them."""
    return ACTIVATIONS[name](graph, x, *args, **{_NAMES.get(key, key): value for key, value in kwargs.items()})
