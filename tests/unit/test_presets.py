"""Presets: shapes of real models, kind by kind, and what the commands say of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flashgen import Problem, Target
from flashgen.cli.main import run
from flashgen.coverage import uncovered
from flashgen.errors import InvalidProblemError
from flashgen.presets import PRESETS, find
from flashgen.spec import AttentionSpec

KINDS = [f"{model.name}/{row.kind}" for model in PRESETS.values() for row in model.layers]
# Attention layers of each model, added up by hand from its source.
LAYERS = {
    "llama3-8b": 32, "llama3-70b": 80, "mistral-7b": 32, "qwen3-8b": 36, "gemma2-9b": 42, "gemma3-12b": 48, "gpt-oss-20b": 24,
    "deepseek-v3": 61, "bert-base": 12, "minilm-l6": 6, "vit-l-16": 24, "sdxl": 140, "whisper-large-v3": 96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_models_are_these_with_so_many_layers() -> None:
    assert {name: model.num_layers for name, model in PRESETS.items()} == LAYERS
    for model in PRESETS.values():
        assert "arXiv" in model.source or "config.json" in model.source
        assert len({row.kind for row in model.layers}) == len(model.layers)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_makes_a_problem_of_the_length_asked(name: str) -> None:
    model, (row,) = find(name)
    problem = Problem.preset(name, seqlen=770, batch=3)
    assert problem == Problem.preset(model.name, layer=row.kind, seqlen=770, batch=3)
    assert problem.batch == 3
    assert problem.seqlen_q == (row.seqlen_q or math.ceil(770 / row.shrink))
    assert problem.seqlen_k == (row.seqlen_k or math.ceil(770 / row.shrink))
    assert Problem.preset(name, seqlen_k=5).seqlen_k == 5


def test_the_main_kind_is_what_a_bare_name_means() -> None:
    for name, model in PRESETS.items():
        assert Problem.preset(name) == Problem.preset(f"{name}/{model.layers[0].kind}")


def test_what_the_shapes_say() -> None:
    local = Problem.preset("gemma2-9b/local")
    # A window of 4096 keys is the query's own and 4095 before it.
    assert (local.window_size, local.softcap, local.scale) == ((4095, 0), 50.0, 1 / 16)
    sinks = Problem.preset("gpt-oss-20b", layer="local")
    assert sinks.has_sinks and sinks.window_size == (127, 0) and sinks.scale == 1 / 8
    latent = Problem.preset("deepseek-v3")
    assert (latent.head_dim, latent.head_dim_v) == (192, 128)
    assert latent.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    text = Problem.preset("sdxl/cross-1024")
    assert (text.seqlen_q, text.seqlen_k, text.num_heads_q) == (1024, 77, 20)


@pytest.mark.parametrize(
    ("name", "layer", "said"),
    [
        ("gpt-9", None, "preset 'gpt-9'.*llama3-8b"),
        ("sdxl/x", None, "no layers of kind 'x': allowed are sdxl/self-1024"),
        ("sdxl/", None, "no layers of kind ''"),
        ("sdxl", "x", "no layers of kind 'x'"),
        ("sdxl/self-1024", "self-4096", "name one"),
    ],
)
def test_unknown_names_list_what_there_is(name: str, layer: str | None, said: str) -> None:
    with pytest.raises(InvalidProblemError, match=said):
        Problem.preset(name, layer=layer)


@pytest.mark.parametrize("name", KINDS)
def test_tune_arguments_name_the_whole_problem(name: str) -> None:
    import click

    from flashgen.cli.problems import problem_options, problems_of, take

    for problem in (
        Problem.preset(name, batch=2),
        Problem.preset(name, dropout_p=0.1, has_alibi=True, has_bias=True, has_attn_mask=True, return_lse=True),
    ):
        seen: list[Problem] = []

        @click.command()
        @problem_options
        def probe(seen: list[Problem] = seen, **values: Any) -> None:
            seen.extend(problems_of(take(values)))

        probe.main(problem.tune_arguments.split(), standalone_mode=False)
        assert seen == [problem]


def test_show_presets_names_every_kind_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "presets"]) == 0
    out = capsys.readouterr().out
    for model in PRESETS.values():
        assert model.source in out
        assert all((f"{model.name}/{row.kind}" if len(model.layers) > 1 else model.name) in out for row in model.layers)
    code, shown = document(capsys, "show", "presets")
    assert code == 0 and len(shown["presets"]) == len(PRESETS)
    assert sum(len(model["layers"]) for model in shown["presets"]) == len(KINDS)


def test_uncovered_options_are_found_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashgen.variants import by_name

    variant = type(by_name("triton_fwd"))
    monkeypatch.setattr(variant, "supports", lambda self, spec, target: "no" if spec.window or spec.has_sinks else None)
    spec = AttentionSpec.from_key("attention_fwd-bf16-d64-causal-window-softcap-sinks-lse")
    assert uncovered(spec, Target.named("h100"))["triton_fwd"] == ["window_size", "sinks"]
    assert "triton_fwd" not in uncovered(
        AttentionSpec.from_key("attention_fwd-bf16-d64-causal-softcap"), Target.named("h100")
    )


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_plan_names_every_kind_and_what_no_kernel_covers(capsys: pytest.CaptureFixture[str], name: str) -> None:
    h100 = Target.named("h100")
    code, shown = document(capsys, "show", "plan", "--preset", name, "--target", "h100")
    rows = shown.get("plans", [shown])
    assert code == 0 and len(rows) == len(PRESETS[name].layers)
    assert run(["show", "plan", "--preset", name, "--target", "h100"]) == 0
    out = capsys.readouterr().out
    for row, kind in zip(rows, PRESETS[name].layers, strict=True):
        problem = Problem.preset(name, layer=kind.kind)
        assert row["uncovered"] == uncovered(problem.spec, h100) and row["problem"] == str(problem)
        assert row["problem"] in out
        if row["backend"] == "torch":
            assert row["uncovered"], "what runs in torch must be explained"
            for variant, options in row["uncovered"].items():
                assert f"not yet  {variant} does not cover {', '.join(options)}" in out


def test_tune_takes_the_kinds_that_a_kernel_covers_and_lists_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashgen.variants import by_name

    variant = type(by_name("triton_fwd"))
    monkeypatch.setattr("flashgen.tuner.context.candidates", lambda spec: [by_name("triton_fwd")])
    monkeypatch.setattr(variant, "supports", lambda self, spec, target: "window: not yet" if spec.window else None)
    arguments = ["tune", "--preset", "gemma3-12b", "--target", "h100", "--plan"]
    code, shown = document(capsys, *arguments)
    assert code == 0
    assert [row["spec"] for row in shown["problems"]] == ["attention_fwd-bf16-d256-causal"]
    assert [(row["spec"], row["reason"]) for row in shown["not_tuned"]] == [
        ("attention_fwd-bf16-d256-causal-window", "triton_fwd: window: not yet")
    ]
    assert run(arguments) == 0
    assert "not tuned, runs in the torch backend: attention_fwd-bf16-d256-causal-window" in capsys.readouterr().out
    # Nothing is covered: the work failed.
    monkeypatch.setattr(variant, "supports", lambda self, spec, target: "not yet")
    code, shown = document(capsys, *arguments)
    assert code == 1 and len(shown["error"]["reasons"]) == 2


@pytest.mark.parametrize("text", ["5", "a,b", "1,2,3"])
def test_a_window_that_does_not_read(capsys: pytest.CaptureFixture[str], text: str) -> None:
    code, shown = document(capsys, "show", "plan", "--preset", "llama3-8b", "--window-size", text)
    assert code == 2 and "LEFT,RIGHT" in shown["error"]["message"]
