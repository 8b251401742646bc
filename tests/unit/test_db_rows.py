"""`flashgen db export|import|merge|prune|digest`, and FLASHGEN_REQUIRE_DB_DIGEST: rows that travel, and rows that go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from store_support import make, predicted

from flashgen import DatabaseError, InvalidProblemError, Problem, Target, dispatch
from flashgen.cli.main import run
from flashgen.render import render
from flashgen.spec import AttentionSpec
from flashgen.store import Record, exchange, open_store, seeds
from flashgen.variants import by_name

H100 = Target.named("h100")
TODAY = render(AttentionSpec.from_key("attention_fwd-bf16-d128-causal"), by_name("triton_fwd")).digest
SLOWER = {"BLOCK_M": 64}


@pytest.fixture(autouse=True)
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code = run([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def fill(*records: Record, at: Path | None = None) -> None:
    with open_store(at, write=True) as store:
        store.add(records)


def rows() -> list[Record]:
    with open_store() as store:
        return store.trials()


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another machine: its own cache."""
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "elsewhere"))


def test_rows_travel_by_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [make(), make(config=SLOWER, latency_ms=2.0, message="line\u2028one"), predicted(gpu="h200", origin="lab")]
    fill(*sent)
    file = tmp_path / "rack7.jsonl"
    code, said = document(capsys, "db", "export", "-o", file)
    assert (code, said["rows"]) == (0, 3) and said["digest"] == document(capsys, "db", "digest")[1]["digest"]
    elsewhere(monkeypatch, tmp_path)
    assert document(capsys, "db", "import", file) == (0, {"files": [str(file)], "rows": 3, "added": 3})
    assert document(capsys, "db", "import", file)[1]["added"] == 0, "a set union"
    assert {row.sha: row.origin for row in rows()} == {sent[0].sha: "rack7", sent[1].sha: "rack7", sent[2].sha: "lab"}
    assert document(capsys, "db", "verify")[0] == 0


def test_an_imported_row_wins_over_no_local_one_unless_it_is_ones_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(make(latency_ms=1.0))
    file = tmp_path / "fast.jsonl"
    document(capsys, "db", "export", "-o", file)
    elsewhere(monkeypatch, tmp_path)
    fill(make(config=SLOWER, latency_ms=2.0))
    document(capsys, "db", "import", file)
    (winner,) = document(capsys, "db", "list")[1]["rows"]
    assert winner["latency_ms"] == 2.0
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "third"))
    fill(make(config=SLOWER, latency_ms=2.0))
    document(capsys, "db", "import", file, "--origin", "local")
    (winner,) = document(capsys, "db", "list")[1]["rows"]
    assert winner["latency_ms"] == 1.0


def test_export_takes_what_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fill(make(), make(config=SLOWER, latency_ms=2.0), make(gpu="h200"), make(op="attention_bwd", gpu="h200"))
    for arguments, number in (([], 4), (["--winners"], 3), (["--gpu", "h200"], 2), (["--op", "attention_bwd"], 1)):
        file = tmp_path / "rows.jsonl"
        assert document(capsys, "db", "export", "-o", file, *arguments)[1]["rows"] == number
        assert len(exchange.read_file(file)) == number
    assert document(capsys, "db", "export", "-o", tmp_path)[0] == 2


def test_a_seeds_file_is_imported_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (file,) = seeds.write(tmp_path, [make(origin="shipped"), make(config=SLOWER, origin="shipped")])
    assert document(capsys, "db", "import", file)[1]["added"] == 2
    assert {row.origin for row in rows()} == {"shipped"}


@pytest.mark.parametrize("harm", ["cut", "dropped", "changed", "newer", "words"])
def test_a_file_that_was_harmed_is_refused_as_a_whole(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    fill(make(), make(config=SLOWER))
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    document(capsys, "db", "export", "-o", good)
    text = good.read_text()
    head, first, second, _ = text.split("\n")
    bad.write_text(
        {
            "cut": text[:-40],
            "dropped": f"{head}\n{first}\n",
            "changed": f"{head}\n{first}\n{second.replace('1.25', '0.25')}\n",
            "newer": text.replace('"flashgen_trials":1', '"flashgen_trials":2'),
            "words": "hello\n",
        }[harm]
    )
    elsewhere(monkeypatch, tmp_path)
    code, said = document(capsys, "db", "import", good, bad)
    assert code == 1 and said["error"]["type"] == "DatabaseError" and "bad.jsonl" in said["error"]["message"]
    assert not (tmp_path / "elsewhere" / "tuning.sqlite3").exists(), "nothing of the good file either"


def test_databases_merge_whichever_comes_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.sqlite3", tmp_path / "second.sqlite3"
    fill(make(), make(config=SLOWER), at=first)
    fill(make(), make(gpu="h200"), at=second)
    before = first.read_bytes()
    digests = set()
    for order in ((first, second), (second, first)):
        monkeypatch.setenv("FLASHGEN_DB", str(tmp_path / f"{order[0].stem}-merged.sqlite3"))
        code, said = document(capsys, "db", "merge", *order)
        assert (code, said["rows"], said["added"]) == (0, 4, 3)
        assert {row.origin for row in rows()} <= {"first", "second"}
        digests.add(document(capsys, "db", "digest")[1]["digest"])
    assert len(digests) == 1 and first.read_bytes() == before
    code, said = document(capsys, "db", "merge", tmp_path / "none.sqlite3")
    assert code == 1 and "none.sqlite3" in said["error"]["message"]


# -- prune --


def current(**changes: Any) -> Record:
    return make(**{"digest": TODAY, **changes})


def test_prune_takes_what_is_named_and_keeps_a_copy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = current()
    mods = make(spec_key=f"attention_fwd-bf16-d128-score_mod-mods_{'a' * 16}")
    failure = current(config={"BLOCK_M": 256}, status="compile_error")
    loser = current(config=SLOWER, latency_ms=2.0)
    stale = [make(gpu="a100"), current(variant="triton_of_old"), current(spec_key="attention_fwd-bf16-d128-gone")]
    everything = [winner, mods, failure, loser, *stale]
    fill(*everything)
    code, said = document(capsys, "db", "prune", "--stale", "--losers", "--dry-run")
    assert (code, said) == (0, {"removed": 0, "stale": 3, "losers": 1, "copy": None, "dry_run": True})
    assert len(rows()) == 7
    _, said = document(capsys, "db", "prune", "--stale")
    assert (said["removed"], said["stale"], said["losers"]) == (3, 3, 0)
    assert {row.sha for row in rows()} == {row.sha for row in (winner, mods, failure, loser)}
    assert document(capsys, "db", "info")[1]["targets"] == ["h100"], "no GPU without a row is left"
    _, again = document(capsys, "db", "prune", "--losers")
    assert again["removed"] == 1 and {row.sha for row in rows()} == {row.sha for row in (winner, mods, failure)}
    assert document(capsys, "db", "verify")[0] == 0
    assert document(capsys, "db", "prune", "--losers")[1] == {
        "removed": 0, "stale": 0, "losers": 0, "copy": None, "dry_run": False
    }  # fmt: skip
    assert said["copy"] != again["copy"]
    monkeypatch.setenv("FLASHGEN_DB", said["copy"])
    assert {row.sha for row in rows()} == {row.sha for row in everything}


def test_prune_asks_what(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = document(capsys, "db", "prune")
    assert code == 2 and "--stale" in said["error"]["message"] and "--losers" in said["error"]["message"]


@pytest.mark.parametrize("command", [["export", "-o", "rows.jsonl"], ["prune", "--stale"]], ids=lambda row: row[0])
def test_without_a_database_there_is_nothing_to_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = document(capsys, "db", *command)
    assert code == 1 and "no database" in said["error"]["message"] and not list(tmp_path.iterdir())


# -- digest --


def digest_in(capsys: pytest.CaptureFixture[str]) -> str:
    found = document(capsys, "db", "digest")[1]["digest"]
    assert isinstance(found, str)
    return found


def test_the_digest_tells_what_a_call_would_find(capsys: pytest.CaptureFixture[str]) -> None:
    seen = [digest_in(capsys)]
    assert seen[0] == exchange.NO_ROWS
    for record in (make(), make(config=SLOWER), make(origin="lab", gpu="h200")):
        fill(record)
        seen.append(digest_in(capsys))
    assert len(set(seen)) == 4
    assert exchange.digest_of([("a", "lab"), ("b", "local")]) == exchange.digest_of([("b", "local"), ("a", "rack")])
    assert exchange.digest_of([("a", "lab")]) != exchange.digest_of([("a", "local")]), "a local row goes first"


def test_a_required_digest_is_held_to(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.preset("llama3-8b", seqlen=1024, head_dim=124, head_dim_v=124)
    monkeypatch.setenv("FLASHGEN_REQUIRE_DB_DIGEST", exchange.NO_ROWS)
    assert dispatch.resolve(problem, H100).config_source in ("seed", "predicted", "default")
    fill(make())
    dispatch.forget()
    with pytest.raises(DatabaseError, match=r"FLASHGEN_REQUIRE_DB_DIGEST asks for e3b0"):
        dispatch.resolve(problem, H100)
    monkeypatch.setenv("FLASHGEN_REQUIRE_DB_DIGEST", digest_in(capsys))
    assert dispatch.resolve(problem, H100).variant == "triton_fwd"
    monkeypatch.setenv("FLASHGEN_REQUIRE_DB_DIGEST", "abc")
    with pytest.raises(InvalidProblemError, match="flashgen db digest"):
        dispatch.resolve(problem, H100)
