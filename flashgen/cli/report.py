"""Commands of the contract that are not built yet: they exist and say so."""

from __future__ import annotations

import click

from flashgen.cli.output import json_option
from flashgen.problem import not_built

_ANY = {"ignore_unknown_options": True}


@click.command(context_settings=_ANY)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@json_option
def report(arguments: tuple[str, ...], as_json: bool) -> None:
    """One HTML file of all results (not built yet)."""
    raise not_built("flashgen report")
