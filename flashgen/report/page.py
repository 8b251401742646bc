"""The page: `templates/report/report.html.jinja` over a document's values, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flashgen import assets
from flashgen.memory import size
from flashgen.report import charts
from flashgen.report.data import MEANING, Document, compact
from flashgen.report.memory import MemoryRow
from flashgen.report.surface import WORDS, figure, scale


def page(
    document: Document, memory: Sequence[Sequence[MemoryRow]] = (), left_out: Mapping[str, str] | None = None
) -> str:
    """The HTML text: one document without a script or an outside request.

    Args:
        document: what was tuned.
        memory: a preset's rows each.
        left_out: presets whose memory is not counted -> why.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(assets.templates_dir() / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": figure, "bytes": size, "compact": compact}
    return environment.get_template("report.html.jinja").render(
        document=document,
        memory=[(rows, charts.growth_charts(rows)) for rows in memory if rows],
        left_out=left_out or {},
        charts=charts,
        meaning=MEANING,
        words=WORDS,
        scale=scale(),
    )
