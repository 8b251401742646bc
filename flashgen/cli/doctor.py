"""`flashgen doctor`: what works here, and why the rest does not."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata, util
from pathlib import Path
from typing import Any

import click

import flashgen
from flashgen import assets, settings
from flashgen.cli.output import json_option, print_json
from flashgen.errors import FlashgenError
from flashgen.spec import AttentionSpec
from flashgen.store import open_store
from flashgen.store.location import locate
from flashgen.target import CPU, Target
from flashgen.target.driver import recognise
from flashgen.variants import by_name

_PACKAGES = ("torch", "triton", "numpy", "jinja2", "optuna", "sqlalchemy", "alembic", "transformers")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_AMD_DRIVER = Path("/sys/module/amdgpu/version")


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Versions, GPUs, database, templates, and which backends work here.

    Each backend computes a small problem. Exit code 1 if something that should work is broken.
    """
    broken: list[str] = []
    document: dict[str, Any] = {
        "versions": {
            "flashgen": flashgen.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "gpus": _gpus(broken),
        "target": _target(),
        "cache": _cache(broken),
        "database": _database(broken),
        "templates": _templates(),
        "backends": _backends(broken),
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


def _gpus(broken: list[str]) -> list[dict[str, Any]]:
    """Each GPU with the target it is, or with what is missing to be one."""
    import torch

    if not torch.cuda.is_available():
        for maker, file, version in (
            ("an NVIDIA", _NVIDIA_DRIVER, torch.version.cuda),
            ("an AMD", _AMD_DRIVER, torch.version.hip),
        ):
            if file.exists():
                why = "this torch is not built for it" if version is None else "torch cannot use it"
                broken.append(f"gpu: {maker} driver is loaded, but {why} (torch {torch.__version__})")
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpu = recognise(properties)
        found.append(
            {
                "index": index,
                "name": str(properties.name),
                "target": gpu.target.name,
                "arch": gpu.target.arch,
                "sms": gpu.target.num_sms,
                "known": gpu.known,
                "note": gpu.note,
            }
        )
    return found


def _target() -> dict[str, Any]:
    """What a call without `target` is tuned for: the current GPU."""
    import torch

    if not torch.cuda.is_available():
        note = "no GPU: kernels are interpreted on request; tuning needs --target and is predicted"
        return {"name": CPU.name, "arch": CPU.arch, "note": note}
    gpu = recognise(torch.cuda.get_device_properties(torch.cuda.current_device()))
    return {"name": gpu.target.name, "arch": gpu.target.arch, "note": gpu.note}


def _cache(broken: list[str]) -> str:
    folder = settings.read().cache_dir
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        broken.append(f"cache: {existing} is not a writable folder. Set FLASHGEN_CACHE_DIR to one.")
    return str(folder)


def _database(broken: list[str]) -> dict[str, Any]:
    env = settings.read()
    try:
        where = locate().name  # never shows a password
        if env.database_path is not None and not env.database_path.exists():
            return {"path": where, "schema": None, "note": "none yet: `flashgen tune` makes one"}
        with open_store() as store:
            return {key: value for key, value in store.info().items() if key in ("path", "schema", "trials", "winners")}
    except FlashgenError as error:
        broken.append(f"database: {error}")
        return {"path": str(env.database_path) if env.database_path else None, "schema": None, "error": str(error)}


def _templates() -> dict[str, Any]:
    folder = assets.templates_dir()
    digest = hashlib.sha256()
    files = sorted(folder.rglob("*.jinja"))
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return {"path": str(folder), "files": len(files), "digest": digest.hexdigest()}


# -- backends --


def _backends(broken: list[str]) -> dict[str, str]:
    states = {}
    for name in ("triton", "torch", "gluon"):
        needed = "torch" if name == "torch" else "triton"
        if util.find_spec(needed) is None:
            states[name] = f"does not work: {needed} is not installed (pip install {needed})"
            continue
        target = Target.detect()
        reason = by_name("gluon_fwd_sm90").supports(_HALF, target) if name == "gluon" else None
        if reason is not None:
            states[name] = f"does not run on this GPU: {reason}"  # as it should: nothing is broken
            continue
        problem = _try(name)
        if problem is None:
            states[name] = "works" if name == "torch" or target.backend != "cpu" else _ON_CPU[name]
        else:
            states[name] = f"does not work: {problem}"
            broken.append(f"backend {name}: {problem}")
    return states


_ON_CPU = {
    "triton": "works on CPU tensors in the interpreter (slow, for checking); compiles for other GPUs",
    "gluon": "works on CPU tensors in the simulator (slow, for checking); compiles for Hopper",
}
_HALF = AttentionSpec(dtype="fp16", head_dim=16, head_dim_v=16)


def _try(backend: Any) -> str | None:
    """Compute a small problem; None, or what went wrong."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.randn(1, 20, 1, 16, generator=torch.Generator().manual_seed(0)).to(device)
    # An explicit configuration: the database, which may be the patient, is not asked.
    config: dict[str, Any] | None = None
    bound = 1e-3
    if backend == "triton":
        config = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    elif backend == "gluon":
        q, bound = q.half(), 5e-3
        config = by_name("gluon_fwd_sm90").default(_HALF, Target.named("h100")).to_dict()
    try:
        out = flashgen.attention(q, q, q, backend=backend, config=config)
        rows = q[0, :, 0].float()
        exact = (rows @ rows.T / 4).softmax(-1) @ rows
        difference = float((out[0, :, 0] - exact).abs().max())  # type: ignore[index,call-overload]
    except Exception as error:  # whatever is broken is to be told, not raised
        return f"{type(error).__name__}: {error}"
    return None if difference < bound else f"a small problem is off by {difference:.3g}"


def _print(document: dict[str, Any]) -> None:
    for name, version in document["versions"].items():
        click.echo(f"{name:14}{version or 'not installed'}")
    if not document["gpus"]:
        click.echo(f"{'GPUs':14}none")
    for gpu in document["gpus"]:
        click.echo(f"{'GPU ' + str(gpu['index']):14}{gpu['name']} ({gpu['arch']}, {gpu['sms']} SMs): {gpu['note']}")
    target = document["target"]
    click.echo(f"{'target':14}{target['name']}" + ("" if document["gpus"] else f": {target['note']}"))
    click.echo(f"{'cache':14}{document['cache']}")
    database = document["database"]
    said = (
        database.get("error")
        or database.get("note")
        or f"schema {database['schema']}, {database['trials']} trials, {database['winners']} winners"
    )
    click.echo(f"{'database':14}{database['path'] or 'not usable'}: {said}")
    templates = document["templates"]
    click.echo(f"{'templates':14}{templates['files']} files, digest {templates['digest'][:16]}, {templates['path']}")
    for name, state in document["backends"].items():
        click.echo(f"{'backend':14}{name}: {state}")
    for text in document["broken"]:
        click.echo(f"broken: {text}", err=True)
