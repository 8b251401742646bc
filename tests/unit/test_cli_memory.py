"""`flashgen memory`: table, JSON and picture."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from flashgen import Target
from flashgen.cli.main import run
from flashgen.cli.memory import size
from flashgen.memory import of_model, training_of

ARGUMENTS = ["memory", "--preset", "llama3-8b", "--seqlens", "1024,4096"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_DB", raising=False)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


def test_the_table_has_a_row_for_a_layer_and_for_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *ARGUMENTS)
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and err == ""
    assert [line[:2] for line in lines[1:5]] == [
        ["1024", "1 of 32 self"],
        ["1024", "all 32"],
        ["4096", "1 of 32 self"],
        ["4096", "all 32"],
    ]
    flash = of_model("llama3-8b", seqlen=4096, target=Target.named("h100"))
    assert lines[3][3] == size(flash.layers[0].account.flash.live) and lines[4][6] == size(
        flash.total(lambda a: a.flash.issued)
    )
    assert "not measured" in out and "2205.14135" in out


def test_json_is_bytes_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = document(capsys, *ARGUMENTS, "--train", "--batch", "2")
    assert code == 0 and [row["seqlen"] for row in shown["models"]] == [1024, 4096] and shown["plot"] is None
    for row in shown["models"]:
        (layer,) = row["layers"]
        assert row["model"]["flash_issued"] == 32 * layer["flash"]["issued"] and row["batch"] == 2
        assert layer["flash"]["saved"] > 0 and layer["config_source"] and layer["tile"]["block_m"] >= 16


def test_layers_that_no_kernel_covers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "--preset", "gpt-oss-20b", "--seqlens", "512"]
    code, shown = document(capsys, *arguments)
    assert code == 0
    out = call(capsys, *arguments)[1]
    for layer in shown["models"][0]["layers"]:
        for option in layer["uncovered"]:
            assert f"{layer['kind']} (" in out and option in out and "run in the torch backend today" in out


def test_training_is_counted_by_layer_and_by_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--train", "--precision", "16bit", "--dropout", "--optimizer", "sgd"]
    code, shown = document(capsys, *arguments)
    assert code == 0
    for row in shown["models"]:
        training = row["training"]
        assert (training["precision"], training["dropout"], training["optimizer"]) == ("16bit", True, "sgd")
        assert [(way["attention"], way["checkpoint"]) for way in training["ways"]] == [
            ("materialised", False), ("flash", False), ("materialised", True), ("flash", True),
        ]  # fmt: skip
        for way in training["ways"]:
            assert sum(way["layer"].values()) == sum(way["layer_parts"].values()) == way["layer_saved"]
            assert way["total"] == way["peak"] + way["parameters"] + way["optimizer"]
            assert way["optimizer"] == 2 * way["parameters"], "fp32 masters of 16-bit weights"
    ways = training_of("llama3-8b", seqlen=4096, precision="16bit", dropout=True, optimizer="sgd").ways
    code, out, _ = call(capsys, *arguments)
    lines = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert ["4096", "model: saved", *(size(way.step.saved) for way in ways)] in lines
    assert ["4096", "1 of 32 layers: saved", *(size(way.step.layer_saved) for way in ways)] in lines
    assert "2205.05198" in out and "fp32 masters" in out and "dropout;" in out


def test_layers_that_are_no_plain_ones_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory", "--preset", "sdxl", "--seqlens", "512", "--train"]
    code, shown = document(capsys, *arguments)
    assert code == 0 and "training" not in shown["models"][0]
    assert "only attention is counted" in call(capsys, *arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*ARGUMENTS, "--precision", "fp32"], "give --train too"),
        ([*ARGUMENTS, "--optimizer", "sgd"], "--optimizer says"),
        ([*ARGUMENTS, "--dropout"], "--dropout says"),
        ([*ARGUMENTS, "--train", "--precision", "fp8"], "--precision"),
        (["memory"], "--preset"),
        (["memory", "--preset", "gpt-9"], "preset 'gpt-9' is not known"),
        (["memory", "--preset", "sdxl/x"], "sdxl/self-1024"),
        ([*ARGUMENTS[:3], "--seqlens", "a"], "--seqlens 'a'"),
        ([*ARGUMENTS[:3], "--seqlens", ""], "--seqlens ''"),
        ([*ARGUMENTS[:3], "--seqlens", "0"], "--seqlens '0'"),
        ([*ARGUMENTS, "--batch", "0"], "--batch"),
        ([*ARGUMENTS, "--target", "x"], "target 'x'"),
        ([*ARGUMENTS, "--target", "cpu"], "name a GPU"),
        ([*ARGUMENTS, "--plot", "x.doc"], "'.doc' is not known"),
        ([*ARGUMENTS, "--plot", "nowhere/x.png"], "does not exist"),
    ],
)
def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == "" and said in err


def test_the_picture_shows_both_quantities_with_their_axes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install flashgen[plot]")
    path = tmp_path / "memory.svg"
    code, shown = document(capsys, *ARGUMENTS, "--plot", str(path))
    assert code == 0 and shown["plot"] == str(path)
    # matplotlib draws letters as paths and keeps the text in comments.
    text = path.read_text()
    ET.fromstring(text)
    for label in (
        "sequence length",
        "memory of the largest layer, GiB",
        "HBM traffic of a forward, GiB",
        "materialised",
    ):
        assert f"<!-- {label}" in text
    picture = tmp_path / "memory.png"
    assert call(capsys, *ARGUMENTS, "--train", "--plot", str(picture))[0] == 0
    from PIL import Image

    with Image.open(picture) as image:
        image.verify()
        assert image.width > image.height > 300


def test_without_matplotlib_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = call(capsys, *ARGUMENTS, "--plot", str(tmp_path / "x.png"))
    assert code == 1 and out == "" and "pip install flashgen[plot]" in err


def test_sizes_read_well() -> None:
    assert [size(n) for n in (0, 1, 1000, 1023, 1024, 1536, 1020 * 1024, 3 * 2**30, 5 * 2**40)] == [
        "0 B", "1 B", "1000 B", "1023 B", "1 KiB", "1.5 KiB", "1020 KiB", "3 GiB", "5 TiB",
    ]  # fmt: skip
