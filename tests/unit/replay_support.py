"""What tests of replayed launches share: Triton's launcher, as far as they look, and who notes what its compiled part is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from flashgen import launches

Given = list[tuple[Any, ...]]


class PyCUtensorMap:
    """Triton's, made of an address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyCUtensorMap) and self.address == other.address

    __hash__ = None  # type: ignore[assignment]


class Descriptor:
    """Triton's TensorDescriptor, as far as launchers look."""

    def __init__(self, base: Tensor) -> None:
        self.base, self.shape, self.block_shape = base, list(base.shape), [1]


class Last:
    """Triton's compiled launcher."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def __call__(self, *values: Any) -> None:
        flat = [one for x in values for one in (x if isinstance(x, list) else [x])]
        self.given.append(tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in flat))


def expanded(values: tuple[Any, ...]) -> list[Any]:
    return [
        one
        for x in values
        for one in ((PyCUtensorMap(x.base.data_ptr()), *x.shape) if isinstance(x, Descriptor) else (x,))
    ]


class Launcher:
    """Triton's CudaLauncher: of 3.6, which hands over one flat list, or of later ones, whose last argument is a list."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, given: Given, nested: bool = False) -> None:
        launcher, self.nested = Last(given), nested

        def flat(*values: Any) -> None:
            launcher(*values[:9], *expanded(values[9:]))

        def inner(*values: Any) -> None:
            launcher(*values[:-1], expanded(values[-1]))

        self.launch = inner if nested else flat

    def __call__(self, x: int, y: int, z: int, stream: Any, function: int, packed: Any, *rest: Any) -> None:
        metadata, enter, leave, *given = rest
        if enter is not None:
            enter(metadata)
        first = (x, y, z, stream, function, packed, metadata, enter, leave)
        self.launch(*first, tuple(given)) if self.nested else self.launch(*first, *given)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    from triton.runtime.driver import driver as drivers

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 77)
    monkeypatch.setattr(drivers, "_active", active)
    return active


def noted(launcher: Any, *given: Any, enter: Any = None) -> None:
    launches.Noted(launcher)(3, 2, 1, 77, 1234, (4, 1, 0), None, enter, None, *given)
