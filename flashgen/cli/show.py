"""`flashgen show`: what there is to choose from."""

from __future__ import annotations

import shutil
import sys
import textwrap
import warnings
from dataclasses import asdict
from typing import Any

import click

from flashgen.cli.output import Group, json_option, print_json, print_table
from flashgen.cli.problems import named, problem_of, problem_options, problems_of, take, target_of
from flashgen.coverage import covered, limits, options_of_a_call, spelled, uncovered
from flashgen.presets import PRESETS, Layers, find
from flashgen.problem import Problem
from flashgen.spec import OPS
from flashgen.store import portfolios
from flashgen.target import TARGETS, Target
from flashgen.variants import REGISTRY, candidates


@click.group(cls=Group)
def show() -> None:
    """Variants, targets, presets, spaces, portfolios, proofs, plans."""


@show.command()
@json_option
def variants(as_json: bool) -> None:
    """The recipes, and which options each of them takes on its own GPU."""
    h100 = Target.named("h100")
    rows: list[dict[str, Any]] = [
        {
            "name": v.name,
            "op": v.op,
            "backend": v.backend,
            "template": v.template,
            "knobs": [k.name for k in v.knobs],
            "options": covered(v, h100),
            "limits": limits(v, h100),
        }
        for v in REGISTRY
    ]
    if as_json:
        print_json({"variants": rows})
    else:
        print_table(
            ["variant", "op", "backend", "template"],
            [[r["name"], r["op"], r["backend"], r["template"] or "-"] for r in rows],
        )
        click.echo()
        options = map(spelled, options_of_a_call())
        names = [r["name"] for r in rows]
        print_table(["option", *names], [[o, *("yes" if o in r["options"] else "-" for r in rows)] for o in options])
        for row in rows:
            if row["limits"]:
                click.echo(f"\n{row['name']} leaves to another:")
            for what, reason in row["limits"].items():
                click.echo(f"  {what}: {reason}")


@show.command()
@json_option
def targets(as_json: bool) -> None:
    """The known GPUs, with their published figures."""
    if as_json:
        print_json({"targets": [asdict(target) for target in TARGETS.values()]})
        return
    headers = ["target", "arch", "SMs", "smem KB", "L2 MB", "GB/s", "MHz", "bf16 TF"]
    print_table(headers, [_figures(target) for target in TARGETS.values()])
    click.echo()
    # On a terminal the sources wrap to its width; a pipe gets one line each.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for t in TARGETS.values():
        text = f"{t.name}: {t.gpu}. {t.source}."
        click.echo(textwrap.fill(text, max(40, width), subsequent_indent="    ") if width else text)


def _figures(target: Target) -> list[str]:
    """One row; `-` where nothing is published."""
    figures = (target.l2_bytes / 2**20, target.hbm_gbps, target.clock_mhz, target.bf16_tflops)
    return [
        target.name,
        target.arch,
        str(target.num_sms),
        f"{target.smem_bytes // 1024}",
        *(f"{figure:g}" if figure else "-" for figure in figures),
    ]


@show.command()
@json_option
def presets(as_json: bool) -> None:
    """The named model shapes."""
    if as_json:
        print_json({"presets": [asdict(preset) for preset in PRESETS.values()]})
        return
    headers = ["preset", "layers", "heads", "kv heads", "head dim", "causal", "options", "length", "dtype", "source"]
    rows = [
        [
            f"{model.name}/{row.kind}" if len(model.layers) > 1 else model.name,
            row.count,
            row.num_heads_q,
            row.num_heads_kv,
            row.head_dim if row.head_dim_v is None else f"{row.head_dim}/{row.head_dim_v}",
            row.causal,
            _options(row),
            "x".join(map(str, row.lengths(model.seqlen))),
            model.dtype,
            model.source,
        ]
        for model in PRESETS.values()
        for row in model.layers
    ]
    print_table(headers, rows)


def _options(row: Layers) -> str:
    named = {
        f"window {row.window}": row.window,
        f"softcap {row.softcap:g}": row.softcap,
        "sinks": row.has_sinks,
        f"scale {row.softmax_scale}": row.softmax_scale,
    }
    return ", ".join(text for text, given in named.items() if given) or "-"


@show.command()
@problem_options
@click.option("--target", "target_name", metavar="NAME", default="h100", show_default=True)
@json_option
def spaces(target_name: str, as_json: bool, **values: Any) -> None:
    """The knobs of a spec's variants, and how many configurations are legal; of llama3-8b where nothing is named."""
    given = take(values)
    if not named(given):
        given["presets"] = ("llama3-8b",)
    problem, target = problem_of(given), Target.named(target_name)
    rows: list[dict[str, Any]] = []
    for variant in candidates(problem.spec):
        if variant.supports(problem.spec, target) is None and variant.knobs:
            knobs = [{"name": k.name, "values": list(k.values), "meaning": k.meaning} for k in variant.knobs]
            known = [
                {"config": row.config.to_dict(), "source": row.source}
                for row in variant.known_good(problem.spec, target)
            ]
            rows.append(
                {
                    "variant": variant.name,
                    "legal": len(variant.space(problem.spec, target)),
                    "knobs": knobs,
                    "known_good": known,
                }
            )
    if as_json:
        print_json({"spec": problem.spec.key, "target": target.name, "spaces": rows})
        return
    for row in rows:
        click.echo(
            f"{row['variant']} for {problem.spec.key} on {target.name}: {row['legal']} legal configurations before compiling"
        )
        print_table(
            ["knob", "values", "meaning"],
            [[k["name"], ", ".join(map(str, k["values"])), k["meaning"]] for k in row["knobs"]],
        )
        print_table(
            ["known-good tile", "source"],
            [[" ".join(f"{n}={x}" for n, x in k["config"].items()), k["source"]] for k in row["known_good"]],
        )


@show.command()
@problem_options
@click.option("--target", "target_name", metavar="NAME", help="The installed GPU, or the CPU, where not given.")
@click.option("--backend", type=click.Choice(["auto", "gluon", "triton", "torch"]), default="auto", show_default=True)
@json_option
def plan(target_name: str | None, backend: str, as_json: bool, **values: Any) -> None:
    """What a call would run, with which configuration, from where, and why not something else.

    A preset without a kind: the same for every kind of its layers.
    """
    given, target = take(values), target_of(target_name)
    if len(given["presets"]) > 1:
        problem_of(given)  # refuses, and says why
    rows, texts = [], []
    for problem, heading in zip(problems_of(given, all_kinds=True), _headings(given), strict=True):
        row, text = _plan(problem, target, backend)
        rows.append(row)
        texts.append(heading + text)
    if not as_json:
        click.echo("\n".join(texts))
    elif len(rows) == 1:
        print_json(rows[0])
    else:
        print_json({"preset": given["presets"][0], "plans": rows})


def _headings(given: dict[str, Any]) -> list[str]:
    """The kinds of layers that a preset names, where there are several; else one empty heading."""
    if not given["presets"]:
        return [""]
    model, kinds = find(given["presets"][0])
    return [f"{model.name}/{row.kind}, {row.count} layers: " for row in kinds] if len(kinds) > 1 else [""]


@show.command()
@click.option("--target", "target_name", metavar="NAME", help="One GPU; all where not given.")
@json_option
def portfolio(target_name: str | None, as_json: bool) -> None:
    """The few configurations per dtype and head dim that are good where nothing was tuned; a call takes the first."""
    named_targets = [Target.named(target_name)] if target_name else [t for t in TARGETS.values() if t.backend != "cpu"]
    rows: dict[str, tuple[portfolios.Member, ...]] = {
        target.name: tuple(row for op in OPS for row in portfolios.load(target.arch, op)) for target in named_targets
    }
    if as_json:
        print_json({"portfolios": {name: [asdict(row) for row in found] for name, found in rows.items()}})
        return
    headers = ["target", "kernel", "dtype", "head dim", "place", "configuration", "basis", "problems", "worst", "from"]
    print_table(headers, [_member(name, row) for name, found in rows.items() for row in found])
    click.echo(
        "worst: time over the best one, on the measured problems that a member is taken for; a predicted member was never timed"
    )


@show.command()
@click.option("--target", "target_name", metavar="NAME", default="h100", show_default=True)
@click.option("--op", type=click.Choice(OPS), default="attention_fwd", show_default=True)
@click.option("--lse", is_flag=True, help="The forward kernels that also return lse, too.")
@json_option
@click.pass_context
def proof(ctx: click.Context, target_name: str, op: str, lse: bool, as_json: bool) -> None:
    """What the compiler makes of the default Hopper kernels, without a GPU; exit code 1 where a default spills or serialises.

    Compiles the defaults of head dims 64, 128 and 256 with the installed Triton, unless it did before.
    """
    from flashgen.proof import prove  # the compiling workers are started only here

    target = Target.named(target_name)
    rows = prove(target, op=op, lse=lse)
    if as_json:
        print_json({"target": target.name, "proofs": [row.to_json() for row in rows]})
    elif not rows:
        click.echo(f"no Gluon kernel of {op} is written for {target.name} ({target.arch})")
    else:
        headers = [
            "kernel",
            "spec",
            "registers",
            "spilled",
            "serialised",
            "shared memory",
            "loop",
            "verdict",
            "configuration",
        ]
        print_table(
            headers,
            [
                [
                    row.variant, row.spec, row.registers, f"{row.spill_bytes} B", "yes" if row.serialised else "no",
                    f"{row.smem_bytes} of {row.smem_limit}", row.loop, "; ".join(row.wrong) or "ok", row.config,
                ]
                for row in rows
            ],
        )  # fmt: skip
        click.echo(
            f"Triton {rows[0].triton}, {rows[0].arch}a; registers: at launch, before the warpgroups trade them; loop: a warp's instructions a key block"
        )
    if any(row.wrong for row in rows):
        ctx.exit(1)


def _member(target: str, row: portfolios.Member) -> list[str]:
    dims = f"{row.head_dim}" if row.head_dim == row.head_dim_v else f"{row.head_dim}/{row.head_dim_v}"
    basis = f"measured ({row.measured} of {row.problems} problems)" if row.measured else "predicted"
    return [
        target, row.variant, row.dtype, dims, str(row.place), " ".join(f"{n}={x}" for n, x in sorted(row.config.items())), basis,
        f"{row.problems} of {row.of}", "-" if row.slowdown is None else f"{row.slowdown:.3f}", ", ".join(row.gpus),
    ]  # fmt: skip


def _plan(problem: Problem, target: Target | None, backend: str) -> tuple[dict[str, Any], str]:
    """One plan, as a document and as text, with the options that no kernel covers yet."""
    from flashgen import dispatch

    with warnings.catch_warnings():
        # The fall to torch is part of the answer.
        warnings.simplefilter("ignore")
        answer = dispatch.resolve(problem, target, backend=backend)
    # On the CPU kernels are interpreted: what they cover is the same.
    missing = uncovered(problem.spec, answer.target)
    lines = [str(answer)]
    if answer.backend == "torch" and missing:
        lines += [f"  not yet  {name} does not cover {', '.join(options)}" for name, options in missing.items()]
    document = {
        "problem": str(problem),
        "target": answer.target.name,
        "backend": answer.backend,
        "variant": answer.variant,
        "config": answer.config.to_dict(),
        "config_source": answer.config_source,
        "rejected": answer.rejected,
        "uncovered": missing,
        "notes": list(answer.notes),
    }
    return document, "\n".join(lines)
