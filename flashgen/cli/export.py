"""`flashgen export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flashgen.cli.output import json_option, print_json
from flashgen.cli.problems import problem_of, problem_options, spec_of, take, target_of
from flashgen.exporter import FORMATS
from flashgen.exporter import export as write_export
from flashgen.spec import AttentionSpec


@click.command()
@click.argument("spec", required=False)
@problem_options
@click.option("--format", "format_", type=click.Choice(FORMATS), default="py", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write, or a folder.")
@click.option(
    "--target", "target_name", metavar="NAME", help="Whose configurations to carry; the installed GPU where not given."
)
@click.option("--force", is_flag=True, help="Overwrite a file that flashgen did not write.")
@json_option
def export(
    spec: str | None, format_: str, output: Path, target_name: str | None, force: bool, as_json: bool, **values: Any
) -> None:
    """Write the kernel of a SPEC or problem as a file that works without flashgen."""
    given = take(values)
    what = spec_of(spec, given) if spec is not None else problem_of(given)
    path = write_export(what, output, format=format_, target=target_of(target_name), force=force)
    if as_json:
        print_json(
            {"path": str(path), "format": format_, "spec": (what if isinstance(what, AttentionSpec) else what.spec).key}
        )
    else:
        click.echo(f"wrote {path}; test it: python {path}")
