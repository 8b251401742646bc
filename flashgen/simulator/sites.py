"""Source lines of the simulated text: where an operation stands, for reports."""

from __future__ import annotations

import linecache
import sys
from typing import NamedTuple

_shown: dict[str, str] = {}  # file name given to compile() -> the name that a reader knows


class Site(NamedTuple):
    """A line of the simulated source.

    Attributes:
        source: the name of the source, as the caller knows it.
        line: line number, from 1.
        function: the jit function the line stands in.
        text: the line itself, stripped.
    """

    source: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} in {self.function}: `{self.text}`"


class Mark(NamedTuple):
    """A site as noted during a run: cheap to make, resolved only for a report."""

    file: str
    line: int
    function: str

    def site(self) -> Site:
        text = linecache.getline(self.file, self.line).strip()
        return Site(_shown.get(self.file, self.file), self.line, self.function, text[:120])


HOST = Mark("<host>", 0, "launch")


def register(file: str, shown: str, text: str) -> None:
    """Make a source known under the name its code objects carry."""
    _shown[file] = shown
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)


def forget(file: str) -> None:
    """Drop a source: its marks still resolve to line numbers, without the text."""
    _shown.pop(file, None)
    linecache.cache.pop(file, None)


def here() -> Mark:
    """The innermost line of a simulated source that is running in this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename in _shown:
            return Mark(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return HOST


def innermost(error: BaseException) -> Mark:
    """The innermost line of a simulated source in an exception's traceback."""
    mark, trace = HOST, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename in _shown:
            mark = Mark(code.co_filename, trace.tb_lineno, code.co_name)
        trace = trace.tb_next
    return mark
