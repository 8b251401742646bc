"""benchmarks/tables.py: README.md says what the results say; and plots.py draws them."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def test_the_readme_is_up_to_date(tables: Any) -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.filled(text) == text, "python benchmarks/tables.py --write README.md"
    marked = {name for _, name, _, _ in tables._MARK.findall(text)}
    assert {"forward", "backward", "portable-backward", "training-memory"} <= marked <= set(tables.TABLES)


def test_a_table_follows_its_file(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tables.RESULTS / "h200_forward.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "h200_forward.csv").write_text((ROOT / "benchmarks/results/h200_forward.csv").read_text())
    before = tables.forward()
    cell = [
        r
        for r in rows
        if (r["head_dim"], r["seqlen_q"], r["causal"], r["num_heads_kv"]) == ("128", "4096", "True", "16")
    ]
    for row in cell:
        row["tflops"] = "123.4" if row["contestant"] == "flashgen" else row["tflops"]
        row["ratio_median"] = "0.5" if row["contestant"] == "fa4" else row["ratio_median"]
    with (tmp_path / "h200_forward.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    after = tables.forward()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    below = int(before.split(" below 0.95")[0].split()[-1]) + 1  # the cell that was changed is one more
    assert len(changed) == 2 and "123 (0.50, " in changed[0] and f"worst 0.500; {below} below 0.95" in changed[1]
    rows[0]["torch"] = "1.0"
    with pytest.raises(click.ClickException, match="different machines or versions"):
        tables.where(rows)


def test_another_run_adds_its_peers(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ROOT / "benchmarks/results/h200_forward.csv"
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / source.name).write_text(source.read_text())
    before = tables.forward()
    one = [row for row in rows if row["seqlen_q"] == "4096" and row["head_dim"] == "256" and row["causal"] == "True"]
    more = [row | {"tflops": "1"} for row in one if row["contestant"] == "flashgen"]  # the table keeps the first run's
    more += [more[0] | {"contestant": "fa3", "ratio_median": "0.9", "version": "lib 1"}]
    more += [more[0] | {"contestant": "flex", "ratio_median": "", "median_ms": "", "status": "failed"}]
    with (tmp_path / "h200_forward_peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(more)
    after = tables.forward()
    assert (
        "FlashAttention 4, cuDNN, FlashAttention 3 take. FlashAttention 3 are of another run" in after
        and "lib 1" in after
    )
    assert after.count(", 0.90)") == 1 and after.count(", -)") == 39 and "worst 0.900; 1 below 0.95" in after
    tflops = [row["tflops"] for row in one if row["contestant"] == "flashgen"]
    assert f"| {float(tflops[0]):.0f} (" in next(line for line in after.splitlines() if ", 0.90)" in line)
    assert "FlexAttention" not in after and "another run" not in before


def test_an_unknown_mark_is_an_error(tables: Any) -> None:
    with pytest.raises(click.ClickException, match="'star' is not made here"):
        tables.filled("<!-- table: star -->\n<!-- end of table -->")


def test_freeform_rows_become_a_table(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "protocol": "p", "sm_mhz_before": "9", "sm_mhz_after": "10", "version": ""}  # fmt: skip

    def row(kind: str, who: str, **values: str) -> dict[str, str]:
        known = {
            "kind": kind,
            "op": "attention_fwd",
            "head_dim": "64",
            "seqlen_q": "2048",
            "contestant": who,
            "samples": "9",
        }
        empty = dict.fromkeys(("ratio_median", "median_ms", "speed_of_plain_causal", "tile_speed_of_plain_causal"), "")
        return {**machine, **empty, **known, **values}

    rows = [
        row("window", "flashgen", median_ms="1", speed_of_plain_causal="0.5", tile_speed_of_plain_causal="0.9"),
        row("window", "flex", median_ms="2", ratio_median="1.6"),
        row("tree", "flashgen", samples="", status="unsupported"),
    ]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.freeform() == "Not measured yet."
    with (tmp_path / "h200_freeform.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, {**rows[0], "status": ""})
        writer.writeheader()
        writer.writerows(rows)
    text = tables.freeform()
    assert "| window | 1.60; 0.50 (0.90) |" in text and "| tree | - |" in text
    assert "Forward: 1 cells beside FlexAttention; geometric mean 1.60, worst 1.60" in text
    assert "1 cells that no generated kernel takes" in text


def test_a_picture_of_every_table(tables: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install flashgen[plot]")
    plots = importlib.import_module("plots")
    for name, panels in (("h200_forward", 8), ("h200_backward", 8), ("h200_backward_portable", 8)):
        assert plots.draw(tables.RESULTS / f"{name}.csv", tmp_path / f"{name}.png") == panels
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
    rows = [row | {"kind": kind} for row in tables.read("h200_forward.csv")[:8] for kind in ("causal", "tree")]
    with (tmp_path / "kinds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert plots.draw(tmp_path / "kinds.csv", tmp_path / "kinds.png") == 1
    (tmp_path / "empty.csv").write_text("median_ms,contestant\n")
    with pytest.raises(click.ClickException, match="holds no timed row"):
        plots.draw(tmp_path / "empty.csv", tmp_path / "empty.png")
