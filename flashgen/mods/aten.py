"""PyTorch's operators as operations of the graph: one table, each row with PyTorch's own rules of type.

The type of a result is what PyTorch says: the operator is run on tensors of a single one (on the CPU: meta tensors would first
import seconds of PyTorch's Python). Arguments and what depends on them have a dimension there, numbers and captured 0-d
tensors have none, as when the function is called on a whole block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flashgen.mods import arrays, composites, reductions
from flashgen.mods.arrays import Array
from flashgen.mods.dtypes import computing, is_float, is_integer
from flashgen.mods.graph import COMPARISONS, Graph, Node
from flashgen.mods.torch_types import DTYPES, TORCH, Handler, NotInTableError, as_ones, result_type

__all__ = ["DTYPES", "TORCH", "NotInTableError", "detached", "is_view", "read_as_a_whole", "translate"]


def translate(graph: Graph, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    """The result of an operator on lazy arrays and numbers.

    Args:
        graph: makes the nodes.
        func: the operator, e.g. `torch.ops.aten.add.Tensor`.
        args, kwargs: its arguments; tensors as `Array`.

    Raises:
        NotInTableError: there is no such row.
        RuntimeError, TypeError, ValueError, IndexError: PyTorch's own refusal of these arguments.
    """
    namespace, _, name = func._schema.name.partition("::")
    name = name if name.startswith("__") else name.removesuffix("_")
    if namespace != "aten":
        raise NotInTableError("")
    if name in _VIEWS:
        return _VIEWS[name](graph, "", args, kwargs)
    if name in reductions.SHAPED:
        return reductions.SHAPED[name](graph, "", args, kwargs)
    handler = _TABLE.get(name)
    if handler is None:
        raise NotInTableError("")
    return handler(graph, result_type(func, args, kwargs), args, kwargs)


def as_array(graph: Graph, value: Any, dtype: str) -> Array:
    """A number as an array of a type; arrays as they are."""
    return value if isinstance(value, Array) else arrays.filled(graph, (), value, dtype)


# -- how rows are made --


def _pointwise(
    graph: Graph, dtype: str, operands: Sequence[Any], build: Callable[..., Node], *, within: str | None = None
) -> Array:
    """Operands cast to the type that is computed in, the operation, and the result rounded to its own type."""
    inner = within or computing(dtype)

    def function(*nodes: Node) -> Node:
        return graph.cast(build(*(graph.cast(node, inner) for node in nodes)), dtype)

    return arrays.elementwise(graph, dtype, function, *(as_array(graph, operand, inner) for operand in operands))


def _unary(op: str) -> Handler:
    def handler(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        if op == "round" and kwargs.get("decimals"):
            raise NotInTableError("with decimals")
        if op in ("floor", "ceil", "round", "trunc") and not is_float(dtype):
            return _pointwise(graph, dtype, args[:1], lambda x: x)
        if op in ("abs", "sign") and dtype == "bool":
            return _pointwise(graph, dtype, args[:1], lambda x: x)
        return _pointwise(graph, dtype, args[:1], lambda x: graph.make(op, x))

    return handler


def _binary(op: str, *, reverse: bool = False) -> Handler:
    def handler(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        x, y = (args[1], args[0]) if reverse else (args[0], args[1])
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        kind = {"add": "or", "mul": "and", "min": "and", "max": "or"}.get(op, op) if dtype == "bool" else op

        def build(a: Node, b: Node) -> Node:
            return graph.make(kind, a, b if alpha == 1 else graph.make("mul", b, graph.const(alpha, b.dtype)))

        return _pointwise(graph, dtype, (x, y), build)

    return handler


def _compare(op: str) -> Handler:
    def handler(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        within = DTYPES[torch.result_type(*(as_ones(arg) for arg in args[:2]))]
        inner = computing(
            within
        )  # rounded to 16 bits, but compared in fp32: kernels do not compare bfloat16 everywhere

        def build(x: Node, y: Node) -> Node:
            return graph.make(op, graph.cast(x, inner), graph.cast(y, inner))

        return _pointwise(graph, dtype, args[:2], build, within=within)

    return handler


def _logical(op: str) -> Handler:
    def handler(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        return _pointwise(graph, dtype, args, lambda *nodes: graph.make(op, *nodes), within="bool")

    return handler


def _divide(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    mode = kwargs.get("rounding_mode", args[2] if len(args) > 2 else None)
    if mode is None:
        return _pointwise(graph, dtype, args[:2], lambda x, y: graph.make("div", x, y))
    return _of_integers("floordiv" if mode == "floor" else "truncdiv")(graph, dtype, args, kwargs)


def _of_integers(op: str) -> Handler:
    def handler(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        if not is_integer(dtype):
            raise NotInTableError(f"of {dtype}: division with a remainder is built for integers")
        return _pointwise(graph, dtype, args[:2], lambda x, y: graph.make(op, x, y))

    return handler


def _power(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    base, exponent = args[:2]
    if isinstance(exponent, (int, float)) and float(exponent).is_integer() and 0 <= exponent <= 16:
        return _pointwise(graph, dtype, (base,), lambda x: _repeated(graph, x, int(exponent)))
    if not is_float(dtype):
        if isinstance(base, int) and base > 0 and base & (base - 1) == 0:  # a power of two: bits, whatever the exponent
            step = base.bit_length() - 1
            return _pointwise(graph, dtype, (exponent,), lambda x: _two_to_the(graph, x, step))
        raise NotInTableError(f"of {dtype} with an exponent that is no small constant")
    if exponent == 0.5:
        return _pointwise(graph, dtype, (base,), lambda x: graph.make("sqrt", x))
    return _pointwise(graph, dtype, (base, exponent), lambda x, y: graph.make("pow", x, y))


def _two_to_the(graph: Graph, x: Node, step: int) -> Node:
    """(2 ** step) ** x of integers: zero where x is negative, and beyond the width."""
    one = graph.const(1, x.dtype)
    return graph.make("shl", one, graph.make("mul", x, graph.const(step, x.dtype))) if step else one


def _repeated(graph: Graph, x: Node, exponent: int) -> Node:
    """X to a power, by squaring."""
    result, square = graph.const(1, x.dtype), x
    while exponent:
        if exponent & 1:
            result = graph.make("mul", result, square)
        exponent >>= 1
        square = graph.make("mul", square, square) if exponent else square
    return result


def _clamp(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    result = args[0]
    for op, bound in (("max", low), ("min", high)):
        if bound is not None:
            result = _pointwise(graph, dtype, (result, bound), lambda x, y, op=op: _bounded(graph, op, x, y))
    return _pointwise(graph, dtype, (result,), lambda x: x)


def _bounded(graph: Graph, op: str, x: Node, bound: Node) -> Node:
    """One side of clamp: of floats a choice, since it hands the whole gradient on where a maximum would halve it."""
    if not is_float(x.dtype):
        return graph.make(op, x, bound)
    beyond = graph.make("lt" if op == "max" else "gt", x, bound)
    return graph.make("where", graph.make("or", beyond, graph.make("ne", bound, bound)), bound, x)


def _one_bound(op: str) -> Handler:
    return lambda graph, dtype, args, kwargs: _pointwise(graph, dtype, args[:2], lambda x, y: _bounded(graph, op, x, y))


def _relu(graph: Graph, x: Node) -> Node:
    zero = graph.const(0, x.dtype)
    if not is_float(x.dtype):
        return graph.make("max", x, zero)
    return graph.make("where", graph.make("le", x, zero), zero, x)


def _where(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    if len(args) != 3:
        raise NotInTableError("with a condition alone")
    condition, x, y = (as_array(graph, arg, dtype) for arg in args)

    def function(c: Node, a: Node, b: Node) -> Node:
        return graph.make("where", graph.cast(c, "bool"), graph.cast(a, dtype), graph.cast(b, dtype))

    return arrays.elementwise(graph, dtype, function, condition, x, y)


def _masked_fill(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    x, mask, value = args
    return _where(graph, dtype, (mask, value, x), {})


def _convert(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    return _pointwise(graph, dtype, args[:1], lambda x: x, within=args[0].dtype)


def _composite(build: Callable[[Graph, Node], Node]) -> Handler:
    return lambda graph, dtype, args, kwargs: _pointwise(graph, dtype, args[:1], lambda x: build(graph, x))


def _test(build: Callable[[Graph, Node], Node]) -> Handler:
    return lambda graph, dtype, args, kwargs: _pointwise(
        graph, dtype, args[:1], lambda x: build(graph, x), within=args[0].dtype
    )


def _is_inf(graph: Graph, x: Node) -> Node:
    return (
        graph.make("eq", graph.make("abs", x), graph.const(float("inf"), x.dtype))
        if is_float(x.dtype)
        else graph.const(False, "bool")
    )


def _is_nan(graph: Graph, x: Node) -> Node:
    return graph.make("ne", x, x) if is_float(x.dtype) else graph.const(False, "bool")


def _filled(value: Any = None) -> Handler:
    """`full_like`, `new_zeros` and their kind: a tensor that takes its type from an argument, nothing else."""

    def handler(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        like = args[0]
        shape = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else like.shape
        number = args[-1] if value is None else value
        return arrays.filled(graph, shape, number, dtype, varies=shape is like.shape and like.varies)

    return handler


def _activation(name: str) -> Handler:
    return lambda graph, dtype, args, kwargs: _pointwise(
        graph, dtype, args[:1], lambda x: composites.activation(name, graph, x, args[1:], kwargs)
    )


def _lerp(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
    def build(x: Node, y: Node, w: Node) -> Node:
        return graph.make("add", x, graph.make("mul", w, graph.make("sub", y, x)))

    return _pointwise(graph, dtype, args[:3], build)


def _added(op: str) -> Handler:
    """`addcmul`, `addcdiv`: x + value * (y op z)."""

    def handler(graph: Graph, dtype: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Array:
        factor = kwargs.get("value", args[3] if len(args) > 3 else 1)

        def build(x: Node, y: Node, z: Node) -> Node:
            return graph.make("add", x, graph.make("mul", graph.make(op, y, z), graph.const(factor, x.dtype)))

        return _pointwise(graph, dtype, args[:3], build)

    return handler


_TABLE: dict[str, Handler] = {
    "add": _binary("add"),
    "sub": _binary("sub"),
    "rsub": _binary("sub", reverse=True),
    "mul": _binary("mul"),
    "div": _divide,
    "floor_divide": _of_integers("floordiv"),
    "remainder": _of_integers("mod"),
    "fmod": _of_integers("fmod"),
    "pow": _power,
    "maximum": _binary("max"),
    "minimum": _binary("min"),
    "fmax": _binary("fmax"),
    "fmin": _binary("fmin"),
    "clamp": _clamp,
    "clamp_min": _one_bound("max"),
    "clamp_max": _one_bound("min"),
    "relu": _composite(_relu),
    "tan": _composite(lambda g, x: g.make("div", g.make("sin", x), g.make("cos", x))),
    "square": _composite(lambda g, x: g.make("mul", x, x)),
    "reciprocal": _composite(lambda g, x: g.make("div", g.const(1, x.dtype), x)),
    "isnan": _test(_is_nan),
    "isinf": _test(_is_inf),
    "where": _where,
    "masked_fill": _masked_fill,
    "_to_copy": _convert,
    "clone": _convert,
    "full_like": _filled(),
    "zeros_like": _filled(0),
    "ones_like": _filled(1),
    "new_full": _filled(),
    "new_zeros": _filled(0),
    "new_ones": _filled(1),
    "sgn": _unary("sign"),
    "bitwise_not": _unary("not"),
    "logical_not": _logical("not"),
    **{op: _compare(op) for op in COMPARISONS},
    **{f"logical_{op}": _logical(op) for op in ("and", "or", "xor")},
    **{f"bitwise_{op}": _binary(op) for op in ("and", "or", "xor")},
    **{f"__{op}__": _binary(op) for op in ("and", "or", "xor")},
    **{name: _binary("shl") for name in ("bitwise_left_shift", "__lshift__")},
    **{name: _binary("shr") for name in ("bitwise_right_shift", "__rshift__")},
    **{op: _unary(op) for op in ("neg", "abs", "sign", "floor", "ceil", "round", "trunc")},
    **{op: _unary(op) for op in ("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt")},
    **{op: _unary(op) for op in ("tanh", "sigmoid", "sin", "cos", "erf")},
    **{name: _activation(name) for name in composites.ACTIVATIONS},
    "lerp": _lerp,
    "addcmul": _added("mul"),
    "addcdiv": _added("div"),
}

_VIEWS: dict[str, Handler] = {
    "alias": lambda graph, dtype, args, kwargs: args[0],
    "detach": lambda graph, dtype, args, kwargs: detached(graph, args[0]),
    "lift_fresh": lambda graph, dtype, args, kwargs: args[0],
    "expand": lambda graph, dtype, args, kwargs: arrays.expanded(graph, args[0], args[1]),
    "view": lambda graph, dtype, args, kwargs: _view(graph, args),
    "_unsafe_view": lambda graph, dtype, args, kwargs: _view(graph, args),
    "permute": lambda graph, dtype, args, kwargs: arrays.permuted(args[0], args[1]),
    "transpose": lambda graph, dtype, args, kwargs: _transposed(args[0], args[1], args[2]),
    "t": lambda graph, dtype, args, kwargs: arrays.permuted(args[0], range(len(args[0].shape))[::-1]),
    "select": lambda graph, dtype, args, kwargs: _at(graph, args[0], args[1], args[2]),
    "squeeze": lambda graph, dtype, args, kwargs: _squeezed(graph, args[0], args[1] if len(args) > 1 else None),
    "unsqueeze": lambda graph, dtype, args, kwargs: _unsqueezed(graph, args[0], args[1]),
}


def is_view(func: Any) -> bool:
    """Whether an operator's result shares the memory of its first argument."""
    return func._schema.name.partition("::")[2] in _VIEWS


def read_as_a_whole(func: Any, args: Sequence[Any]) -> list[Array]:
    """The arrays of which an operator looks at the dimensions, so that it does something else to a block than to single values."""
    name = func._schema.name.partition("::")[2]
    if name in reductions.ELEMENTWISE:  # in what is looked up
        args = args[1:]
    elif name not in reductions.SHAPED and (name not in _VIEWS or name in ("alias", "detach", "lift_fresh")):
        return []
    found = [one for arg in args for one in (arg if isinstance(arg, list) else [arg])]
    return [one for one in found if isinstance(one, Array)]


def detached(graph: Graph, array: Array) -> Array:
    """The same values, which hand no gradients on."""
    return arrays.elementwise(graph, array.dtype, graph.detached, array)


def _view(graph: Graph, args: Sequence[Any]) -> Array:
    if isinstance(args[1], torch.dtype):
        raise NotInTableError("that reinterprets bits")
    return arrays.reshaped(graph, args[0], args[1])


def _transposed(array: Array, first: int, second: int) -> Array:
    order = list(range(len(array.shape)))
    if order:
        order[first], order[second] = order[second], order[first]
    return arrays.permuted(array, order)


def _at(graph: Graph, array: Array, dimension: int, index: int) -> Array:
    return arrays.indexed(graph, array, (slice(None),) * (dimension % len(array.shape)) + (index,))


def _unsqueezed(graph: Graph, array: Array, dimension: int) -> Array:
    return arrays.indexed(graph, array, (slice(None),) * (dimension % (len(array.shape) + 1)) + (None,))


def _squeezed(graph: Graph, array: Array, dims: int | Sequence[int] | None) -> Array:
    rank = len(array.shape)
    given = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    over = {dim % rank for dim in given if rank}
    return arrays.indexed(
        graph, array, tuple(0 if dim in over and size == 1 else slice(None) for dim, size in enumerate(array.shape))
    )
