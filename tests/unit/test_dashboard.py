"""`--study FILE` opens in optuna-dashboard: the real one, started on the file of a search, asked as a browser asks it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from cpu_kernel import CPU, PROBLEM, TILES, at, use

from flashgen.tuner import tune

DASHBOARD = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent)) or shutil.which("optuna-dashboard")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DASHBOARD is None, reason="optuna-dashboard is not installed (pip install optuna-dashboard)"),
]


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A dashboard that serves the study of a search over three tiles, of which the second fails."""
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    use(monkeypatch, TILES[:3], {at(TILES[1]): "bug"})
    study = tmp_path / "study.sqlite3"
    tune(PROBLEM, target=CPU, mode="measured", provider="cpu", strategy="exhaustive", study=str(study), progress=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert DASHBOARD is not None
    command = [DASHBOARD, f"sqlite:///{study}", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def get(url: str, *, patience_s: float = 30.0) -> bytes:
    end = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return bytes(answer.read())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_the_dashboard_shows_every_trial_with_its_knobs(address: str, tmp_path: Path) -> None:
    studies = json.loads(get(f"{address}/api/studies"))["study_summaries"]
    assert len(studies) == 1 and studies[0]["study_name"].startswith(PROBLEM.spec.key)
    shown: dict[str, Any] = json.loads(get(f"{address}/api/studies/{studies[0]['study_id']}?after=0"))
    assert [trial["state"] for trial in shown["trials"]] == ["Complete", "Fail", "Complete"]
    knobs = [{one["name"]: int(one["param_external_value"]) for one in trial["params"]} for trial in shown["trials"]]
    assert knobs == [tile.to_dict() for tile in TILES[:3]]
    read = optuna.load_study(study_name=studies[0]["study_name"], storage=f"sqlite:///{tmp_path / 'study.sqlite3'}")
    assert [trial.get("values") for trial in shown["trials"]] == [trial.values for trial in read.trials]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_a_browser_lists_the_study(address: str, tmp_path: Path) -> None:
    get(f"{address}/dashboard/")
    assert CHROMIUM is not None
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --virtual-time-budget=20000"
    )
    page = subprocess.run(
        [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{address}/dashboard/"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    assert PROBLEM.spec.key in page
