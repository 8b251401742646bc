"""Automatic mutants: a kernel broken in one place each, to see whether a test would notice.

Edits are made in the text at the places the syntax tree names, and never change the number of lines, so that a report
of a mutant names the lines of the original. Only jit functions are touched.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flashgen.simulator.load import read

if TYPE_CHECKING:
    from flashgen.render import KernelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One broken copy of a kernel file.

    Attributes:
        rule: what was done, `drop wait`; one of `RULES`.
        line: where, from 1.
        function: the jit function it was done to.
        before, after: the statement or expression, in one line each.
        text: the whole broken file; as many lines as the original.
    """

    rule: str
    line: int
    function: str
    before: str
    after: str
    text: str

    @property
    def key(self) -> str:
        """What a list of reviewed mutants names it by: independent of line numbers."""
        return f"{self.function}: {self.rule}: {self.before}"

    def __str__(self) -> str:
        return f"line {self.line}, {self.function}: {self.rule}: `{self.before}` -> `{self.after}`"


@dataclass(frozen=True, slots=True)
class _Edit:
    rule: str
    node: ast.AST  # what a report shows as `before`
    spans: tuple[tuple[ast.AST, str], ...]  # nodes to replace, and by what


class _Text:
    """A source that can be cut at the positions of its syntax tree."""

    def __init__(self, text: str) -> None:
        self.data = text.encode()
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        first = self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        last = self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return first, last

    def of(self, node: ast.AST) -> str:
        first, last = self.span(node)
        return self.data[first:last].decode()

    def edited(self, spans: tuple[tuple[ast.AST, str], ...]) -> str:
        """The text with nodes replaced, their line ends kept."""
        data = self.data
        for node, new in sorted(spans, key=lambda pair: self.span(pair[0]), reverse=True):
            first, last = self.span(node)
            missing = data[first:last].count(b"\n") - new.count("\n")
            # Line ends that the new text lacks go behind it; a replaced expression stands in brackets, where they may.
            data = data[:first] + new.encode() + b"\n" * max(0, missing) + data[last:]
        return data.decode()


def mutants(source: str | Path | KernelSource, *, arithmetic: bool = False) -> tuple[Mutant, ...]:
    """Every automatic mutant of a source's jit functions, in the order of its lines.

    Args:
        source: the text of a kernel file, Gluon or Triton, its path, or a rendered `KernelSource`.
        arithmetic: also break what is computed: signs, factors, terms of masks, sums, functions, what is counted up.

    Raises:
        InvalidProblemError: the source is none of these.
        SyntaxError: it is no Python.
    """
    text, _ = read(source)
    lines, found = text.split("\n"), list[Mutant]()
    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef) or not _is_jit(function):
            continue
        first, last = function.lineno - 1, function.end_lineno
        before, after = lines[:first], lines[last:]
        for mutant in _of_function("\n".join(lines[first:last]), arithmetic):
            whole = "\n".join((*before, mutant.text, *after))
            found.append(replace(mutant, line=mutant.line + first, text=whole))
    return tuple(sorted(found, key=lambda mutant: (mutant.line, mutant.rule)))


@lru_cache(maxsize=1024)
def _of_function(text: str, arithmetic: bool) -> tuple[Mutant, ...]:
    """The mutants of one function, its text alone: the texts of a template have most of their functions in common."""
    (function,), cut = ast.parse(text).body, _Text(text)
    assert isinstance(function, ast.FunctionDef)
    found: dict[str, Mutant] = {}
    for edit in _edits(function, cut, arithmetic):
        mutated = cut.edited(edit.spans)
        if mutated == text or mutated in found or not _parses(mutated):
            continue
        after = "; ".join(new for _, new in edit.spans)
        found[mutated] = Mutant(
            rule=edit.rule,
            line=edit.node.lineno,  # type: ignore[attr-defined]
            function=function.name,
            before=" ".join(cut.of(edit.node).split()),
            after=" ".join(after.split()),
            text=mutated,
        )
    return tuple(found.values())


def _parses(text: str) -> bool:
    """Whether it is still Python."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _is_jit(function: ast.FunctionDef) -> bool:
    names = (one.func if isinstance(one, ast.Call) else one for one in function.decorator_list)
    return any(ast.unparse(name).rpartition(".")[2] == "jit" for name in names)


def _edits(function: ast.FunctionDef, cut: _Text, arithmetic: bool) -> Iterator[_Edit]:
    rules = (*_EXPRESSIONS, _arithmetic) if arithmetic else _EXPRESSIONS
    for node in ast.walk(function):
        for body in (getattr(node, name, None) for name in ("body", "orelse")):
            if isinstance(body, list):
                yield from _of_block(body, cut)
    for node in _run_time(function.body):
        for rule in rules:
            yield from rule(node, cut)


def _run_time(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every node below, but compile-time declarations (`x: gl.constexpr = ...`), docstrings and layouts."""
    queue: list[ast.AST] = list(body)
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.AnnAssign) and "constexpr" in ast.unparse(node.annotation):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Call) and (_called(node).endswith("Layout") or _called(node) in _COMPILE_TIME):
            continue
        yield node
        queue.extend(ast.iter_child_nodes(node))


_COMPILE_TIME = {"static_assert", "convert_layout", "allocate_shared_memory", "warp_specialize", "device_assert"}


def _called(node: ast.AST | None) -> str:
    """The last name of what is called: `wait` of `mbarrier.wait(...)`; empty where nothing is."""
    return _last_name(node.func) if isinstance(node, ast.Call) else ""


def _last_name(node: ast.expr) -> str:
    """`wait` of `mbarrier.wait`; without `unparse`, which took a third of the time, where there is nothing to write out."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ast.unparse(node).rpartition(".")[2]


def _module(node: ast.expr) -> str:
    """`mbarrier` of `hopper.mbarrier.wait`; empty where there is none."""
    return _last_name(node.value) if isinstance(node, ast.Attribute) else ""


def _operation(statement: ast.stmt) -> tuple[str, str]:
    """A call statement as (module, function): ("mbarrier", "wait"); empty names where it is none."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return "", ""
    return _module(statement.value.func), _called(statement.value)


_DROPPED = {
    "wait", "arrive", "expect", "init", "fence_async_shared", "store_wait", "thread_barrier", "barrier",
    "partition_barrier", "store", "async_copy_global_to_shared", "async_load", "tma_load",
    "async_copy_shared_to_global", "async_store", "tma_store", "tma_reduce_add", "async_atomic_add", "atomic_add", "atomic_xchg", "atomic_store", "atomic_poll", "atomic_cas", "atomic_max",
    "atomic_min",
}  # fmt: skip
_SYNC = {"wait", "arrive", "fence_async_shared", "store_wait", "thread_barrier", "barrier", "partition_barrier"}


def _of_block(body: list[ast.stmt], cut: _Text) -> Iterator[_Edit]:
    """Statements dropped, doubled, or taking their neighbour's place."""
    for number, statement in enumerate(body):
        _, name = _operation(statement)
        if name in _DROPPED:
            yield _Edit(f"drop {name}", statement, ((statement, "pass"),))
        if name == "arrive":
            twice = cut.of(statement)
            yield _Edit("arrive twice", statement, ((statement, f"{twice}; {twice}"),))
        if isinstance(statement, ast.AugAssign):
            yield _Edit("drop update", statement, ((statement, "pass"),))
        if isinstance(statement, ast.Assign) and _rescales(statement):
            yield _Edit("drop rescale", statement, ((statement, "pass"),))
        following = body[number + 1] if number + 1 < len(body) else None
        if following is not None and _one_line(statement) and _one_line(following):
            after = _operation(following)[1]
            early = after == "arrive" and _touches(statement)
            late = name in _SYNC - {"arrive"} and _touches(following)
            if early or late:
                swapped = ((statement, cut.of(following)), (following, cut.of(statement)))
                yield _Edit(
                    f"{'early arrive' if early else f'late {name}'}", following if early else statement, swapped
                )


def _touches(statement: ast.stmt) -> bool:
    """Whether a statement may touch memory: to pass over others changes nothing. A kernel's own functions may."""
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(isinstance(call.func, ast.Name) or _called(call).startswith(_MEMORY) for call in calls)


_MEMORY = (
    "load", "store", "wait", "arrive", "expect", "init", "async_", "atomic_", "fence", "warpgroup_mma", "barrier",
    "thread_barrier",
)  # fmt: skip


def _one_line(statement: ast.stmt) -> bool:
    simple = isinstance(statement, (ast.Expr, ast.Assign, ast.AugAssign))
    return simple and statement.lineno == statement.end_lineno


def _rescales(statement: ast.Assign) -> bool:
    """`acc = acc * ...`."""
    value, target = statement.value, statement.targets[0]
    if not (isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult) and isinstance(target, ast.Name)):
        return False
    return isinstance(value.left, ast.Name) and value.left.id == target.id


def _argument(node: ast.Call, position: int, *names: str) -> ast.expr | None:
    """An argument by its position or its name."""
    for keyword in node.keywords:
        if keyword.arg in names:
            return keyword.value
    return node.args[position] if position < len(node.args) else None


def _barriers(node: ast.AST, cut: _Text) -> Iterator[_Edit]:
    """Phases, byte counts and arrival counts."""
    if not isinstance(node, ast.Call):
        return
    if _module(node.func) != "mbarrier":
        return
    name = _called(node)
    if name == "wait" and (phase := _argument(node, 1, "phase")) is not None:
        yield _Edit("wrong phase", node, ((phase, f"({cut.of(phase)}) ^ 1"),))
    if name == "expect" and (count := _argument(node, 1, "bytes", "bytes_per_cta")) is not None:
        yield _Edit("half the bytes", node, ((count, f"({cut.of(count)}) // 2"),))
        yield _Edit("twice the bytes", node, ((count, f"({cut.of(count)}) * 2"),))
    if name == "init" and (count := _argument(node, 1, "count")) is not None:
        yield _Edit("count + 1", node, ((count, f"({cut.of(count)}) + 1"),))


def _products(node: ast.AST, cut: _Text) -> Iterator[_Edit]:
    """Waits for products, and what they accumulate into."""
    if not isinstance(node, ast.Call):
        return
    if _called(node) == "warpgroup_mma_wait":
        deps, left = _argument(node, 1, "deps"), _argument(node, 0, "num_outstanding")
        if isinstance(deps, (ast.Tuple, ast.List)) and deps.elts:
            several = ", ".join(cut.of(element) for element in deps.elts)
            yield _Edit("drop wgmma wait", node, ((node, several if len(deps.elts) == 1 else f"({several})"),))
        if left is not None:
            yield _Edit("weaker wgmma wait", node, ((left, f"({cut.of(left)}) + 1"),))
    if _called(node) == "warpgroup_mma":
        flag = _argument(node, 99, "use_acc")
        if flag is None:
            yield _Edit("drop accumulator", node, ((node.args[-1], f"{cut.of(node.args[-1])}, use_acc=False"),))
        elif not isinstance(flag, ast.Constant):
            yield _Edit("invert use_acc", node, ((flag, f"not ({cut.of(flag)})"),))


def _transfers(node: ast.AST, cut: _Text) -> Iterator[_Edit]:
    """Coordinates of TMA, and waits for its stores."""
    if not isinstance(node, ast.Call):
        return
    name = _called(node)
    if name.startswith(("async_copy_", "async_load", "async_store", "async_atomic_", "tma_")):
        coordinates = _argument(node, 1, "coord")
        if isinstance(coordinates, (ast.List, ast.Tuple)):
            for element in coordinates.elts:
                if not isinstance(element, ast.Constant):
                    yield _Edit("coordinate + 1", node, ((element, f"({cut.of(element)}) + 1"),))
    if name == "store_wait":
        left, flag = _argument(node, 0, "pendings"), _argument(node, 1, "read_only")
        if left is not None:
            yield _Edit("weaker store wait", node, ((left, f"({cut.of(left)}) + 1"),))
        if isinstance(flag, ast.Constant) and flag.value is False:
            yield _Edit("store wait for reads alone", node, ((flag, "True"),))


def _atomics(node: ast.AST, cut: _Text) -> Iterator[_Edit]:
    """Atomics made relaxed, and their values."""
    if not isinstance(node, ast.Call) or not _called(node).startswith("atomic_"):
        return
    semantics = _argument(node, 99, "sem")
    # Without sem= an atomic orders more than most kernels need: made relaxed, it is as right as before.
    if semantics is not None and cut.of(semantics).strip("'\"") != "relaxed":
        yield _Edit("relaxed atomic", node, ((semantics, '"relaxed"'),))
    if len(node.args) > 1:
        yield _Edit("atomic value + 1", node, ((node.args[1], f"({cut.of(node.args[1])}) + 1"),))


def _compile_time(node: ast.AST) -> bool:
    """Whether an expression is made of literals and UPPER names alone."""
    names = [child.id for child in ast.walk(node) if isinstance(child, ast.Name)]
    return all(name.isupper() for name in names) and not any(isinstance(n, ast.Call) for n in ast.walk(node))


_OFF_BY_ONE: dict[type[ast.cmpop], str] = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}


def _numbers(node: ast.AST, cut: _Text) -> Iterator[_Edit]:
    """Comparisons off by one, stages, ± 1, operands and choices swapped."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = cut.of(node.left), cut.of(node.comparators[0])
        for kind, other in _OFF_BY_ONE.items():
            if isinstance(node.ops[0], kind):
                yield _Edit("comparison off by one", node, ((node, f"{left} {other} {right}"),))
        if isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            other = "!=" if isinstance(node.ops[0], ast.Eq) else "=="
            yield _Edit("comparison inverted", node, ((node, f"{left} {other} {right}"),))
    if isinstance(node, ast.BinOp) and not _compile_time(node):
        left, right = cut.of(node.left), cut.of(node.right)
        if isinstance(node.op, ast.Mod):
            yield _Edit("stage + 1", node, ((node.left, f"({left} + 1)"),))
        one = isinstance(node.right, ast.Constant) and node.right.value == 1
        if one and isinstance(node.op, (ast.Add, ast.Sub)):
            yield _Edit("± 1 dropped", node, ((node, f"{left} {'+' if isinstance(node.op, ast.Add) else '-'} 0"),))
        if isinstance(node.op, ast.BitXor) and one:
            yield _Edit("wrong parity", node, ((node.right, "0"),))
        if isinstance(node.op, ast.Sub) and not isinstance(node.right, ast.Constant):
            yield _Edit("operands swapped", node, ((node.left, f"({right})"), (node.right, f"({left})")))
    if isinstance(node, ast.Call) and _called(node) == "where" and len(node.args) == 3:
        yes, no = node.args[1:]
        yield _Edit("choices swapped", node, ((yes, cut.of(no)), (no, cut.of(yes))))
    if isinstance(node, ast.Call) and _called(node) in ("minimum", "maximum"):
        other = "maximum" if _called(node) == "minimum" else "minimum"
        yield _Edit("minimum and maximum swapped", node, ((node.func, cut.of(node.func)[:-7] + other),))
    if isinstance(node, ast.Call) and _called(node) == "index" and node.args:
        yield _Edit("index + 1", node, ((node.args[0], f"({cut.of(node.args[0])}) + 1"),))


_REDUCTIONS = {"sum": "max", "max": "min", "min": "max"}
_FUNCTIONS = {"abs", "exp", "exp2", "log", "log2", "tanh", "sqrt", "rsqrt", "cdiv", "trans", "permute", "flip"}


def _arithmetic(node: ast.AST, cut: _Text) -> Iterator[_Edit]:
    """Signs, factors, terms of masks, reductions and functions: what options compute, where nothing synchronises."""
    if isinstance(node, ast.BinOp) and not _compile_time(node):
        left, right = cut.of(node.left), cut.of(node.right)
        if isinstance(node.op, (ast.Add, ast.Sub)) and not isinstance(node.right, ast.Constant):
            other = "-" if isinstance(node.op, ast.Add) else "+"
            yield _Edit("sign", node, ((node, f"({left}) {other} ({right})"),))
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield _Edit("last term dropped", node, ((node, left),))
            yield _Edit("first term dropped", node, ((node, right),))
        if isinstance(node.op, (ast.Mult, ast.Div, ast.FloorDiv)):
            yield _Edit("factor dropped", node, ((node, left),))
    if isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.BitAnd, ast.BitOr)):
        yield _Edit("not added up", node, ((node, f"{cut.of(node.target)} = {cut.of(node.value)}"),))
    if isinstance(node, ast.Call):
        name = _called(node)
        if name in _REDUCTIONS and len(node.args) > 1:
            yield _Edit("another reduction", node, ((node.func, cut.of(node.func)[: -len(name)] + _REDUCTIONS[name]),))
        if name in _FUNCTIONS and node.args and isinstance(node.func, ast.Attribute):
            receiver = node.func.value
            of_module = isinstance(receiver, ast.Name) and receiver.id in ("gl", "tl", "libdevice")
            yield _Edit("function dropped", node, ((node, f"({cut.of(node.args[0] if of_module else receiver)})"),))
    if isinstance(node, ast.For) and _called(node.iter) == "range" and len(node.iter.args) > 1:  # type: ignore[attr-defined]
        last = node.iter.args[1]  # type: ignore[attr-defined]
        yield _Edit("a step less", node.iter, ((last, f"({cut.of(last)}) - ({_step(node.iter, cut)})"),))


def _step(node: ast.expr, cut: _Text) -> str:
    """What a `range` counts by."""
    if not isinstance(node, ast.Call) or len(node.args) < 3:
        return "1"
    return cut.of(node.args[2])


_EXPRESSIONS: tuple[Callable[[ast.AST, _Text], Iterator[_Edit]], ...] = (
    _barriers, _products, _transfers, _atomics, _numbers,
)  # fmt: skip
