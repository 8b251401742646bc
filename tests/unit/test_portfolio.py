"""Portfolios: smallest by brute force, within the bound, labelled as they are, shipped for every target, taken by a call."""

from __future__ import annotations

import json
import runpy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import make, predicted

from flashgen import KernelConfig, Problem, Target, dispatch
from flashgen.cli.main import cli
from flashgen.errors import DatabaseError, InvalidProblemError
from flashgen.spec import OPS, AttentionSpec
from flashgen.store import Record, portfolios, seeds
from flashgen.store.portfolios import MOST, Member
from flashgen.target import TARGETS
from flashgen.tuner.portfolio import BOUND, Seen, configs, derive, folder_beside, problems_seen, smallest_cover
from flashgen.variants import by_name

ROOT = Path(__file__).resolve().parents[2]
GPUS = [target for target in TARGETS.values() if target.backend != "cpu"]
CONFIGS = [KernelConfig(variant="v", x=number) for number in range(7)]


def seen(slowdowns: dict[KernelConfig, float], measured: bool = True) -> Seen:
    return Seen(gpu="h100", slowdowns=slowdowns, measured=measured, sessions=frozenset({"s"}))


SLOWDOWNS = st.dictionaries(st.sampled_from(CONFIGS), st.sampled_from([1.0, 1.01, 1.04, 1.06, 2.0]), min_size=1).map(
    lambda found: {config: slow / min(found.values()) for config, slow in found.items()}
)


def covers(group: tuple[KernelConfig, ...] | list[KernelConfig], problems: list[Seen]) -> bool:
    return all(any(one.covered_by(config) for config in group) for one in problems)


@given(st.lists(SLOWDOWNS.map(seen), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_the_set_covers_everything_and_no_smaller_one_does(problems: list[Seen]) -> None:
    chosen = smallest_cover(problems)
    assert covers(chosen, problems)
    assert not any(covers(group, problems) for size in range(len(chosen)) for group in combinations(CONFIGS, size))


def test_greedy_alone_would_take_one_more() -> None:
    # Set cover's classic trap: the widest first (4 problems) leaves two rows of one each; the two rows cover all six.
    a, b, wide = CONFIGS[:3]
    row = {
        number: {a if number < 3 else b: 1.0} | ({wide: 1.0} if number in (0, 1, 3, 4) else {}) for number in range(6)
    }
    assert set(smallest_cover([seen(slowdowns) for slowdowns in row.values()])) == {a, b}


def test_of_equally_small_sets_the_faster() -> None:
    slow, fast = CONFIGS[:2]
    assert smallest_cover([seen({slow: 1.04, fast: 1.01, CONFIGS[2]: 1.0}), seen({slow: 1.0, fast: 1.01})]) == [fast]


def test_never_more_than_allowed_then_the_widest() -> None:
    problems = [seen({KernelConfig(variant="v", x=number): 1.0}) for number in (*range(20), 19, 19)]
    chosen = smallest_cover(problems)
    assert len(chosen) == MOST == 12 and KernelConfig(variant="v", x=19) in chosen


def row(config: int, ms: float | None = None, **changes: Any) -> Record:
    values = {"config": {"BLOCK_M": config}, **changes}
    return predicted(**values) if ms is None else make(latency_ms=ms, **values)


def test_measured_goes_before_predicted_and_each_says_so() -> None:
    far = {"seqlen_q": 64, "seqlen_k": 64}
    farther = {"seqlen_q": 32, "seqlen_k": 32}
    (first, second) = derive(
        [
            row(128, 1.0, session="m"),
            row(64, 2.0, session="m"),
            row(256, session="p", shape=far, error_ratio=0.5),
            row(256, session="p", shape=farther, error_ratio=0.5, gpu="h200"),
        ]
    )
    assert (first.basis, first.config["BLOCK_M"], first.place, first.problems, first.measured, first.of) == ("measured", 128, 1, 1, 1, 3)  # fmt: skip
    assert (first.slowdown, first.gpus, first.sessions) == (1.0, ("h100",), ("m",))
    assert (second.basis, second.config["BLOCK_M"], second.problems, second.measured) == ("predicted", 256, 2, 0)
    assert (second.slowdown, second.gpus, second.sessions) == (None, ("h100", "h200"), ("p",))
    assert (first.head_dim, first.head_dim_v, first.dtype, first.arch) == (128, 128, "bf16", "sm_90")


def test_what_is_wrong_failed_or_unchecked_counts_for_nothing() -> None:
    bad = [row(64, 0.5, error_ratio=1.5), row(64, 0.5, error_ratio=None), row(64, error_ratio=None, status="crashed", rank=None, model=None)]  # fmt: skip
    assert derive(bad) == []
    (only,) = derive([*bad, row(128, 1.0)])
    assert only.config["BLOCK_M"] == 128


def test_a_lucky_reading_of_the_search_does_not_beat_the_finalists() -> None:
    rows = [
        row(32, 0.90, protocol="events-search-1"),
        row(64, 0.95, protocol="events-search-1"),
        row(64, 1.00, protocol="shootout-1"),
        row(128, 1.20, protocol="shootout-1"),
    ]
    (problem,) = problems_seen(rows)
    times = {config.BLOCK_M: slow for config, slow in problem.slowdowns.items()}
    assert times == {32: 1.0, 64: 1.0, 128: pytest.approx(1.2)}
    drifted = [row(64, 10.0, session="warm"), row(32, 11.0, session="warm"), row(32, 5.0, session="cold")]
    (problem,) = problems_seen(drifted)
    assert {c.BLOCK_M: slow for c, slow in problem.slowdowns.items()}[64] == 1.0, (
        "runs are not compared with each other"
    )


def test_dtype_and_padded_head_dim_divide() -> None:
    keys = ["attention_fwd-bf16-d128", "attention_fwd-fp16-d128-causal", "attention_fwd-fp16-d100", "attention_fwd-bf16-d96-dv64"]  # fmt: skip
    found = derive([row(128, 1.0, spec_key=key) for key in keys])
    assert [(one.dtype, one.head_dim, one.head_dim_v, one.of) for one in found] == [("bf16", 128, 64, 1), ("bf16", 128, 128, 1), ("fp16", 128, 128, 2)]  # fmt: skip


# -- the files --


def member(**changes: Any) -> Member:
    values: dict[str, Any] = {
        "arch": "sm_90", "op": "attention_fwd", "variant": "triton_fwd", "dtype": "bf16", "head_dim": 128, "head_dim_v": 128,
        "place": 1, "config": {"BLOCK_M": 64}, "basis": "predicted", "problems": 1, "measured": 0, "of": 1, "gpus": ("h100",),
        "sessions": ("s",),
    }  # fmt: skip
    return Member(**values | changes)


def test_a_file_round_trips_and_other_portfolios_stay(tmp_path: Path) -> None:
    other = member(dtype="fp32")
    portfolios.write(tmp_path, [other, member(), member(place=2, config={"BLOCK_M": 32})])
    (path,) = portfolios.write(tmp_path, [member(config={"BLOCK_M": 128})])
    assert path == tmp_path / "sm_90" / "attention_fwd.jsonl"
    assert [Member.from_json(line) for line in path.read_text().splitlines()] == [
        member(config={"BLOCK_M": 128}),
        other,
    ]


@pytest.mark.parametrize(
    "changes",
    [{"basis": "measured"}, {"slowdown": 1.0}, {"measured": 1}, {"basis": "guessed"}, {"place": 13}, {"place": 0}],
)
def test_a_member_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblemError, match=r"^(basis|slowdown|place) "):
        member(**changes)


def test_a_corrupt_line_is_named_and_the_file_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "sm_90" / "attention_fwd.jsonl"
    path.parent.mkdir()
    path.write_text(f"{member().to_json()}\n{{}}\n")
    with pytest.raises(DatabaseError, match=r"attention_fwd.jsonl, line 2 is not a portfolio's member"):
        portfolios.write(tmp_path, [member()])
    assert path.read_text().endswith("{}\n")


# -- what is shipped --


def test_the_folder_is_what_the_committed_trials_give(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_portfolios.py"))
    portfolios.write(tmp_path, derive(script["trials"]()))
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/*.jsonl")}
    shipped = ROOT / "tuning_db" / "portfolios"
    assert {path.relative_to(shipped): path.read_text() for path in shipped.glob("*/*.jsonl")} == written, (
        "run scripts/write_portfolios.py"
    )


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_every_target_has_a_legal_portfolio_for_whatever_seeds_it_has(target: Target) -> None:
    rows = [row for op in OPS for row in seeds.load(target.name, op)]
    assert rows
    for one in rows:
        spec, variant = AttentionSpec.from_key(one.spec_key), by_name(one.variant)
        found = portfolios.find(
            arch=target.arch, op=one.op, variant=one.variant, dtype=spec.dtype,
            head_dim=spec.block_head_dim, head_dim_v=spec.block_head_dim_v,
        )  # fmt: skip
        assert 1 <= len(found) <= MOST
        assert [member.place for member in found] == list(range(1, len(found) + 1))
        # A head dim's portfolio serves its kernels with lse as well, which have no thread block of four warpgroups.
        lacking = [m for m in found if one.variant == "gluon_fwd_sm90" and m.config["BLOCK_M"] == 256 and spec.has_lse]
        legal = len(configs(variant, spec, target))
        assert legal == len(found) - len(lacking) >= 1, "every other member is legal here"
        assert one.status == "ok" or one.config in [member.config for member in found], "nothing else covers it"
    measured = {member.gpus for op in OPS for member in portfolios.load(target.arch, op) if member.basis == "measured"}
    # One that won on both cards is named by both.
    assert {gpu for gpus in measured for gpu in gpus} == ({"h100", "h200"} if target.arch == "sm_90" else set()), (
        "only what an H100 or H200 measured is called measured"
    )


def test_shipped_portfolios_are_within_the_bound_on_every_measured_problem() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_portfolios.py"))
    groups: dict[tuple[str, str, int, int], list[Record]] = {}
    for one in script["trials"]():
        spec = AttentionSpec.from_key(one.spec_key)
        if one.status == "ok":
            groups.setdefault((one.variant, spec.dtype, spec.block_head_dim, spec.block_head_dim_v), []).append(one)
    assert len(groups) >= 3
    for (variant, dtype, dim, dim_v), rows in groups.items():
        found = portfolios.find(arch="sm_90", op=by_name(variant).op, variant=variant, dtype=dtype, head_dim=dim, head_dim_v=dim_v)  # fmt: skip
        own = [KernelConfig(variant=variant, **member.config) for member in found]
        for problem in problems_seen(rows):
            assert min(problem.slowdowns.get(config, 9.0) for config in own) <= BOUND


# -- who takes it --


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path))
    dispatch.forget()


@pytest.mark.usefixtures("_fresh")
def test_an_unseen_kernel_takes_the_first_member_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    target, variant = Target.named("h100"), by_name("triton_fwd")
    problem = Problem(dtype="fp16", batch=1, seqlen_q=777, seqlen_k=777, num_heads_q=4, num_heads_kv=4, head_dim=128, head_dim_v=128)  # fmt: skip
    (first, *_) = configs(variant, problem.spec, target)  # of bf16: as wide
    plan = dispatch.resolve(problem, target, backend="triton")
    assert (plan.config, plan.config_source) == (first, "default")
    assert "first of sm_90's portfolio" in str(plan)
    monkeypatch.setattr(portfolios, "load", lambda arch, op: (member(config={"BLOCK_M": 512}),))
    dispatch.forget()
    plan = dispatch.resolve(problem, target, backend="triton")
    assert plan.config == variant.default(problem.spec, target), "an illegal member is skipped"
    assert "variant's own default" in str(plan)


def test_show_portfolio_labels_every_row() -> None:
    done = CliRunner().invoke(cli, ["show", "portfolio", "--target", "h100", "--json"])
    (rows,) = json.loads(done.stdout)["portfolios"].values()
    assert {one["basis"] for one in rows} == {"measured", "predicted"}
    text = CliRunner().invoke(cli, ["show", "portfolio"]).stdout
    lines = [line.split("\t") for line in text.splitlines() if "\t" in line]
    assert {line[0] for line in lines[1:]} == {target.name for target in GPUS}
    assert all(line[6].startswith(("measured (", "predicted")) for line in lines[1:])


def test_portfolios_lie_beside_seeds() -> None:
    assert folder_beside("tuning_db/seeds") == Path("tuning_db/portfolios")
    assert folder_beside("/tmp/mine") == Path("/tmp/mine/portfolios")
