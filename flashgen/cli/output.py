"""What all commands share: --json, tables, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])


class Group(click.Group):
    """A group that names its commands where an unknown one is asked for."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}. Allowed are {', '.join(self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)


def json_option(function: _F) -> _F:
    """`--json`: one JSON document on stdout and nothing else."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")(function)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether `--json` stands among the raw arguments (for errors before parsing ends)."""
    return "--json" in arguments


def print_json(document: Any) -> None:
    """The one document."""
    click.echo(json.dumps(document, indent=2, default=str))


def print_error(
    message: str, kind: str, *, as_json: bool, hint: str = "", reasons: dict[str, str] | None = None
) -> None:
    """An error: one JSON document on stdout, or text on stderr."""
    if as_json:
        error: dict[str, Any] = {"type": kind, "message": message}
        if reasons:
            error["reasons"] = reasons
        print_json({"error": error})
        return
    click.echo(f"Error: {message}" + (f"\n{hint}" if hint else ""), err=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table: ruled on a terminal, tab-separated words elsewhere, so that a pipe can cut it."""
    if not sys.stdout.isatty():
        for row in (headers, *rows):
            click.echo("\t".join(str(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*headers)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
