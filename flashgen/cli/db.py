"""`flashgen db`: the tuning database."""

from __future__ import annotations

import click

from flashgen import settings
from flashgen.cli import db_rows
from flashgen.cli.output import Group, json_option, print_json, print_table
from flashgen.store import migrate as migrate_schema
from flashgen.store import open_store
from flashgen.store.location import locate
from flashgen.store.records import Record


@click.group(cls=Group)
def db() -> None:
    """The tuning database."""


@db.command()
@json_option
def path(as_json: bool) -> None:
    """Where it is (whether or not it exists yet)."""
    where = locate().name
    if as_json:
        print_json({"path": where, "exists": db_rows.exists()})
    else:
        click.echo(where)


@db.command()
@json_option
def info(as_json: bool) -> None:
    """Path, schema, and how many trials and winners it holds."""
    if db_rows.exists():
        with open_store() as store:
            found = store.info()
    else:
        found = {
            "path": locate().name,
            "schema": None,
            "trials": 0,
            "winners": 0,
            "note": "no database yet: `flashgen tune` makes one",
        }
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            click.echo(f"{name}\t{value}")


@db.command("list")
@click.option("--all", "everything", is_flag=True, help="Every trial, not the winners alone.")
@json_option
def list_(everything: bool, as_json: bool) -> None:
    """The winners, or every trial."""
    rows: list[Record] = []
    if db_rows.exists():
        with open_store() as store:
            rows = store.trials() if everything else store.winners()
    if as_json:
        print_json({"rows": [row.to_dict() for row in rows]})
        return
    print_table(["spec", "gpu", "shape", "config", "status", "figure"], [_cells(row) for row in rows])


def _cells(row: Record) -> list[str]:
    shape = row.shape
    size = f"b{shape['batch']} {shape['seqlen_q']}x{shape['seqlen_k']} h{shape['num_heads_q']}/{shape['num_heads_kv']}"
    config = " ".join(f"{name}={value}" for name, value in sorted(row.config.items()))
    if row.status == "predicted":
        figure = f"predicted rank {row.rank}, bound by {row.bound_by}"
    else:
        figure = f"{row.latency_ms:.4f} ms" if row.latency_ms is not None else (row.message or "")[:60]
    return [row.spec_key, row.gpu, size, config, row.status, figure]


@db.command()
@json_option
def migrate(as_json: bool) -> None:
    """Bring an older schema up to date; a copy is kept beside the file."""
    db_rows.require()
    old, new = migrate_schema(settings.read().database_url)
    if as_json:
        print_json({"from": old, "to": new})
    else:
        click.echo(f"schema {new}: nothing to do" if old == new else f"migrated from {old} to {new}")


@db.command()
@json_option
def verify(as_json: bool) -> int:
    """Check the file and every row; exit code 1 if something is wrong."""
    found: list[str] = []
    if db_rows.exists():
        with open_store() as store:
            found = list(store.verify())
    if as_json:
        print_json({"ok": not found, "problems": found})
    elif not found:
        click.echo("ok" if db_rows.exists() else f"ok: there is no database at {locate().name} yet")
    else:
        click.echo("\n".join(found))
        click.echo(f"Error: {len(found)} problems in {locate().name}", err=True)
    return 1 if found else 0


for _command in db_rows.COMMANDS:
    db.add_command(_command)
