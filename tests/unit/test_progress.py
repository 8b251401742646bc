"""What a run shows while it lasts: a live table on a terminal, plain lines elsewhere, nothing on stdout."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from itertools import count

import pytest
from rich.console import Console
from store_support import environment

from flashgen.tuner.context import Event
from flashgen.tuner.progress import Board, Row, clock_time, plain_lines, trials


def told(board: Board, event: Event) -> Row:
    board.update(event)
    return board.rows[event.problem]


def event(
    done: int, *, total: int = 10, best: str = "", phase: str = "measuring", problem: str = "p", **counts: int
) -> Event:
    return Event(problem=problem, done=done, total=total, best=best, phase=phase, counts=counts)


def drawn(board: Board, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(board)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_time_left_follows_the_pace_of_the_phase() -> None:
    ticks = count(0, 3)
    board = Board(clock=lambda: float(next(ticks)))
    board.update(event(0, phase="compiling"))
    assert told(board, event(1, phase="compiling")).left_s() is None, "one step is no pace"
    assert told(board, event(2, phase="compiling")).left_s() == pytest.approx(6 / 2 * 8)
    assert told(board, event(10, phase="compiling")).left_s() is None
    board.update(event(0))
    board.update(event(1))
    assert told(board, event(4)).left_s() == pytest.approx(6 / 4 * 6), "a new phase has a pace of its own"


def test_a_row_keeps_its_incumbent_and_says_predicted() -> None:
    board = Board()
    board.update(event(1, best="best so far 1.2269 ms: BLOCK_M=128", ok=1))
    board.update(event(2, ok=1, crashed=2, timeout=1))
    board.update(event(1, problem="other", best="predicted best so far: BLOCK_M=64, bound by tensor", excluded=3))
    text = " ".join(drawn(board, 160).split())
    assert "1.2269 ms: BLOCK_M=128" in text and "1 ok, 2 crashed, 1 timeout" in text and "2/10" in text
    assert "predicted: BLOCK_M=64, bound by tensor" in text and "3 excluded" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits_any_terminal(width: int) -> None:
    board = Board()
    for number in range(30):
        board.update(event(3, problem=f"attention_fwd-bf16-d128-causal batch {number}", best="best so far 1 ms: " + "x" * 90))  # fmt: skip
    text = drawn(board, width)
    assert max(map(len, text.splitlines())) <= width
    assert "18 problems before these are done" in text and "29" in text.split() and "3/10" in text


def test_plain_lines_come_now_and_then_and_at_the_end_of_a_phase(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    report = plain_lines(clock=lambda: now[0], every_s=5.0)
    for done in range(11):
        report(event(done, best="best so far 2 ms: x" if done == 1 else "", ok=done))
        now[0] += 1.0
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[1].split("  ")[0] for line in err.splitlines()] == ["0/10", "5/10", "10/10"]
    assert "5/10  2 ms: x  5 ok  about 0:05 left" in err


def test_words() -> None:
    assert [clock_time(value) for value in (0.4, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]
    assert trials({"timeout": 1, "censored": 4, "ok": 2}) == "2 ok, 4 censored, 1 timeout"


RUN = """
import sys, time
from flashgen.tuner.context import Event
from flashgen.tuner.progress import reporter
with reporter(True, None) as report:
    for done in range(4):
        report(Event(problem="bf16 d128", done=done, total=3, best="best so far 1.5 ms: tile", phase="measuring", counts={"ok": done}))
        time.sleep(0.05)
print("the result")
"""


def on_a_terminal(**changes: str) -> tuple[str, str]:
    """Stdout through a pipe, stderr through a terminal."""
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", RUN], stdout=subprocess.PIPE, stderr=follower, env={**environment(), "TERM": "xterm", "COLUMNS": "100", **changes}, timeout=60, check=True
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux's end of a terminal
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    return done.stdout.decode(), seen.decode()


@pytest.mark.slow
def test_a_terminal_gets_the_table_and_stdout_the_result_alone() -> None:
    out, err = on_a_terminal()
    assert out == "the result\n"
    assert "incumbent" in err and "3/3" in err and "1.5 ms: tile" in err and "3 ok" in err
    assert "\x1b[1m" in err, "the head of the table is bold"


@pytest.mark.slow
def test_no_color_and_a_dumb_terminal_are_honoured() -> None:
    _, err = on_a_terminal(NO_COLOR="1")
    assert "incumbent" in err and "\x1b[3" not in err
    _, err = on_a_terminal(TERM="dumb")
    assert "\x1b" not in err and "measuring bf16 d128: 3/3" in err
