"""`flashgen doctor`: what works here, and why the rest does not."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata, util
from typing import Any

import click

import flashgen
from flashgen import assets, settings
from flashgen.cli.output import json_option, print_json
from flashgen.errors import FlashgenError
from flashgen.store import open_store
from flashgen.target import Target

_PACKAGES = ("torch", "triton", "numpy", "jinja2", "optuna", "sqlalchemy", "alembic", "transformers")


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Versions, GPUs, database, templates, and which backends work here. Exit code 1 if something that should work is broken."""
    broken: list[str] = []
    document: dict[str, Any] = {
        "versions": {
            "flashgen": flashgen.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "gpus": _gpus(),
        "target": _target(),
        "cache": str(settings.read().cache_dir),
        "database": _database(broken),
        "templates": _templates(),
        "backends": _backends(),
        "broken": broken,
    }
    if as_json:
        print_json(document)
    else:
        _print(document)
    return 1 if broken else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        {"index": i, "name": torch.cuda.get_device_name(i), "target": Target.detect(i).name}
        for i in range(torch.cuda.device_count())
    ]


def _target() -> dict[str, Any]:
    target = Target.detect()
    if target.backend == "cpu":
        return {
            "name": target.name,
            "note": "no GPU: kernels are interpreted on request; tuning needs --target and is predicted",
        }
    note = (
        "known"
        if target.bf16_tflops
        else "not in the list of known targets: tuned as it is, nothing is predicted for it"
    )
    return {"name": target.name, "arch": target.arch, "note": note}


def _database(broken: list[str]) -> dict[str, Any]:
    env = settings.read()
    where = str(env.database_path or env.database_url)
    if env.database_path is not None and not env.database_path.exists():
        return {"path": where, "schema": None, "note": "none yet: `flashgen tune` makes one"}
    try:
        with open_store() as store:
            return {key: value for key, value in store.info().items() if key in ("path", "schema", "trials", "winners")}
    except FlashgenError as error:
        broken.append(f"database: {error}")
        return {"path": where, "error": str(error)}


def _templates() -> dict[str, Any]:
    folder = assets.templates_dir()
    digest = hashlib.sha256()
    files = sorted(folder.rglob("*.jinja"))
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return {"path": str(folder), "files": len(files), "digest": digest.hexdigest()}


def _backends() -> dict[str, str]:
    gpu = Target.detect().backend == "cuda"
    triton = "works" if gpu else "works on CPU tensors in the interpreter (slow, for checking); compiles for other GPUs"
    if util.find_spec("triton") is None:
        triton = "does not work: triton is not installed (pip install triton)"
    return {"triton": triton, "torch": "works", "gluon": "does not work: no variant is built yet"}


def _print(document: dict[str, Any]) -> None:
    for name, version in document["versions"].items():
        click.echo(f"{name:14}{version or 'not installed'}")
    click.echo(f"{'GPUs':14}{', '.join(gpu['name'] for gpu in document['gpus']) or 'none'}")
    click.echo(f"{'target':14}{document['target']['name']}: {document['target']['note']}")
    click.echo(f"{'cache':14}{document['cache']}")
    database = document["database"]
    said = (
        database.get("error")
        or database.get("note")
        or f"schema {database['schema']}, {database['trials']} trials, {database['winners']} winners"
    )
    click.echo(f"{'database':14}{database['path']}: {said}")
    templates = document["templates"]
    click.echo(f"{'templates':14}{templates['files']} files, digest {templates['digest'][:16]}, {templates['path']}")
    for name, state in document["backends"].items():
        click.echo(f"{'backend':14}{name}: {state}")
    for text in document["broken"]:
        click.echo(f"broken: {text}", err=True)
