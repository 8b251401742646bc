"""`flashgen db export|import|merge|prune|digest`: rows that travel between databases, and rows that go."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from flashgen import dispatch, settings
from flashgen.cli.output import json_option, print_json
from flashgen.errors import DatabaseError, FlashgenError
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import exchange, open_store, schema
from flashgen.store.location import locate
from flashgen.store.records import Record
from flashgen.variants import by_name

_origin_option = click.option(
    "--origin",
    metavar="NAME",
    help="Where rows that were local there came from; 'local' for this very machine's. [default: the name given]",
)


def exists() -> bool:
    """Whether there is a database to read; a server's is taken to be there."""
    path = settings.read().database_path
    return path is None or path.exists()


def require() -> None:
    """Raise a DatabaseError where there is none."""
    if not exists():
        raise DatabaseError(f"there is no database at {locate().name} yet: `flashgen tune` makes one.")


@click.command("export")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--winners", is_flag=True, help="The winners alone, not every trial.")
@click.option("--op", help="Rows of this operation alone.")
@click.option("--gpu", help="Rows of this GPU alone, e.g. h100.")
@json_option
def export(output: Path, winners: bool, op: str | None, gpu: str | None, as_json: bool) -> None:
    """Write rows to a file of JSON lines, for `flashgen db import` elsewhere."""
    require()
    with open_store() as store:
        rows = store.winners(op=op, gpu=gpu) if winners else store.trials(op=op, gpu=gpu)
    digest = exchange.write_file(output, rows)
    if as_json:
        print_json({"path": str(output), "rows": len(rows), "digest": digest})
    else:
        click.echo(f"{len(rows)} rows to {output} (digest {digest})")


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_origin_option
@json_option
def import_(files: tuple[Path, ...], origin: str | None, as_json: bool) -> None:
    """Add the rows of exported files, or of seeds files; a row that is there already stays as it is.

    All files are read before anything is added. An imported row wins over no local one of equal quality.
    """
    rows = [exchange.adopted(row, origin or path.stem) for path in files for row in exchange.read_file(path)]
    _add(rows, {"files": [str(path) for path in files]}, as_json=as_json)


@click.command("merge")
@click.argument("databases", nargs=-1, required=True, metavar="DATABASE...")
@_origin_option
@json_option
def merge(databases: tuple[str, ...], origin: str | None, as_json: bool) -> None:
    """Add the rows of other databases (paths or URLs): a union, whichever comes first. The others are only read."""
    rows: list[Record] = []
    for other in databases:
        where = locate(other)
        name = origin or (where.path.stem if where.path is not None else where.name)
        with open_store(other) as store:
            rows += [exchange.adopted(row, name) for row in store.trials()]
    _add(rows, {"databases": [locate(other).name for other in databases]}, as_json=as_json)


def _add(rows: list[Record], what: dict[str, object], *, as_json: bool) -> None:
    with open_store(write=True) as store:
        added = store.add(rows)
    dispatch.forget()
    if as_json:
        print_json({**what, "rows": len(rows), "added": added})
    else:
        click.echo(f"{added} of {len(rows)} rows are new in {locate().name}")


@click.command("prune")
@click.option("--stale", is_flag=True, help="Rows of kernels that this flashgen's templates render differently.")
@click.option("--losers", is_flag=True, help="Trials that ran or were ranked and did not win. Failures stay.")
@click.option("--dry-run", is_flag=True, help="Say what would go; change nothing.")
@json_option
def prune(stale: bool, losers: bool, dry_run: bool, as_json: bool) -> None:
    """Take rows away that no call uses; a copy is kept beside the file.

    No winner of a kernel that is still rendered goes. What is gone is not a trial that `flashgen tune` has seen.
    """
    if not (stale or losers):
        raise click.UsageError("name what should go: --stale, --losers or both.")
    require()
    with open_store() as store:
        rows, kept = store.trials(), {row.sha for row in store.winners()}
    old = _stale(rows) if stale else []
    gone = {row.sha for row in old}
    lost = [row for row in rows if row.status in ("ok", "predicted") and row.sha not in kept | gone] if losers else []
    copy, removed = None, len(old) + len(lost)
    if removed and not dry_run:
        if (path := locate().path) is not None:
            copy = str(schema.keep_copy(path, "prune"))
        with open_store(write=True) as store:
            removed = store.remove((*old, *lost))
        dispatch.forget()
    if as_json:
        print_json(
            {"removed": 0 if dry_run else removed, "stale": len(old), "losers": len(lost), "copy": copy, "dry_run": dry_run}
        )  # fmt: skip
    else:
        kinds = ", ".join(
            f"{len(found)} {name}" for name, asked, found in (("stale", stale, old), ("losers", losers, lost)) if asked
        )
        done = "would be removed" if dry_run else f"removed{f'; the copy is {copy}' if copy else ''}"
        click.echo(f"{removed} of {len(rows)} rows {done} ({kinds})")


def _stale(rows: Iterable[Record]) -> list[Record]:
    current: dict[tuple[str, str, str], bool] = {}
    for row in rows:
        key = (row.spec_key, row.variant, row.digest)
        if key not in current:
            current[key] = _may_be_current(*key)
    return [row for row in rows if not current[row.spec_key, row.variant, row.digest]]


def _may_be_current(spec_key: str, variant: str, digest: str) -> bool:
    """Whether a kernel is what would be rendered today; true also where that cannot be told, as for mods known by a digest."""
    try:
        spec = AttentionSpec.from_key(spec_key)
        recipe = by_name(variant)
    except FlashgenError:
        return False  # no call has such a key
    if spec.mods is not None:
        return True
    try:
        return render(spec, recipe).digest == digest
    except FlashgenError:
        return True


@click.command("digest")
@json_option
def digest(as_json: bool) -> None:
    """Digest of all rows: equal on machines whose calls find the same rows; for FLASHGEN_REQUIRE_DB_DIGEST."""
    found, trials = exchange.NO_ROWS, 0
    if exists():
        with open_store() as store:
            found, trials = store.digest(), len(store.trials())
    if as_json:
        print_json({"path": locate().name, "digest": found, "trials": trials})
    else:
        click.echo(found)


COMMANDS = (export, import_, merge, prune, digest)
