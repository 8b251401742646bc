"""`flashgen db`: the tuning database."""

from __future__ import annotations

from typing import Any

import click

from flashgen import settings
from flashgen.cli.output import Group, json_option, print_json, print_table
from flashgen.errors import DatabaseError
from flashgen.problem import not_built
from flashgen.store import migrate as migrate_schema
from flashgen.store import open_store
from flashgen.store.location import locate
from flashgen.store.records import Record


@click.group(cls=Group)
def db() -> None:
    """The tuning database."""


def _exists() -> bool:
    path = settings.read().database_path
    return path is None or path.exists()


@db.command()
@json_option
def path(as_json: bool) -> None:
    """Where it is (whether or not it exists yet)."""
    where = locate().name
    if as_json:
        print_json({"path": where, "exists": _exists()})
    else:
        click.echo(where)


@db.command()
@json_option
def info(as_json: bool) -> None:
    """Path, schema, and how many trials and winners it holds."""
    if _exists():
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
    if _exists():
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
    if not _exists():
        raise DatabaseError(f"there is no database at {locate().name} yet: `flashgen tune` makes one.")
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
    if _exists():
        with open_store() as store:
            found = list(store.verify())
    if as_json:
        print_json({"ok": not found, "problems": found})
    elif not found:
        click.echo("ok" if _exists() else f"ok: there is no database at {locate().name} yet")
    else:
        click.echo("\n".join(found))
        click.echo(f"Error: {len(found)} problems in {locate().name}", err=True)
    return 1 if found else 0


def _unbuilt(name: str) -> click.Command:
    @click.command(name, context_settings={"ignore_unknown_options": True}, help=f"{name} (not built yet).")
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @json_option
    def command(arguments: tuple[str, ...], as_json: bool) -> Any:
        raise not_built(f"flashgen db {name}")

    return command


for _name in ("export", "import", "merge", "prune", "digest"):
    db.add_command(_unbuilt(_name))
