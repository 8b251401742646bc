"""Tuning on a Ray cluster: one actor a GPU owns a measuring worker, the driver owns the database.

Ray leases GPUs and carries rows; it decides nothing. A unit (one problem) runs inside one actor from its first candidate to its final rounds, so
that one GPU decides one winner. Rows stream to the driver as they come to be. An actor or a node that dies costs its unit, which begins again on
another (`places.spread`). Usage statistics are off.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flashgen.errors import InvalidProblemError, MissingExtraError, TuningError
from flashgen.store import Record
from flashgen.target import Target
from flashgen.tuner import devices
from flashgen.tuner.context import Context, versions
from flashgen.tuner.places import LocalPlace
from flashgen.tuner.worker import Device, DeviceLostError

_CONNECT_S = 10.0
_ACTOR_S = 180.0  # to lease a GPU, start a process and import
_SAME = ("flashgen", "triton")  # versions that rows and rendered texts depend on


class Station:
    """What an actor is: the worker of one GPU; plain Python, so that it can be tested without Ray."""

    def __init__(self, provider: str, compilers: int | None) -> None:
        self._provider = provider
        self._place = LocalPlace(Device(kind=provider), workers=compilers)

    def describe(self) -> dict[str, Any]:
        """Its process, the target that it is, and the versions that must be the driver's."""
        target = Target.named("cpu") if self._provider == "cpu" else devices.installed()
        return {"pid": os.getpid(), "target": target, "versions": versions(), "host": socket.gethostname()}

    def run(self, context: Context, left_s: float | None) -> Iterator[tuple[str, Any]]:
        """Tune a problem: ("rows", lines) and ("event", event) as they come, then ("result", result) or ("lost", why).

        Args:
            context: made by the driver, without what leads back to it (`_sent`).
            left_s: seconds that the run has left, or None.
        """
        inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        over = threading.Event()
        if left_s is not None:
            timer = threading.Timer(left_s, over.set)
            timer.daemon = True
            timer.start()
        context.save = lambda rows: inbox.put(("rows", [row.to_json() for row in rows]))
        context.report = lambda event: inbox.put(("event", event))
        context.expired = over.is_set
        if left_s is not None:
            end = time.monotonic() + left_s  # by this host's clock
            context.left_s = lambda: end - time.monotonic()

        def work() -> None:
            try:
                self._place.run(context)
                inbox.put(("result", context.result))
            except DeviceLostError as error:
                inbox.put(("lost", str(error)))
            except BaseException as error:
                inbox.put(("error", f"{type(error).__name__}: {error}"))

        threading.Thread(target=work, daemon=True).start()
        kind = ""
        while kind not in ("result", "lost", "error"):
            kind, value = inbox.get()
            yield kind, value


class RayPlace:
    """An actor of the cluster, as `places.spread` uses it."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self._cluster = cluster
        self._aborted = False
        self.name = f"actor {number}"
        self._actor: Any = None
        self.described: dict[str, Any] = {}

    def start(self) -> None:
        """Lease a GPU and start the actor.

        Raises:
            DeviceLostError: the cluster gives none in time.
        """
        ray = self._cluster.ray
        try:
            self._actor = self._cluster.new_actor()
            self.described = ray.get(self._actor.describe.remote(), timeout=_ACTOR_S)
        except ray.exceptions.RayError as error:
            self.close()
            raise DeviceLostError(f"the cluster gave no actor: {_short(error)}") from error
        self.name = f"{self.described['host']} (process {self.described['pid']})"

    def run(self, context: Context) -> None:
        ray = self._cluster.ray
        if self._aborted:
            raise KeyboardInterrupt
        try:
            answers = self._actor.run.options(num_returns="streaming").remote(_sent(context), context.left_s())
            for answer in answers:
                self._take(context, *ray.get(answer))
        except ray.exceptions.RayError as error:
            if self._aborted:
                raise KeyboardInterrupt from None
            raise DeviceLostError(f"its actor or its node died: {_short(error)}") from error

    @staticmethod
    def _take(context: Context, kind: str, value: Any) -> None:
        if kind == "rows":
            context.finish(Record.from_json(line) for line in value)
        elif kind == "event":
            context.report(value)
        elif kind == "lost":
            raise DeviceLostError(value)
        elif kind == "error":
            raise TuningError(f"an actor failed with {context.problem}: {value} (a bug)")
        else:
            context.result.excluded = value.excluded
            context.result.message = value.message
            context.result.winner = value.winner
            context.result.cut_short = value.cut_short

    def revive(self) -> bool:
        """A new actor, wherever the cluster has a free GPU."""
        if self._aborted:
            return False
        self.close()
        try:
            self.start()
        except DeviceLostError:
            return False
        return True

    def abort(self) -> None:
        self._aborted = True
        self.close()

    def close(self) -> None:
        if self._actor is not None:
            self._cluster.ray.kill(self._actor)


def _sent(context: Context) -> Context:
    """A context without what leads back to the driver; what an earlier run measured travels along, as the strategy needs it."""
    bare = replace(context.result, trials=[], excluded={})
    return replace(context, result=bare, save=_nothing, report=_nothing, expired=_never, left_s=_none)


def _nothing(value: Any) -> None:
    return None


def _never() -> bool:
    return False


def _none() -> None:
    return None


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Cluster:
    """A joined cluster and the actors that were started on it."""

    def __init__(self, ray: Any, *, provider: str, most: int | None, compilers: int | None) -> None:
        self.ray = ray
        self._provider, self._compilers = provider, compilers
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = (most or 1) if provider == "cpu" else min(gpus, most or gpus)
        if count < 1:
            raise TuningError(
                f"the Ray cluster has no GPU: its resources are {_plain(ray.cluster_resources())}. Start its nodes with --num-gpus."
            )
        self._places = [RayPlace(self, number) for number in range(count)]
        try:
            for place in self._places:
                place.start()
        except BaseException:
            self.close()
            raise

    def new_actor(self) -> Any:
        """An actor with a GPU of its own."""
        gpus = 0 if self._provider == "cpu" else 1
        # Cores for the compilers are not leased: a node with one core less than GPUs would measure with fewer.
        options = {"num_cpus": 0.01, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        return self.ray.remote(Station).options(**options).remote(self._provider, self._compilers)

    def target(self) -> Target:
        """What most of its GPUs are.

        Raises:
            InvalidProblemError: they differ.
        """
        found: dict[str, Target] = {place.described["target"].name: place.described["target"] for place in self._places}
        if len(found) > 1:
            raise InvalidProblemError(
                f"the cluster has several kinds of GPU ({', '.join(sorted(found))}): name one with --target."
            )
        return next(iter(found.values()))

    def places(self, target: Target) -> list[RayPlace]:
        """The actors on GPUs of that target whose versions are the driver's; the others are let go.

        Raises:
            TuningError: there is none; says what each is.
        """
        fit, others = [], []
        here = versions()
        for place in self._places:
            there = place.described
            differs = [
                f"{name} {there['versions'].get(name)}"
                for name in _SAME
                if there["versions"].get(name) != here.get(name)
            ]
            if there["target"].name != target.name:
                others.append(f"{place.name} is {there['target'].name}")
            elif differs:
                others.append(f"{place.name} has {', '.join(differs)}")
            else:
                fit.append(place)
                continue
            place.close()
        if not fit:
            raise TuningError(
                f"no GPU of the cluster is {target.name} with {', '.join(f'{name} {here.get(name)}' for name in _SAME)}: {'; '.join(others)}."
            )
        return fit

    def close(self) -> None:
        """End every actor."""
        for place in self._places:
            place.abort()


def _plain(resources: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sorted(resources.items()) if not name.startswith("node:"))


@contextmanager
def join(
    address: str, *, provider: str = "cuda", most: int | None = None, compilers: int | None = None
) -> Iterator[Cluster]:
    """Join a cluster, for the length of a run.

    Args:
        address: `host:port` of its head, `auto` for the one that runs on this host, or `local` for one that lives as long as the run.
        provider: of the actors' workers.
        most: how many GPUs at most.
        compilers: compiling processes of each.

    Raises:
        MissingExtraError: Ray is not installed.
        InvalidProblemError: the address is none.
        TuningError: no cluster answers there, or it has no GPU.
    """
    _check_address(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without a GPU keep their environment
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(f"--cluster needs Ray ({error}): pip install 'flashgen[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TuningError(f"no Ray cluster answers at {address!r}: {_short(error)}") from error
    try:
        cluster = Cluster(ray, provider=provider, most=most, compilers=compilers)
        try:
            yield cluster
        finally:
            cluster.close()
    finally:
        if mine:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself waits minutes for a head that is not there.

    Raises:
        InvalidProblemError: it is no address.
        TuningError: nothing listens there.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise InvalidProblemError(
            f"cluster address {address!r} is not host:port: give that of the cluster's head (as `ray start` prints it), auto, or local."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise TuningError(
            f"no Ray cluster answers at {address!r}: {error}. Start one with `ray start --head`."
        ) from error
