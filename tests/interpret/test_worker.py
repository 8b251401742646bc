"""The interpreting worker: what it finds out, how it dies, and that it never outlives or entangles its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from handwritten import COPY, kernel
from torch import Tensor

from flashgen import interpret
from flashgen.errors import BuildError, InvalidProblemError
from flashgen.render import KernelSource

HERE = Path(__file__).parent


def run(source: KernelSource, q: Tensor, o: Tensor | None = None) -> Tensor:
    o = torch.zeros_like(q) if o is None else o
    interpret.launch(source, q, q.clone(), q.clone(), o, None, sm_scale=1.0, causal_offset=0)
    return o


@pytest.fixture
def q() -> Tensor:
    return torch.arange(16.0).reshape(1, 1, 1, 16)


def script(text: str, **kwargs: object) -> subprocess.Popen[str]:
    """A Python process with the handwritten kernels at hand."""
    prologue = f"""
    import sys; sys.path.insert(0, {str(HERE)!r})
    import os, signal, threading, time, torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    from handwritten import COPY, kernel
    from flashgen import interpret
    def run(source, q):
        o = torch.zeros_like(q)
        interpret.launch(source, q, q.clone(), q.clone(), o, None, sm_scale=1.0, causal_offset=0)
        return o
    q = torch.arange(16.0).reshape(1, 1, 1, 16)
    SLOW = kernel("for i in range(100000000):\\n    x = tl.load(q)")
    """
    code = textwrap.dedent(prologue) + textwrap.dedent(text)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )  # type: ignore[call-overload,no-any-return]


def gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.02)
    return False


# -- what it computes and finds out --


def test_it_copies(q: Tensor) -> None:
    assert torch.equal(run(COPY, q), q)


def test_this_process_imports_no_triton() -> None:
    process = script("run(COPY, q); print('triton' in sys.modules, os.environ.get('TRITON_INTERPRET'))")
    out, err = process.communicate(timeout=60)
    assert out.split() == ["False", "None"], err


def test_strides_travel_and_gaps_hold_what_the_caller_had() -> None:
    storage = torch.arange(32.0)
    q = storage.as_strided((1, 1, 1, 16), (5, 5, 5, 1), 3)
    beyond = kernel("i = tl.arange(0, N)\ntl.store(o + i, tl.load(q + i))")
    assert torch.equal(run(beyond, q), q)
    wide = storage.as_strided((1, 1, 2, 8), (0, 0, 16, 1), 0)  # elements 0-7 and 16-23: 8-15 lie between
    assert run(beyond, wide, torch.zeros(1, 1, 1, 16)).flatten().tolist() == [float(i) for i in range(16)]


def test_what_a_kernel_leaves_alone_is_nan(q: Tensor) -> None:
    half = kernel("i = tl.arange(0, N // 2)\ntl.store(o + i, tl.load(q + i))")
    o = run(half, q).flatten()
    assert torch.equal(o[:8], q.flatten()[:8]) and o[8:].isnan().all()


def test_reading_outside_gives_nan(q: Tensor) -> None:
    assert run(kernel("i = tl.arange(0, N)\ntl.store(o + i, tl.load(q + i + 8))"), q).flatten()[8:].isnan().all()
    assert run(kernel("i = tl.arange(0, N)\ntl.store(o + i, tl.load(q + i - 8))"), q).flatten()[:8].isnan().all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("tl.store(o + N, 1.0)", "after the end of o"),
        ("tl.store(o - 1, 1.0)", "before the start of o"),
        ("tl.store(k + N + 3, 1.0)", "after the end of k"),
        ("tl.store(v + 2, 1.0)", "wrote into its input v"),
    ],
)
def test_a_write_outside_the_outputs_is_an_error_that_names_the_place(q: Tensor, body: str, message: str) -> None:
    o = torch.full_like(q, 7.0)
    with pytest.raises(BuildError, match=message):
        run(kernel(body), q, o)
    assert torch.equal(o, torch.full_like(q, 7.0)), "a failed launch must leave the caller's output alone"


def test_a_write_between_the_rows_of_an_output_is_an_error(q: Tensor) -> None:
    rows = torch.zeros(1, 4, 1, 16)[..., :12]
    with pytest.raises(BuildError, match="4 bytes between the elements of o"):
        run(kernel("tl.store(o + 13, 1.0)"), q, rows)


def test_a_kernel_that_raises_names_its_line(q: Tensor) -> None:
    source = kernel("i = tl.arange(0, N)\nx = tl.load(q + i)\ny = tl.reshape(x, [N + 1])")
    with pytest.raises(BuildError) as caught:
        run(source, q)
    line = source.text.splitlines().index("    y = tl.reshape(x, [N + 1])") + 1
    assert f"{source.name}:{line}: y = tl.reshape(x, [N + 1])" in str(caught.value)
    assert torch.equal(run(COPY, q), q), "the worker must survive an exception"


def test_a_kernel_file_that_does_not_import_says_so(q: Tensor) -> None:
    broken = KernelSource(text="import triton\n\n\ndef launch(:\n", spec=COPY.spec, variant="handwritten")
    with pytest.raises(BuildError, match="SyntaxError"):
        run(broken, q)


def test_a_crash_names_the_kernel_and_the_next_launch_works(q: Tensor) -> None:
    wild = kernel("tl.store(o, tl.load(q + 100000000000000))")
    with pytest.raises(BuildError, match=r"died while it ran (.|\n)*Segmentation fault(.|\n)*line 7 in kernel"):
        run(wild, q)
    assert torch.equal(run(COPY, q), q)


def test_tensors_off_the_cpu_are_refused(q: Tensor) -> None:
    with pytest.raises(InvalidProblemError, match="q is on meta"):
        run(COPY, q.to("meta"), q)


def test_what_a_kernel_prints_stays_off_stdout() -> None:
    process = script("run(kernel('print(\"seen\")\\ntl.store(o, 0.0)'), q); print('done')")
    out, err = process.communicate(timeout=60)
    assert out == "done\n" and "seen" in err


# -- processes --


def test_a_worker_killed_between_launches_is_replaced_silently(q: Tensor) -> None:
    run(COPY, q)
    pid = interpret.worker_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    # A process is a zombie while its last threads still end; it can be waited for only after that.
    deadline = time.monotonic() + 10.0
    while interpret.worker_pid() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert torch.equal(run(COPY, q), q)
    assert interpret.worker_pid() not in (None, pid)


def test_a_worker_killed_in_the_middle_is_an_error_and_then_replaced(q: Tensor) -> None:
    run(COPY, q)
    pid = interpret.worker_pid()
    assert pid is not None
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(BuildError, match="this launch is lost, the next one starts a new worker"):
        run(kernel("for i in range(100000000):\n    x = tl.load(q)"), q)
    assert gone(pid)
    assert torch.equal(run(COPY, q), q)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_worker_ends_with_its_parent_even_in_the_middle_of_a_kernel(number: int) -> None:
    process = script(
        """
        run(COPY, q); print(interpret.worker_pid(), flush=True)
        run(SLOW, q)
        """
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert gone(pid)


def test_ctrl_c_ends_a_launch_and_leaves_a_working_process_behind() -> None:
    process = script(
        """
        run(COPY, q); first = interpret.worker_pid(); print(first, flush=True)
        try:
            run(SLOW, q)
        except KeyboardInterrupt:
            print(torch.equal(run(COPY, q), q), interpret.worker_pid() != first)
        """,
        start_new_session=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(2.0)  # the slow launch runs by then, on a busy machine too
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    out, err = process.communicate(timeout=60)
    assert out.split() == ["True", "True"], err
    assert gone(pid)


def test_a_forked_child_starts_its_own_worker() -> None:
    process = script(
        """
        run(COPY, q); mine = interpret.worker_pid()
        child = os.fork()
        if child == 0:
            good = torch.equal(run(COPY, q), q) and interpret.worker_pid() != mine
            interpret.shutdown()
            os._exit(0 if good else 1)
        status = os.waitpid(child, 0)[1]
        print(status, torch.equal(run(COPY, q), q), interpret.worker_pid() == mine)
        """
    )
    out, err = process.communicate(timeout=60)
    assert out.split() == ["0", "True", "True"], err


def test_threads_share_one_worker(q: Tensor) -> None:
    inputs = [torch.full_like(q, float(i)) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: run(COPY, x), inputs))
    assert all(torch.equal(o, x) for o, x in zip(outputs, inputs, strict=True))


def test_nothing_is_left_behind() -> None:
    """No file, no process, no warning, whether or not anybody calls shutdown()."""
    process = script("run(COPY, q); print(interpret.worker_pid())")
    out, err = process.communicate(timeout=60)
    assert gone(int(out)) and err == ""


def test_a_large_arena_is_given_back() -> None:
    big = torch.zeros(1, 1 << 22, 1, 8)  # 128 MiB each
    interpret.launch(COPY, big[:, :1], big, big, torch.empty(1, 1, 1, 8), None, sm_scale=1.0, causal_offset=0)
    pid = interpret.worker_pid()
    held = [
        os.stat(f"/proc/{pid}/fd/{fd}").st_blocks * 512
        for fd in os.listdir(f"/proc/{pid}/fd")
        if "flashgen-arena" in os.readlink(f"/proc/{pid}/fd/{fd}")
    ]
    assert held and not any(held)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no triton here')\n")
    process = script(
        "run(COPY, q)", env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    )
    _, err = process.communicate(timeout=60)
    assert "BuildError: the interpreter's worker process did not start: ImportError: no triton here" in err
