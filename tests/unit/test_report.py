"""`flashgen report`: what it says of 187 measured trials, of predictions and of hostile rows; and that a browser shows it."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_support import make, predicted

from flashgen import dispatch
from flashgen.cli.main import run
from flashgen.report import Document, gather, page
from flashgen.report.charts import history_chart, interval_chart, log_ticks
from flashgen.report.importance import importances
from flashgen.report.surface import luminance, scale
from flashgen.store import Record, open_store

ROOT = Path(__file__).resolve().parents[2]
TRIALS = ROOT / "benchmarks" / "results" / "h100_tune.jsonl"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


def measured_rows() -> list[Record]:
    return [Record.from_json(line) for line in TRIALS.read_text().splitlines()]


def shown(rows: list[Record]) -> str:
    return page(
        Document(source="a test", shipped=False, subjects=gather(rows), version="0", created="2026-01-31T12:00:00+00:00")
    )  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded H100 runs, and one predicted problem."""
    path = tmp_path_factory.mktemp("report") / "trials.sqlite3"
    guess = [
        predicted(gpu="a100", arch="sm_80", rank=place, error_ratio=0.5 if place == 1 else None, config={"BLOCK_M": 32 * place, "BLOCK_N": 16 * (place % 3 + 1)}, bound_by="tensor", message="chosen by a test")
        for place in (1, 2, 3)
    ]  # fmt: skip
    with open_store(path, write=True) as store:
        assert store.add([*measured_rows(), *guess]) == 190
    return path


@pytest.fixture(scope="module")
def made(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of it, with two presets' memory."""
    dispatch.forget()
    path = tmp_path_factory.mktemp("html") / "report.html"
    assert run(["report", "--database", str(database), "-o", str(path)]) == 0
    return path


# -- values --


def test_the_recorded_runs_read_as_the_readme_says() -> None:
    (llama, bert, mini) = gather(measured_rows())
    assert llama.winner is not None and bert.winner is not None and mini.winner is not None
    assert llama.winner.config == {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    assert llama.winner.latency_ms == pytest.approx(1.227, abs=1e-3) and round(llama.tflops or 0) == 448
    assert llama.counts == {"ok": 61, "censored": 18, "out_of_resources": 8} and llama.trials == 87
    assert [len(one.finals) for one in (llama, bert, mini)] == [3, 3, 3]
    assert llama.finals[0].winner and llama.finals[0].ratio == 1.0 and llama.finals[1].ratio == pytest.approx(1.047, abs=1e-3)  # fmt: skip
    assert llama.accuracy is not None and (llama.accuracy.checked, llama.accuracy.outside) == (79, 0)
    assert {one.status for one in llama.failures} == {"censored", "out_of_resources"}
    assert sum(one.count for one in llama.failures) == 26
    assert llama.history[-1].best_ms == pytest.approx(1.30, abs=0.01) and len(llama.history) == 84


def test_the_incumbent_never_rises_and_wrong_results_are_never_it() -> None:
    rows = [
        make(config={"BLOCK_M": m}, latency_ms=ms, error_ratio=ratio, created=f"2026-01-31T12:00:0{i}+00:00")
        for i, (m, ms, ratio) in enumerate([(16, 3.0, 0.5), (32, 1.0, 1.5), (64, 2.0, 0.5), (128, 2.5, 0.5)])
    ]
    (one,) = gather(rows)
    assert [step.best_ms for step in one.history] == [3.0, 3.0, 2.0, 2.0]
    assert one.accuracy is not None and one.accuracy.outside == 1
    assert one.winner is not None and one.winner.config["BLOCK_M"] == 64


def test_importance_of_a_known_function() -> None:
    # log t = 2a + b on a full grid: variances 4 : 1, exactly.
    points = [({"a": a, "b": b, "c": c}, math.exp(2 * a + b)) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    found = {one.knob: one for one in importances(points)}
    assert found["a"].share == pytest.approx(0.8) and found["b"].share == pytest.approx(0.2)
    assert found["c"].share == pytest.approx(0.0) and found["a"].best == 0
    assert importances(points[:3]) == () and importances([(config, 1.0) for config, _ in points]) == ()


def test_the_surface_holds_every_configuration_once() -> None:
    (llama, *_) = gather(measured_rows())
    surface = llama.surface
    assert surface is not None and (surface.row_knob, surface.column_knob) == ("BLOCK_M", "BLOCK_N")
    cells = [cell for panel in surface.panels for row in panel.cells for cell in row]
    assert sum(cell.status != "" for cell in cells) == 84 and len(surface.panels) == 6 and surface.left_out == 0
    assert [cell.text for cell in cells if cell.best] == ["1.30"] and [cell.text for cell in cells if cell.winner] == ["1.31"]  # fmt: skip
    assert {cell.text for cell in cells if not cell.colour} == {"slow", "too big", "·"}


def test_text_stands_out_on_every_colour() -> None:
    for step in scale():
        light = luminance(int(step["colour"][i : i + 2], 16) for i in (1, 3, 5))
        ink = 1.0 if step["ink"] == "#fff" else 0.0
        assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) >= 4.5, step


def test_charts_keep_inside_their_frame() -> None:
    for one in gather(measured_rows()):
        history, finals = history_chart(one.history), interval_chart(one.finals)
        assert history is not None and finals is not None
        assert all(40 <= mark.x <= 360 and 0 <= mark.y <= 220 for mark in history.marks)
        assert all(10 <= w.low <= w.middle <= w.high <= 350 for w in finals.whiskers)
        assert len(history.y_ticks) >= 2
    assert history_chart(()) is None and interval_chart(()) is None
    assert log_ticks(1.0, 10.0) == [1.0, 2.0, 5.0, 10.0] and log_ticks(1.3, 1.6)[0] == 1.3


def test_intervals_against_the_incumbent_and_the_noise_floor_where_they_are_stored() -> None:
    def finalist(block: int, ms: float, interval: dict[str, float] | None) -> Record:
        final = {"incumbent": "x", "floor": 0.01, "rounds": 60, "interval": interval}
        return make(config={"BLOCK_M": block}, latency_ms=ms, protocol="shootout-1", facts={"shootout": final})

    rows = [finalist(64, 2.0, None), finalist(128, 1.9, {"low": -0.06, "middle": -0.05, "high": -0.04})]
    (one,) = gather(rows)
    chart = interval_chart(one.finals)
    assert chart is not None and chart.band is not None
    assert one.finals[0].interval == pytest.approx((math.expm1(-0.06), math.expm1(-0.05), math.expm1(-0.04)))
    faster, incumbent = chart.whiskers
    assert faster.high < chart.band[0] < incumbent.middle < chart.band[1] and "incumbent" in incumbent.text
    text = shown(rows)
    assert "-4.9 % (-5.8 to -3.9)" in text and "over 60 rounds" in text and Outline(text).open == []


# -- the text --


class Outline(html.parser.HTMLParser):
    """What a reader that cannot see, and one that must not phone, would check."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.images_without_name = 0
        self.tables_without_headers = 0
        self._headers = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag not in ("meta", "link", "br", "line", "path", "circle", "rect"):
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))
        self.loads += [str(value) for name, value in attributes if name in ("src", "srcset", "poster", "data", "action") or (name == "href" and tag != "a")]  # fmt: skip
        if tag == "script":
            self.loads.append("a script")
        if tag == "svg":
            self.images_without_name += not given.get("aria-label")
        if tag == "table":
            self._headers = 0
        if tag == "th":
            assert given.get("scope") in ("col", "row")
            self._headers += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "path", "circle", "rect"):
            return
        assert self.open.pop() == tag
        if tag == "table":
            self.tables_without_headers += self._headers == 0


def test_one_file_well_formed_that_loads_nothing_and_can_be_heard(made: Path) -> None:
    text = made.read_text()
    outline = Outline(text)
    assert outline.open == [] and len(set(outline.ids)) == len(outline.ids)
    assert outline.loads == ["data:,"] and not re.search(r"url\(|@import|https?:", text)
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert outline.images_without_name == 0 and outline.tables_without_headers == 0
    assert len(outline.links) == 4 and {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    assert '<html lang="en">' in text and "width=device-width" in text and "default-src 'none'" in text
    assert len(text) < 200_000


def test_all_that_the_issue_asks_for_is_there(made: Path) -> None:
    text = made.read_text()
    for heading in ("Surface", "History", "Final rounds", "Which knobs matter", "Accuracy", "What failed, and why", "Memory of llama3-8b", "Provenance"):  # fmt: skip
        assert f">{heading}" in text, heading
    assert "needs 294912 bytes of shared memory" in text and "triton 3.6.0" in text and "1.23 ms measured, 448 TFLOP/s" in text  # fmt: skip


def test_a_prediction_is_called_one_wherever_it_stands(made: Path) -> None:
    start = made.read_text().index('<section aria-labelledby="a100')
    section = made.read_text()[start:].partition("</section>")[0]
    assert section.count("predicted") >= 6 and "never timed" in section
    assert " ms" not in section and "History" not in section and "Final rounds" not in section


def test_hostile_rows_are_text_and_nothing_else() -> None:
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>\"&"
    rows = [make(gpu="h100", message=evil, session=evil, protocol=evil, versions={evil: evil}, origin=evil), make(status="crashed", message=evil, config={"BLOCK_M": 64})]  # fmt: skip
    text = shown(rows)
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
    assert Outline(text).loads == ["data:,"]


@pytest.mark.parametrize(
    "rows",
    [
        [make()],
        [make(status="crashed", error_ratio=None)],
        [make(status="wrong_result", error_ratio=9.0), make(status="timeout", error_ratio=None, config={"BLOCK_M": 32})],
        [make(quality="low", latency_p10_ms=None)],
        [predicted(error_ratio=None)],
        [make(shape={"seqlen_q": 0, "seqlen_k": 0})],
        [make(variant="gone", config={"letters": "abc", "flag": True})],
    ],
    ids=["one", "crashed", "nothing ran", "low quality", "not checked", "empty", "unknown variant"],
)  # fmt: skip
def test_poor_data_makes_a_page_too(rows: list[Record]) -> None:
    text = shown(rows)
    assert Outline(text).open == []
    if not any(row.status == "ok" for row in rows):
        assert "no winner" in text and "none: no trial passed" in text


# -- the command --


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run(["report", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_document_holds_the_same(capsys: pytest.CaptureFixture[str], database: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    code, found = document(capsys, "--database", str(database), "--preset", "llama3-8b", "-o", str(path))
    assert code == 0 and path.exists() and found["report"] == str(path) and not found["shipped"]
    # llama3-8b's kernel and heads: as measured on the H100, and as predicted for the A100.
    assert [(one["gpu"], one["basis"]) for one in found["problems"]] == [("h100", "measured"), ("a100", "predicted")]
    assert found["problems"][1]["winner"]["latency_ms"] is None and found["problems"][1]["winner"]["status"] == "predicted"  # fmt: skip
    assert [row["seqlen"] for row in found["memory"]] == [2048, 8192, 32768]
    assert {row["preset"] for row in found["memory"]} == {"llama3-8b"}


def test_without_a_database_the_shipped_rows_are_shown_as_such(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "none"))
    code, found = document(capsys, "--target", "mi300x", "-o", str(tmp_path / "r.html"))
    assert code == 0 and found["shipped"] and {one["basis"] for one in found["problems"]} == {"predicted"}
    assert "rows shipped with flashgen" in (tmp_path / "r.html").read_text() and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--preset", "nobody"], 2, "'nobody' is not known"),
        (["--target", "h1000"], 2, "h1000"),
        (["-o", "no/such/folder/r.html"], 2, "no/such/folder does not exist"),
        (["--target", "b200"], 1, "nothing to report: none of the 190 trials"),
    ],
)
def test_bad_input_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], database: Path, arguments: list[str], code: int, says: str
) -> None:
    got, found = document(capsys, "--database", str(database), *arguments)
    assert got == code and says in found["error"]["message"]
    assert not Path("flashgen-report.html").exists()


# -- in a browser --


def browser(*arguments: str, profile: Path) -> subprocess.CompletedProcess[str]:
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *quiet.split(), f"--user-data-dir={profile}", *arguments], capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture
def profile(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "profile"


# The page in a frame of a given width; a script outside of it reads what the browser made of it.
HARNESS = """<!doctype html><body><iframe id="f" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe>
<script>document.getElementById("f").onload = () => {{
  const d = document.getElementById("f").contentDocument, w = document.getElementById("f").contentWindow;
  const wide = [...d.querySelectorAll("main *")].filter(e => !e.closest(".scroll, .hidden") && e.getBoundingClientRect().right > {width} + 0.5);
  document.title = JSON.stringify({{scroll: d.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
    requests: w.performance.getEntriesByType("resource").map(e => e.name), svgs: d.querySelectorAll("svg").length,
    text: w.getComputedStyle(d.querySelector("svg text")).fontSize,
    svg: d.querySelector("svg").getBoundingClientRect().width, columns: w.getComputedStyle(d.querySelector(".columns")).columnCount}});
}}</script></body>"""


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_overflow_requests_or_complaints(
    made: Path, tmp_path: Path, profile: Path, width: int
) -> None:
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(width=width, page=made.read_text().replace("&", "&amp;").replace('"', "&quot;")))
    done = browser("--dump-dom", f"--window-size={width + 40},1000", harness.as_uri(), profile=profile)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search(r"<title>(.*?)</title>", done.stdout).group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))  # type: ignore[union-attr]  # fmt: skip
    assert seen["scroll"] <= width and seen["wide"] == []
    assert seen["requests"] == [] and seen["svgs"] == 12
    # Text in a chart scales with it: at least 9 CSS pixels on the phone.
    assert float(seen["text"].removesuffix("px")) * seen["svg"] / 360 >= 9
    assert seen["columns"] == ("2" if width == 1280 else "auto")


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_it_follows_the_readers_colour_scheme(made: Path, tmp_path: Path, profile: Path, scheme: int) -> None:
    picture = tmp_path / "page.png"
    browser(f"--screenshot={picture}", "--window-size=400,300", f"--blink-settings=preferredColorScheme={scheme}", made.as_uri(), profile=profile)  # fmt: skip
    first = _first_pixel(picture)
    assert (sum(first) < 120) == (scheme == 0), first


def _first_pixel(path: Path) -> tuple[int, ...]:
    """The upper left pixel of a PNG of 8-bit RGB or RGBA; the first row's filter does not change its first pixel."""
    import struct
    import zlib

    raw, data, at = path.read_bytes(), b"", 8
    channels = {2: 3, 6: 4}[raw[25]]
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        if raw[at + 4 : at + 8] == b"IDAT":
            data += raw[at + 8 : at + 8 + length]
        at += 12 + length
    return tuple(zlib.decompress(data)[1 : 1 + min(3, channels)])
