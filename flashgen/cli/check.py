"""`flashgen check`: the generated kernels against the fp64 oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from flashgen.cli.output import json_option, print_json, print_table
from flashgen.cli.problems import config_of, problem_options, problems_of, take
from flashgen.problem import Problem, not_built
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.tuner.context import choose_variant


@click.command()
@problem_options
@click.option(
    "--config", "config_text", metavar="KEY=VALUE,...", help="Check this configuration; the default where not given."
)
@click.option("--simulate", is_flag=True, help="Run Gluon kernels in the simulator (not built yet).")
@click.option("--mutate", is_flag=True, help="Check that broken kernels are caught (not built yet).")
@json_option
def check(simulate: bool, mutate: bool, as_json: bool, **values: Any) -> int:
    """Accuracy of the generated kernels against the fp64 reference, on small poisoned problems.

    On a GPU the kernels run there; without one in Triton's interpreter. Without options: causal and full, all dtypes.
    """
    if simulate or mutate:
        raise not_built("flashgen check --simulate" if simulate else "flashgen check --mutate")
    given, target = take(values), Target.detect()
    specs = (
        [problem.spec for problem in problems_of(given)]
        if given["presets"] or given["dtype"] or given["head_dim"]
        else _all()
    )
    rows = [_check(spec, target, values["config_text"]) for spec in specs]
    passed = all(row["ok"] for row in rows)
    if as_json:
        print_json({"target": target.name, "ok": passed, "checks": rows})
    else:
        where = "in Triton's interpreter" if target.backend == "cpu" else f"on {target.gpu}"
        headers = ["spec", "config", "largest error", "part of the budget", ""]
        print_table(
            headers,
            [
                [
                    r["spec"],
                    r["config"],
                    f"{r['max_error']:.3g}",
                    f"{r['ratio']:.2f}",
                    "ok" if r["ok"] else r["message"],
                ]
                for r in rows
            ],
        )
        click.echo(f"{sum(row['ok'] for row in rows)} of {len(rows)} inside the error budget, {where}")
    return 0 if passed else 1


def _all() -> list[AttentionSpec]:
    base: dict[str, Any] = {"head_dim": 64, "head_dim_v": 64, "has_lse": True}
    return [
        AttentionSpec(dtype=dtype, causal=causal, **base)
        for dtype in ("fp16", "bf16", "fp32")
        for causal in (False, True)
    ]  # type: ignore[arg-type]


def _check(spec: AttentionSpec, target: Target, config_text: str | None) -> dict[str, Any]:
    from flashgen import accuracy, interpret
    from flashgen.build import build

    shape: dict[str, Any] = {"batch": 1, "seqlen_q": 1, "seqlen_k": 1, "num_heads_q": 1, "num_heads_kv": 1}
    problem = Problem(
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        causal=spec.causal,
        return_lse=spec.has_lse,
        **shape,
    )
    variant = choose_variant(problem, target)
    given = config_of(config_text)
    config = variant.default(spec, target) if given is None else variant.parse_config(given, spec, target)
    source, values = render(spec, variant), dict[str, Any](config)
    if target.backend == "cpu":
        launch: Any = partial(interpret.launch, source, **values)
        report = accuracy.check_launch(launch, spec)
    else:
        report = accuracy.check_launch(partial(build(source).launch, **values), spec, device="cuda")
    return {
        "spec": spec.key,
        "config": config.label,
        "ok": report.ok,
        "max_error": report.max_error,
        "ratio": report.ratio,
        "message": report.message,
    }
