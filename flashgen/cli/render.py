"""`flashgen render`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flashgen.cli.output import json_option, print_json
from flashgen.cli.problems import config_of, generated_variant, problem_options, spec_of, take, target_of
from flashgen.errors import RenderError
from flashgen.render import render as render_source
from flashgen.target import CPU


@click.command()
@click.argument("spec", required=False)
@problem_options
@click.option(
    "--variant", "variant_name", metavar="NAME", help="The recipe; the first that supports the spec where not given."
)
@click.option("--target", "target_name", metavar="NAME", help="Check the spec (and --config) against this GPU.")
@click.option("--config", "config_text", metavar="KEY=VALUE,...", help="A configuration to check against the target.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write here instead of printing.")
@json_option
def render(spec: str | None, output: Path | None, as_json: bool, **values: Any) -> None:
    """Print the kernel source of a SPEC, e.g. attention_fwd-bf16-d128-causal."""
    wanted = spec_of(spec, take(values))
    target = target_of(values["target_name"]) or CPU
    config = config_of(values["config_text"])
    chosen = generated_variant(wanted, target, values["variant_name"], config)
    if config is not None:
        chosen.parse_config(config, wanted, target)
    source = render_source(wanted, chosen)
    if output is not None:
        try:
            output.write_text(source.text)
        except OSError as error:
            raise RenderError(f"{output} cannot be written: {error}") from error
    if as_json:
        document: dict[str, Any] = {
            "spec": wanted.key,
            "variant": chosen.name,
            "digest": source.digest,
            "name": source.name,
        }
        print_json(document | ({"path": str(output)} if output is not None else {"text": source.text}))
    elif output is None:
        click.echo(source.text, nl=False)
    else:
        click.echo(f"wrote {output} ({source.name})")
