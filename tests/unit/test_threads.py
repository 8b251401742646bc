"""One thread a process (`tests/conftest.py`).

Two threads of BLAS or OpenMP on a machine that others use spin while they wait for each other: a test of the simulator
that takes a second then took minutes now and then, and its time ran out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COUNT = "import threadpoolctl, numpy, torch; print([x['num_threads'] for x in threadpoolctl.threadpool_info()], torch.get_num_threads())"


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="references of a GPU's tests take all cores")
@pytest.mark.skipif(
    "OMP_NUM_THREADS" in os.environ and os.environ["OMP_NUM_THREADS"] != "1", reason="the user said how many"
)
def test_this_process_and_those_of_tests_compute_in_one_thread() -> None:
    pytest.importorskip("threadpoolctl")
    assert torch.get_num_threads() == 1
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    counts, _, own = done.stdout.strip().rpartition(" ")
    assert own == "1" and set(counts) <= set("[1, ]") and "1" in counts
