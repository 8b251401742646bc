"""No test falls between `make test` and `make test-long`, and every suite keeps a sample in `make test`."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import selection

ROOT = Path(__file__).resolve().parents[2]
FILES = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}


# Tests that are long as a whole, each beside shorter ones of its file.
WHOLE = {
    "tests/mutation/test_mutation.py::test_broken_backends_are_caught",
    "tests/simulate/test_check_command.py::test_mutants_are_counted",
    "tests/simulate/test_option_study.py::test_sampled_mutants_are_found",
    "tests/simulate/test_options_sm90.py::test_more_sequences_than_one_look_holds",
    "tests/unit/test_examples.py::test_the_gallery_is_a_picture",
    "tests/unit/test_free_form_facts.py::test_so_it_does_in_the_portable_backward",
    "tests/unit/test_free_form_facts.py::test_so_it_does_on_sm_80",
    "tests/unit/test_quickstart_chain.py::test_quickstart",
}


def arguments(target: str) -> list[str]:
    """What a target gives to pytest."""
    command = ["make", "-n", target, "JOBS=3"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in shown.splitlines() if " -m pytest " in line)
    return shlex.split(line.partition(" -m pytest ")[2])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_two_targets_are_all_tests_and_ci_runs_both() -> None:
    rest, long = arguments("test"), arguments("test-long")
    assert rest[rest.index("-m") + 1] == "not long" and long[long.index("-m") + 1] == "long"
    assert [word for word in rest if word != "not long"] == [word for word in long if word != "long"]
    # Nothing else chooses: no path, no expression of names, nothing for every run of pytest.
    assert not any(word.startswith(("tests", "-k", "--ignore", "--deselect")) for word in rest)
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"] and options["addopts"] == ["--strict-markers", "--strict-config"]
    steps = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"step make test", "step make test-long"} <= set(steps)


def test_every_suite_and_every_sampled_test_keeps_a_sample(request: pytest.FixtureRequest) -> None:
    found = request.config.stash[selection.LONG]
    if {test.partition("::")[0] for test in found} != FILES:
        pytest.skip("a part of the tests was asked for")
    for suite in {test.split("/")[1] for test in found}:
        mine = [is_long for test, is_long in found.items() if test.split("/")[1] == suite]
        assert sum(mine) <= len(mine) / 2, suite
    tests = {test.partition("[")[0] for test in found}
    rest = {test.partition("[")[0] for test, is_long in found.items() if not is_long}
    assert tests - rest == WHOLE
    assert {test.partition("::")[0] for test in rest} == FILES
