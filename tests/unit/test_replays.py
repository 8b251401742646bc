"""Launches that are replayed hand Triton's compiled launcher what the plain way hands it, with their own addresses; what cannot be is not."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replay_support import Descriptor, Given, Launcher, PyCUtensorMap, driver, noted  # noqa: F401  # a fixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashgen import launches, replays

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("driver")


COUNTERS = launches.Counters(lambda device: torch.zeros(1, dtype=torch.int32))


def launch_of(launcher: Any) -> Callable[..., None]:
    def launch(x: Tensor, y: Tensor | None, *, n: int, more: Tensor | None = None) -> None:
        sums, rest = x.new_empty((2, 5, 7))
        late = torch.empty((3, 4), dtype=torch.int32)
        noted(launcher, x, y, n, Descriptor(rest), sums, late)
        noted(launcher, COUNTERS(x.device), Descriptor(x[:, 2:]), more, 2.5, Descriptor(sums), rest[1:])

    return launch


@pytest.mark.parametrize("nested", [False, True])
def test_replayed_launches_give_what_the_plain_way_gives(nested: bool) -> None:
    given: Given = []
    kind = replays.Kind(launch_of(Launcher(given, nested)), {"n": 6})
    plain: Given = []
    for turn in range(5):
        x, y, more = torch.zeros(4, 8), torch.zeros(9), torch.zeros(3)
        given.clear()
        tensors = (x, y, more)
        if kind.replay is None:
            kind((x, y), {"more": more})
        else:
            assert kind.replay([t.data_ptr() for t in tensors])
        first, second = given
        start = x.data_ptr()
        assert first[:5] == second[:5] == (3, 2, 1, 77, 1234)
        assert first[9:12] == (x.data_ptr(), y.data_ptr(), 6) and second[10:13] == (PyCUtensorMap(start + 8), 4, 6)
        assert second[13:15] == (more.data_ptr(), 2.5)
        sums = first[15]
        assert second[-1] == sums + 4 * (35 + 7)
        assert first[12] == PyCUtensorMap(sums + 4 * 35) and second[15] == PyCUtensorMap(sums)
        assert first[13:15] == (5, 7) == second[16:18] and first[16] not in (sums, start)
        assert [len(values) for values in given] == [17, 19]
        plain.extend(given if not turn else ())
        assert (kind.replay is not None) == (turn > 0), "watched from the second launch on"
    assert [len(values) for values in plain] == [17, 19]


def test_an_address_that_comes_back_finds_its_descriptor() -> None:
    given: Given = []
    kind = replays.Kind(lambda x: noted(launcher, Descriptor(x)), {})
    launcher = Launcher(given)
    x, other = torch.zeros(8), torch.zeros(8)
    for _ in range(2):
        kind((x,))
    assert kind.replay is not None
    for tensor in (x, other, x, other):
        kind.replay([tensor.data_ptr()])
    maps = [values[9] for values in given[2:]]
    assert [one.address for one in maps] == [t.data_ptr() for t in (x, other, x, other)]
    assert maps[0] is maps[2] and maps[1] is maps[3]


def _scratch_of_triton(given: Given) -> Any:
    made = Launcher(given)
    made.global_scratch_size = 16  # type: ignore[misc]
    return made


def _python(given: Given) -> Any:
    made = Launcher(given)
    made.launch = lambda *values: given.append(values)
    return made


SOMEBODYS = torch.zeros(3)
REFUSED: dict[str, tuple[Callable[[Given], Any], Callable[[Any, Tensor], Any]]] = {
    "zeros": (Launcher, lambda launcher, x: noted(launcher, x, torch.zeros(3))),
    "computed": (Launcher, lambda launcher, x: noted(launcher, -x)),
    "written": (Launcher, lambda launcher, x: noted(launcher, x.zero_())),
    "copied": (Launcher, lambda launcher, x: noted(launcher, x.clone())),
    "read": (Launcher, lambda launcher, x: noted(launcher, x, int(x[0].item()))),
    "somebody's": (Launcher, lambda launcher, x: noted(launcher, x, SOMEBODYS)),
    "somebody's, by a descriptor": (Launcher, lambda launcher, x: noted(launcher, Descriptor(SOMEBODYS))),
    "an address": (Launcher, lambda launcher, x: noted(launcher, x, x.data_ptr() + 4)),
    "nothing": (Launcher, lambda launcher, x: None),
    "no memory": (Launcher, lambda launcher, x: noted(launcher, x[:0])),
    "Triton allocates": (_scratch_of_triton, lambda launcher, x: noted(launcher, x)),
    "another Triton": (_python, lambda launcher, x: noted(launcher, x)),
    "somebody listens": (Launcher, lambda launcher, x: noted(launcher, x, enter=lambda metadata: None)),
}


def test_what_has_no_elements_is_written_in_vain() -> None:
    given: Given = []
    launcher = Launcher(given)

    def launch(x: Tensor) -> None:
        x[:0].zero_()
        noted(launcher, x[1:])

    kind = replays.Kind(launch, {})
    for _ in range(2):
        kind((torch.zeros(8),))
    assert kind.replay is not None and kind.replay([160])
    assert given[-1][9:] == (164,)


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_not_known_is_launched_as_ever(what: str) -> None:
    given: Given = []
    make, launch = REFUSED[what]
    launcher = make(given)
    kind = replays.Kind(lambda x: launch(launcher, x), {})
    for _ in range(5):
        kind((torch.zeros(8),))
    assert kind.replay is None and len(given) == (0 if what == "nothing" else 5)
    assert launches.thread.watcher is None


def test_one_tensor_in_two_places_is_not_one_in_all() -> None:
    given: Given = []
    launcher = Launcher(given)
    kind = replays.Kind(lambda x, y, *, z: noted(launcher, x, y, z), {})
    x, y, z = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    for _ in range(2):
        kind((x, x), {"z": x})
    assert kind.replay is not None
    kind.replay([t.data_ptr() for t in (x, y, z)])
    assert given[-1][9:] == tuple(t.data_ptr() for t in (x, y, z))
    assert given[0][9:] == given[1][9:] == (x.data_ptr(),) * 3


def test_hooks_of_triton_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    given: Given = []
    launcher = Launcher(given)
    kind = replays.Kind(lambda x: noted(launcher, x), {})
    x = torch.zeros(8)
    for _ in range(2):
        kind((x,))
    assert kind.replay is not None and kind.replay([x.data_ptr()])
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", hook)
    assert not kind.replay([x.data_ptr()]) and len(given) == 3
    hook.calls.clear()
    assert kind.replay([x.data_ptr()])


def test_nothing_of_a_launch_is_kept() -> None:
    given: Given = []
    kind = replays.Kind(launch_of(Launcher(given)), {"n": 6})
    watched = []
    for _ in range(3):
        x, y = torch.zeros(4, 8), torch.zeros(9)
        watched += [weakref.ref(x), weakref.ref(y)]
        kind((x, y), {"more": None}) if kind.replay is None else kind.replay([x.data_ptr(), y.data_ptr()])
    del x, y
    gc.collect()
    assert kind.replay is not None and not any(watch() is not None for watch in watched)


@pytest.mark.parametrize("large", [False, True])
def test_scratch_memory_is_one_piece_where_it_is_small(large: bool) -> None:
    given: Given = []
    launcher = Launcher(given)
    size = replays._ONE_PIECE // (4 if large else 64)

    def launch(x: Tensor) -> None:
        a, b = x.new_empty(size), x.new_empty(size)
        noted(launcher, a, b)

    kind = replays.Kind(launch, {})
    x = torch.zeros(8)
    for _ in range(2):
        kind((x,))
    assert kind.replay is not None
    kind.replay([x.data_ptr()])
    a, b = given[-1][9:11]
    assert (b - a == size * 4) == (not large) and abs(b - a) >= size * 4
    assert a % 16 == b % 16 == 0


def test_whoever_listens_to_operators_hears_them_as_ever() -> None:
    class Listens(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    launcher = Launcher([])
    kind = replays.Kind(lambda x: noted(launcher, x), {})
    with Listens():  # type: ignore[no-untyped-call]
        for _ in range(3):
            kind((torch.zeros(8),))
    assert kind.replay is None


def test_another_threads_launch_is_not_watched() -> None:
    given: Given = []
    launcher = Launcher(given)

    def elsewhere(x: Tensor) -> None:
        noted(launcher, x + 1, 5)

    def launch(x: Tensor) -> None:
        other = threading.Thread(target=elsewhere, args=(x,))
        other.start()
        other.join()
        noted(launcher, x)

    kind = replays.Kind(launch, {})
    for _ in range(2):
        kind((torch.zeros(8),))
    assert kind.replay is not None
    given.clear()
    kind.replay([160])
    assert [values[9:] for values in given] == [(160,)]
