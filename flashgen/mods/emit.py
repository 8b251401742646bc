"""A graph as statements of a kernel language, in the words of the user's function.

One emission serves a template: the caller names the score and the indices as they stand there, e.g. `q_idx` as a column
[BLOCK_M, 1] and `kv_idx` as a row [1, BLOCK_N], and values broadcast against each other. Each value is computed in the
smallest shape it has: what depends on `h` alone is a scalar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashgen.mods import helpers
from flashgen.mods.captures import Capture
from flashgen.mods.derivative import Derivative
from flashgen.mods.graph import Node
from flashgen.mods.writer import GLUON, TRITON, Dialect, Names, Writer

__all__ = ["GLUON", "TRITON", "DerivativeEmission", "Dialect", "Emission", "GradientText", "Names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """Text for a template.

    Attributes:
        statements: assignments, to be indented and written in order.
        results: expressions of the wanted values, which need the statements before them.
        helpers: texts of the jit functions that they call, for the top of the file.
    """

    statements: tuple[str, ...]
    results: tuple[str, ...]
    helpers: tuple[str, ...]

    @property
    def result(self) -> str:
        """The only wanted value."""
        (result,) = self.results
        return result

    def block(self, indent: int) -> str:
        """The statements, indented, each on a line."""
        return "".join(f"{' ' * indent}{line}\n" for line in self.statements)


def parameters(capture: Capture) -> tuple[str, ...]:
    """The kernel's parameters for a captured tensor: pointer, strides in elements, sizes."""
    rank = len(capture.shape)
    return (
        f"{capture.name}_ptr",
        *(f"{capture.name}_stride{d}" for d in range(rank)),
        *(f"{capture.name}_size{d}" for d in range(rank)),
    )


def emit(
    roots: Sequence[Node],
    captures: Sequence[Capture],
    *,
    dialect: Dialect = TRITON,
    names: Names | None = None,
    like: str | None = None,
    prefix: str = "",
) -> Emission:
    """Statements that compute some values of a graph.

    Elements beyond a captured tensor's sizes are not read but 0, so that the rows and keys that fill up a tile are harmless.

    Args:
        roots: the values that are wanted.
        captures: the captured tensors that loads number.
        dialect: the language.
        names: of the arguments.
        like: an expression of the shape that the results are to have; without, they have the smallest that holds them.
        prefix: of temporary names, where two emissions stand in one function.

    Returns:
        The text.
    """
    writer = Writer(captures, dialect, names or Names(), prefix)
    writer.prepare(roots)
    results = tuple(writer.result(root, like) for root in roots)
    used = helpers.texts(writer.helpers, jit=dialect.jit, lang=dialect.lang)
    return Emission(statements=tuple(writer.statements), results=results, helpers=used)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientText:
    """Where one contribution to a captured tensor's gradient goes, as text after an emission's statements.

    Attributes:
        capture: number of the captured tensor.
        value: expression to be added, of the smallest shape that holds it.
        places: expressions of the element's indices, none negative; int32 or int64.
        inside: condition that the element exists; empty for a 0-d tensor.
        depends: the arguments that the element depends on; contributions of the others meet in it.
    """

    capture: int
    value: str
    places: tuple[str, ...]
    inside: str
    depends: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivativeEmission:
    """Text of a derivative for a template.

    Attributes:
        statements, helpers: as in `Emission`.
        score: expression of the raw score's gradient.
        gradients: contributions to captured tensors.
    """

    statements: tuple[str, ...]
    helpers: tuple[str, ...]
    score: str
    gradients: tuple[GradientText, ...]

    def block(self, indent: int) -> str:
        """The statements, indented, each on a line."""
        return "".join(f"{' ' * indent}{line}\n" for line in self.statements)


def emit_derivative(
    derivative: Derivative,
    captures: Sequence[Capture],
    *,
    dialect: Dialect = TRITON,
    names: Names | None = None,
    like: str | None = None,
    prefix: str = "",
) -> DerivativeEmission:
    """Statements that compute a derivative; arguments as in `emit`, with `names.grad` the gradient of the new score."""
    writer = Writer(captures, dialect, names or Names(), prefix)
    contributions = derivative.contributions
    indices = [index for one in contributions for index in one.indices]
    writer.prepare([derivative.score, *(one.value for one in contributions), *indices])
    gradients = []
    for one in contributions:
        places, inside = writer.places(one.capture, one.indices) if one.indices else ([], "")
        gradients.append(
            GradientText(
                capture=one.capture,
                value=writer.result(one.value, like),
                places=tuple(places),
                inside=inside,
                depends=frozenset[str]().union(*(index.depends for index in one.indices)),
            )
        )
    return DerivativeEmission(
        statements=tuple(writer.statements),
        helpers=helpers.texts(writer.helpers, jit=dialect.jit, lang=dialect.lang),
        score=writer.result(derivative.score, like),
        gradients=tuple(gradients),
    )
