"""What a tuning run costs besides compiling and measuring: until `--plan` has answered, until the first candidate is measured, and per trial.

    python benchmarks/tuner_startup.py [--repeat 5]

Each is a fresh process. The measured run is on the CPU provider, with the kernel file of the tests: what stands before the first trial is what
stands before it on a GPU, but for the driver's own start and the compiler. Prints seconds, least and median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLAN = [sys.executable, "-m", "flashgen", "tune", "--plan", "--preset", "llama3-8b", "--target", "h100"]
RUN = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/unit")!r}]
import pytest
from cpu_kernel import CPU, PROBLEM, TILES, use
from flashgen.tuner import tune
use(pytest.MonkeyPatch(), TILES[:1])
tune(PROBLEM, target=CPU, mode="measured", provider="cpu", on_event=lambda event: event.phase == "measuring" and print("first", flush=True))
"""
LOOP = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/unit")!r}]
from test_tuner_run import H100, PROBLEM, STAND_IN, Bench, timed
import flashgen.store.seeds
from flashgen.store import open_store
from flashgen.tuner import TuneResult, measured
from flashgen.tuner.run import _context
flashgen.store.seeds.load = lambda gpu, op: ()
result = TuneResult(problems=[], session="s", mode="measured", target="h100", database="")
with open_store(write=True) as store:
    for trials in (5, int(sys.argv[1])):  # the first run imports what there is to import
        context = _context(
            PROBLEM, H100, "measured", store, lambda event: None, result, max_trials=trials, workers=1, strategy="auto",
            resume=False, expired=lambda: False,
        )
        start = time.process_time()
        measured.run(context, Bench(timed), STAND_IN)
        spent = time.process_time() - start
print(round(60 * trials / spent))
"""


def seconds(command: list[str], folder: str, *, until: str) -> float:
    """Until a process printed a line, or ended."""
    environment = {**os.environ, "FLASHGEN_CACHE_DIR": folder}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if until and line.startswith(until):
                break
        else:
            if process.wait():
                raise SystemExit(f"{command[:4]} failed")
        span = time.perf_counter() - start
        process.stdout.read()
    return span


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        for name, command, until in (("--plan", PLAN, ""), ("first trial", [sys.executable, "-c", RUN], "first")):
            spans = [seconds(command, folder, until=until) for _ in range(repeat)]
            print(f"{name:12} least {min(spans):.2f} s, median {statistics.median(spans):.2f} s")
        for trials in (20, 60):
            command = [sys.executable, "-c", LOOP, str(trials)]
            environment = {**os.environ, "FLASHGEN_CACHE_DIR": folder, "FLASHGEN_DB": f"{folder}/{trials}.sqlite3"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
            print(f"{trials} trials    {done.stdout.strip()} trials a minute of one core's time")


if __name__ == "__main__":
    main()
