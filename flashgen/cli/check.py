"""`flashgen check`: the generated kernels against the fp64 oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from flashgen.cli.output import json_option, print_json, print_table
from flashgen.cli.problems import config_of, generated_variant, problem_options, problems_of, spec_of, take
from flashgen.coverage import has_options
from flashgen.problem import Problem
from flashgen.render import render
from flashgen.spec import DTYPES, AttentionSpec
from flashgen.target import Target

_SIZES = ("heads_q", "heads_kv", "seqlen", "seqlen_q", "seqlen_k", "batch", "causal_alignment")


@click.command()
@click.argument("spec", required=False)
@problem_options
@click.option(
    "--config", "config_text", metavar="KEY=VALUE,...", help="Check this configuration; the default where not given."
)
@click.option(
    "--simulate",
    is_flag=True,
    help="Run Gluon kernels in the simulator: races, deadlocks, byte counts, under every schedule.",
)
@click.option(
    "--mutate", is_flag=True, help="Break the Gluon kernels in many small ways, and count how many the simulator finds."
)
@json_option
def check(spec: str | None, simulate: bool, mutate: bool, as_json: bool, **values: Any) -> int:
    """Accuracy of the generated kernels against the fp64 reference, on small poisoned problems.

    A SPEC, a preset, or what the options leave open: causal and full, all dtypes, head dim 64. A size that is given is
    checked besides the small ones. On a GPU the kernels run there; without one in Triton's interpreter.
    """
    given = take(values)
    if simulate or mutate:
        from flashgen.cli.simulation import check_simulated

        return check_simulated(_wanted(spec, given), config_of(values["config_text"]), mutate=mutate, as_json=as_json)
    target = Target.detect()
    rows = [_check(one, extra, target, values["config_text"]) for one, extra in _wanted(spec, given)]
    passed = all(row["ok"] for row in rows)
    if as_json:
        print_json({"target": target.name, "ok": passed, "checks": rows})
        return 0 if passed else 1
    print_table(["spec", "config", "largest error", "part of the budget", ""], [_cells(row) for row in rows])
    where = "in Triton's interpreter" if target.backend == "cpu" else f"on {target.gpu}"
    click.echo(f"{sum(row['ok'] for row in rows)} of {len(rows)} inside the error budget, {where}")
    if not passed:
        click.echo(f"Error: outside the budget: {', '.join(r['spec'] for r in rows if not r['ok'])}", err=True)
    return 0 if passed else 1


def _cells(row: dict[str, Any]) -> list[str]:
    said = "ok" if row["ok"] else row["message"]
    return [row["spec"], row["config"], f"{row['max_error']:.3g}", f"{row['ratio']:.2f}", said]


def _wanted(key: str | None, given: dict[str, Any]) -> list[tuple[AttentionSpec, Problem | None]]:
    """The specs, each with the problem of the sizes that were given, if any were."""
    if key is not None:
        return [(spec_of(key, given), None)]
    sized = any(given[name] is not None for name in _SIZES)
    if given["presets"]:
        problems = problems_of(given)
    else:
        dims = {"head_dim": given["head_dim"] or 64, "return_lse": True}
        problems = [
            problem
            for dtype in ([given["dtype"]] if given["dtype"] else DTYPES)
            for causal in ([True] if given["causal"] else [False, True])
            for problem in problems_of({**given, **dims, "dtype": dtype, "causal": causal})
        ]
    return [(problem.spec, problem if sized else None) for problem in problems]


def _check(spec: AttentionSpec, extra: Problem | None, target: Target, config_text: str | None) -> dict[str, Any]:
    from flashgen import accuracy, gradients, interpret, samples
    from flashgen.build import build

    given = config_of(config_text)
    variant = generated_variant(spec, target, config=given)
    config = variant.default(spec, target) if given is None else variant.parse_config(given, spec, target)
    source, values = render(spec, variant), dict[str, Any](config)
    like = samples.of_spec(spec) if extra is None else extra
    with_options = has_options(spec)
    small = samples.small_problems(like) if with_options else accuracy.small_problems(spec)
    problems = [*small, *([] if extra is None else [extra])]
    device = "cpu" if target.backend == "cpu" else "cuda"
    launch: Any = partial(interpret.launch_of(source), source) if device == "cpu" else build(source).launch
    launch = partial(launch, **values)
    if with_options:
        report = samples.check_launch(launch, like, config, problems=problems, device=device)
    else:
        report = gradients.check_launch(launch, spec, problems=problems, device=device)
    return {
        "spec": spec.key,
        "config": config.label,
        "problems": len(problems),
        "ok": report.ok,
        "max_error": report.max_error,
        "ratio": report.ratio,
        "message": report.message,
    }
