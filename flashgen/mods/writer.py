"""`Writer`: nodes as expressions and statements of a kernel language, with brackets, names and line lengths as by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flashgen.mods import intervals
from flashgen.mods.captures import Capture
from flashgen.mods.dtypes import BITS, bounds, is_float, is_integer, kernel_name
from flashgen.mods.graph import COMPARISONS, Node, ordered

_WIDTH = 96  # of a statement: with the indentation of a kernel's inner loop within 120

# How tightly an expression's outermost operator binds.
_ATOM, _UNARY, _PRODUCT, _SUM, _SHIFT, _AND, _XOR, _OR, _COMPARISON = range(90, 0, -10)
_INFIX = {
    "add": ("+", _SUM),
    "sub": ("-", _SUM),
    "mul": ("*", _PRODUCT),
    "div": ("/", _PRODUCT),
    "floordiv": ("//", _PRODUCT),
    "truncdiv": ("//", _PRODUCT),
    "mod": ("%", _PRODUCT),
    "fmod": ("%", _PRODUCT),
    "and": ("&", _AND),
    "or": ("|", _OR),
    "xor": ("^", _XOR),
    "shl": ("<<", _SHIFT),
    "shr": (">>", _SHIFT),
    "lt": ("<", _COMPARISON),
    "le": ("<=", _COMPARISON),
    "gt": (">", _COMPARISON),
    "ge": (">=", _COMPARISON),
    "eq": ("==", _COMPARISON),
    "ne": ("!=", _COMPARISON),
}
_CALLS = {op: op for op in ("abs", "floor", "ceil", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf")}
_HELPERS = {"trunc": "truncate", "round": "round_half_even", "sign": "sign", "tanh": "tanh", "sigmoid": "sigmoid"}
_HELPERS |= {"expm1": "exp_minus_one", "log1p": "log_of_one_plus"}
_SPLIT_BY_SIZE = {"max": "nan_maximum", "min": "nan_minimum", "fmax": "number_maximum", "fmin": "number_minimum"}
_DIVISIONS = {"floordiv": "floor_div_any", "mod": "floor_mod_any", "truncdiv": "trunc_div", "fmod": "trunc_mod"}
# Their result jumps, so that an operand must be what PyTorch has, to the last bit.
_JUMPS = {*COMPARISONS, "floor", "ceil", "round", "trunc", "sign", "load"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the arguments are called where the expression stands; any expression that binds like a name.

    Attributes:
        apart: q_idx - kv_idx in fp32, where that is at hand: conversions of a tile of integers are slow.
    """

    score: str = "score"
    b: str = "b"
    h: str = "h"
    q_idx: str = "q_idx"
    kv_idx: str = "kv_idx"
    grad: str = "grad"
    apart: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """A kernel language: its decorator and its module."""

    jit: str
    lang: str


TRITON = Dialect(jit="triton.jit", lang="tl")
GLUON = Dialect(jit="gluon.jit", lang="gl")


@dataclass
class Writer:
    """Collects the statements of one emission; `prepare` first, then ask for results."""

    captures: Sequence[Capture]
    dialect: Dialect
    names: Names
    prefix: str
    statements: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    _text: dict[int, tuple[str, int]] = field(default_factory=dict)
    _uses: dict[int, int] = field(default_factory=dict)
    _exact: set[int] = field(default_factory=set)
    _ranges: dict[int, intervals.Interval] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def prepare(self, roots: Sequence[Node]) -> None:
        """Write the statements that these values need."""
        nodes = ordered(*roots)
        for node in nodes:
            for arg in node.args:
                self._uses[id(arg)] = self._uses.get(id(arg), 0) + 1
        for node in reversed(nodes):
            jumps = node.op in _JUMPS or (node.op == "cast" and not is_float(node.dtype))
            if jumps or id(node) in self._exact:
                self._exact.update(map(id, node.args))
        for root in roots:
            intervals.evaluate(root, {}, None, self._ranges)
        for node in nodes:
            self._text[id(node)] = self._placed(node, *self._expression(node))

    def result(self, root: Node, like: str | None) -> str:
        """The expression of a value, of the shape of `like` where one is given."""
        text, _ = self._text[id(root)]
        if like is None:
            return text
        full = "score" in root.depends or "grad" in root.depends or {"q_idx", "kv_idx"} <= root.depends
        if full:
            return text
        # A choice between equals lends it the condition's shape.
        return f"{self.dialect.lang}.where({like} == {like}, {text}, {text})"

    # -- names --

    def _placed(self, node: Node, text: str, binds: int) -> tuple[str, int]:
        """The expression itself, or a variable that holds it."""
        if node.op in ("input", "const"):
            return text, binds
        shared = self._uses.get(id(node), 0) > 1 and (binds != _ATOM or "(" in text)
        if not shared and node.op != "load" and len(text) <= _WIDTH - 24:
            return text, binds
        name = self._fresh(self._stem(node))
        self.statements.append(f"{name} = {text}")
        return name, _ATOM

    def _stem(self, node: Node) -> str:
        if node.op == "load":
            plain = [arg.value for arg in node.args if arg.op == "input"]
            suffix = {"q_idx": "_q", "kv_idx": "_k"}.get(plain[0], "") if len(plain) == len(node.args) == 1 else ""
            name = self.captures[node.value].name + suffix
            return name if suffix else f"{name}_value"
        if node.op in COMPARISONS or node.dtype == "bool":
            return "condition"
        if node.op == "sub" and {"q_idx", "kv_idx"} <= node.depends:
            return "distance"
        return {"tanh": "squashed", "where": "chosen", "div": "quotient"}.get(node.op, "value")

    def _fresh(self, stem: str) -> str:
        stem = self.prefix + stem
        name = next(one for n in itertools.count(1) if (one := stem if n == 1 else f"{stem}_{n}") not in self._taken)
        self._taken.add(name)
        return name

    # -- expressions --

    def _operand(self, node: Node, outer: int, *, right: bool = False) -> str:
        text, binds = self._text[id(node)]
        # Comparisons chain in Python, and a difference binds to the left: equal precedence needs brackets on the right.
        # Bits in a comparison bind as one expects in Python alone, so they are bracketed for every other reader.
        wants = binds < outer or (binds == outer and (right or outer == _COMPARISON))
        wants = wants or (outer == _COMPARISON and binds in (_AND, _XOR, _OR, _SHIFT))
        return f"({text})" if wants else text

    def _plain(self, node: Node) -> str:
        return self._text[id(node)][0]

    def _call(self, function: str, *args: str) -> tuple[str, int]:
        return f"{function}({', '.join(args)})", _ATOM

    def _lang(self, function: str, *args: str) -> tuple[str, int]:
        return self._call(f"{self.dialect.lang}.{function}", *args)

    def _helper(self, function: str, *args: str) -> tuple[str, int]:
        self.helpers.add(function)
        return self._call(function, *args)

    def _expression(self, node: Node) -> tuple[str, int]:
        op, args = node.op, node.args
        if op == "input":
            return str(getattr(self.names, node.value)), _ATOM
        if op == "const":
            return _literal(node)
        if op == "load":
            return self._load(node)
        if op == "cast" and node.value == "detach":
            return self._operand(args[0], _ATOM), _ATOM
        if op == "cast":
            return self._cast(node)
        if op == "neg":
            return f"-{self._operand(args[0], _UNARY)}", _UNARY
        if op == "not":
            return f"~{self._operand(args[0], _UNARY)}", _UNARY
        if op == "where":
            return self._lang("where", *(self._plain(arg) for arg in args))
        if op == "sqrt" and id(node) in self._exact and node.dtype == "float32":
            return self._lang("sqrt_rn", self._plain(args[0]))
        if op in _CALLS:
            return self._lang(_CALLS[op], self._plain(args[0]))
        if op in _HELPERS:
            return self._helper(_HELPERS[op], self._plain(args[0]))
        if op in _SPLIT_BY_SIZE:
            return self._extreme(node)
        if op == "pow":
            return self._power(node)
        if op == "div":
            return self._divide(node)
        if op in ("shl", "shr"):
            return self._shift(node)
        if op in _DIVISIONS and not self._same_as_in_c(node):
            return self._division(node)
        return self._infix(node)

    def _infix(self, node: Node) -> tuple[str, int]:
        sign, binds = _INFIX[node.op]
        left, right = node.args
        if node.op in ("add", "mul") and left.op == "const" and right.op != "const" and node.op == "mul":
            left, right = right, left  # numbers read best last
        # Sums of floats neither: what the user adds up first may cancel.
        strict = node.op not in ("add", "mul", "and", "or", "xor") or (node.op == "add" and is_float(node.dtype))
        text_right = self._operand(right, binds, right=strict or binds == _PRODUCT)
        negative = right.op == "const" and text_right.startswith("-") and right.value == right.value
        least = negative and is_integer(right.dtype) and right.value == bounds(right.dtype)[0]
        if node.op == "add" and negative and not least:
            return f"{self._operand(left, binds)} - {text_right[1:]}", binds
        if node.op == "sub" and least:
            sign = "+"  # the least integer of a type is its own negative; indices, which are not negative, do not overflow so
        return f"{self._operand(left, binds)} {sign} {text_right}", binds

    def _range(self, node: Node) -> tuple[float, float]:
        found = self._ranges[id(node)]
        return float(found.low), float(found.high)

    def _division(self, node: Node) -> tuple[str, int]:
        """A division with a remainder in which something may be negative."""
        x, y = node.args
        if node.op in ("floordiv", "mod") and y.op == "const" and y.value > 0:
            if y.value & (y.value - 1) == 0:  # a power of two: bits do it, whatever the sign
                if node.op == "mod":
                    return f"{self._operand(x, _UNARY)} & {y.value - 1}", _AND
                return f"{self._operand(x, _UNARY)} >> {y.value.bit_length() - 1}", _SHIFT
            return self._helper("floor_div" if node.op == "floordiv" else "floor_mod", self._plain(x), self._plain(y))
        return self._helper(_DIVISIONS[node.op], self._plain(x), self._plain(y))

    def _same_as_in_c(self, node: Node) -> bool:
        """Whether rounding down and towards zero are one, since nothing is negative."""
        return self._range(node.args[0])[0] >= 0 and self._range(node.args[1])[0] >= 0

    def _extreme(self, node: Node) -> tuple[str, int]:
        x, y = node.args
        if is_integer(node.dtype):
            return self._lang("maximum" if "max" in node.op else "minimum", self._plain(x), self._plain(y))
        if x.op == "const":
            x, y = y, x
        atom = self._text[id(x)][1] == _ATOM and "(" not in self._text[id(x)][0]
        if node.op in ("max", "min") and y.op == "const" and y.value == y.value and atom:
            # A NaN compares false and stays.
            sign, value = ("<" if node.op == "max" else ">"), self._plain(y)
            return self._lang("where", f"{self._plain(x)} {sign} {value}", value, self._plain(x))
        return self._helper(_SPLIT_BY_SIZE[node.op], self._plain(x), self._plain(y))

    def _power(self, node: Node) -> tuple[str, int]:
        base, exponent = node.args
        if base.op == "const" and base.value > 0:
            factor = math.log2(base.value)
            power = self._operand(exponent, _PRODUCT)
            return self._lang("exp2", self._plain(exponent) if factor == 1 else f"{power} * {factor!r}")
        return self._helper("power", self._plain(base), self._plain(exponent))

    def _divide(self, node: Node) -> tuple[str, int]:
        x, y = node.args
        if y.op == "const" and y.value and math.isfinite(y.value) and abs(math.frexp(y.value)[0]) == 0.5:
            inverse = 1.0 / y.value
            if 2.0**-100 < abs(inverse) < 2.0**100:  # by a power of two a product is the quotient
                return f"{self._operand(x, _PRODUCT)} * {inverse!r}", _PRODUCT
        if id(node) in self._exact and node.dtype == "float32":
            return self._lang("div_rn", self._plain(x), self._plain(y))
        return self._infix(node)

    def _shift(self, node: Node) -> tuple[str, int]:
        low, high = self._range(node.args[1])
        if low >= 0 and high < BITS[node.dtype]:
            return self._infix(node)
        function = "shift_left" if node.op == "shl" else "shift_right"
        return self._helper(function, *map(self._plain, node.args), str(BITS[node.dtype]))

    def _cast(self, node: Node) -> tuple[str, int]:
        (x,) = node.args
        if self.names.apart and node.dtype == "float32" and x.op == "sub":
            indices = [arg.value for arg in x.args if arg.op == "input"]
            if indices == ["q_idx", "kv_idx"]:
                return self.names.apart, _ATOM
            if indices == ["kv_idx", "q_idx"]:
                return f"-{self.names.apart}", _UNARY
        return f"{self._operand(x, _ATOM)}.to({self.dialect.lang}.{kernel_name(node.dtype)})", _ATOM

    def _load(self, node: Node) -> tuple[str, int]:
        capture = self.captures[node.value]
        if not capture.shape:
            return self._lang("load", f"{capture.name}_ptr")
        places, mask = self.places(node.value, node.args)
        offsets = [
            f"{place if place.isdigit() else f'{place}.to({self.dialect.lang}.int64)'} * {capture.name}_stride{dimension}"
            for dimension, place in enumerate(places)
        ]
        address = f"{capture.name}_ptr + {' + '.join(offsets)}"
        if mask == "True":
            text = self._lang("load", address)[0]
            return (f"{text} != 0", _COMPARISON) if node.dtype == "bool" else (text, _ATOM)
        if len(address) + len(mask) > _WIDTH - 40:
            mask = self._assign(f"{capture.name}_inside", mask)
        if len(address) + len(mask) > _WIDTH - 40:
            address = self._assign(f"{capture.name}_ptrs", address)
        zero = "0.0" if is_float(node.dtype) else "0"
        text = f"{self.dialect.lang}.load({address}, mask={mask}, other={zero})"
        # A bool tensor is stored in bytes.
        return (f"{text} != 0", _COMPARISON) if node.dtype == "bool" else (text, _ATOM)

    def places(self, number: int, indices: Sequence[Node]) -> tuple[list[str], str]:
        """Names of the places that indices mean, none counted from the end, and the condition that they are inside."""
        name, lang = self.captures[number].name, self.dialect.lang
        found, inside = [], []
        for dimension, index in enumerate(indices):
            size = f"{name}_size{dimension}"
            suffix = "" if len(indices) == 1 else str(dimension)
            text, binds = self._text[id(index)]
            if index.op == "const" and index.value >= 0:
                found.append(str(index.value))
                inside.append(f"({index.value} < {size})")
                continue
            if binds != _ATOM or "(" in text:
                text = self._assign(f"{name}_index{suffix}", text)
            if index.op == "input" and index.value in ("b", "h"):
                found.append(text)  # a scalar that no ragged tile exceeds: `Program.check_bounds` knows its range
                continue
            if self._range(index)[0] < 0:
                text = self._assign(f"{name}_place{suffix}", f"{lang}.where({text} < 0, {text} + {size}, {text})")
                inside.append(f"({text} >= 0)")
            found.append(text)
            inside.append(f"({text} < {size})")
        return found, inside[0][1:-1] if len(inside) == 1 else " & ".join(inside) or "True"

    def _assign(self, stem: str, text: str) -> str:
        name = self._fresh(stem)
        self.statements.append(f"{name} = {text}")
        return name


def _literal(node: Node) -> tuple[str, int]:
    value = node.value
    if node.dtype == "bool" or is_integer(node.dtype):
        return repr(value), _ATOM if not isinstance(value, int) or value >= 0 or node.dtype == "bool" else _UNARY
    if value != value:
        return 'float("nan")', _ATOM
    if math.isinf(value):
        return ('float("inf")', _ATOM) if value > 0 else ('-float("inf")', _UNARY)
    text = repr(value)
    if node.dtype != "float64":
        # The shortest text that rounds to the same fp32.
        text = str(np.float32(value))
    return text, _ATOM if not text.startswith("-") else _UNARY
