"""`Record`: one trial of one configuration, as it is stored, shipped and exchanged."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from flashgen.errors import DatabaseError, InvalidProblemError

Status = Literal[
    "ok",
    "censored",
    "compile_error",
    "out_of_resources",
    "wrong_result",
    "timeout",
    "crashed",
    "predicted",
]
Quality = Literal["high", "low"]
Tunable = int | str | bool

STATUSES: tuple[Status, ...] = get_args(Status)
QUALITIES: tuple[Quality, ...] = get_args(Quality)
SHAPE_KEYS = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv")

_NAMES = ("op", "spec_key", "variant", "gpu", "arch", "protocol", "session", "origin")
_LATENCIES = ("latency_ms", "latency_p10_ms", "latency_p90_ms")
_FIGURES = (*_LATENCIES, "max_abs_error", "error_ratio", "predicted_ms")
_TEXTS = ("bound_by", "model", "message")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One trial: what was tried, where, on which sizes, with which knobs, and what came of it.

    Values are brought into one form when a record is made, so that a record, its JSON line and its database row compare
    equal: figures become floats, tuples in `facts` become lists, and NaN or infinity (no JSON form; SQLite would store
    NaN as NULL too) becomes None. A row whose `error_ratio` is None never wins, so this cannot promote a bad kernel.

    Attributes:
        op: `attention_fwd`, ...
        spec_key: `AttentionSpec.key`.
        variant: name of the variant.
        digest: SHA-256 of the rendered text, 64 hex digits; editing a template retires old rows.
        gpu: name of the target, e.g. `h100`.
        arch: e.g. `sm_90`.
        target: hardware facts (num_sms, smem_bytes, ...); may be empty.
        shape: batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv.
        config: the tunables alone.
        status: what came of it; a `predicted` row was compiled and ranked, never timed.
        latency_ms: median time of one launch; set for `ok`, None for `predicted`.
        latency_p10_ms: 10th percentile.
        latency_p90_ms: 90th percentile.
        max_abs_error: largest absolute error against the fp64 oracle.
        error_ratio: error over the accuracy budget; <= 1 is inside, None is not checked.
        facts: the compiler's facts; a finalist's also hold `shootout`, how the final rounds went.
        rank: place among the predicted candidates of one session, 0 or 1 first; or among the finalists of measured ones,
            1 for the winner.
        bound_by: what limits it, by the cost model.
        predicted_ms: the cost model's time, where it is calibrated.
        model: version of the cost model.
        message: why it failed, or a remark.
        quality: `low` where the time is not to be trusted: the machine was noisy, or candidates were timed one after
            another and no final rounds confirmed it.
        versions: torch, triton, ptxas, driver, flashgen, ...
        protocol: how it was timed.
        session: which tuning run.
        created: ISO 8601 in UTC, see `utc_now`.
        origin: `local`, or where an imported row came from; not part of its identity.

    Raises:
        InvalidProblemError: a value is of the wrong kind, out of range, or contradicts the status.
    """

    op: str
    spec_key: str
    variant: str
    digest: str
    gpu: str
    arch: str
    target: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, int]
    config: dict[str, Tunable]
    status: Status
    latency_ms: float | None = None
    latency_p10_ms: float | None = None
    latency_p90_ms: float | None = None
    max_abs_error: float | None = None
    error_ratio: float | None = None
    facts: dict[str, Any] | None = None
    rank: int | None = None
    bound_by: str | None = None
    predicted_ms: float | None = None
    model: str | None = None
    message: str | None = None
    quality: Quality = "high"
    versions: dict[str, str]
    protocol: str
    session: str
    created: str
    origin: str = "local"

    def __post_init__(self) -> None:
        for name in _NAMES:
            value = getattr(self, name)
            _require(isinstance(value, str) and bool(value), name, value, "a text that is not empty")
        is_digest = isinstance(self.digest, str) and _DIGEST.fullmatch(self.digest) is not None
        _require(is_digest, "digest", self.digest, "the full SHA-256 of the rendered text, 64 hex digits")
        _require(self.status in STATUSES, "status", self.status, ", ".join(STATUSES))
        _require(self.quality in QUALITIES, "quality", self.quality, ", ".join(QUALITIES))
        _require(_is_utc(self.created), "created", self.created, "an ISO 8601 time in UTC, 2026-01-31T12:00:00+00:00")
        _require(self.rank is None or _is_count(self.rank), "rank", self.rank, "None or an integer from 0 up")
        for name in _FIGURES:
            self._set(name, _figure(name, getattr(self, name)))
        for name in _TEXTS:
            self._set(name, _text(name, getattr(self, name)))
        self._set("shape", _shape(self.shape))
        self._set("config", _config(self.config))
        self._set("target", _plain("target", self.target))
        self._set("versions", _versions(self.versions))
        self._set("facts", None if self.facts is None else _plain("facts", self.facts))
        self._check_times()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_times(self) -> None:
        if self.status == "predicted":
            timed = [name for name in _LATENCIES if getattr(self, name) is not None]
            _require(
                not timed, "status", self.status, f"not beside a measured time ({', '.join(timed)}); use predicted_ms"
            )
        if self.status == "ok":
            _require(bool(self.latency_ms), "latency_ms", self.latency_ms, "a positive time, since status is 'ok'")

    @property
    def config_json(self) -> str:
        """The config as canonical JSON."""
        return canonical(self.config)

    @property
    def sha(self) -> str:
        """SHA-256 of the content: every field but `origin`, so that a row that travelled is still the same row."""
        content = self.to_dict()
        del content["origin"]
        return sha256(canonical(content))

    def to_dict(self) -> dict[str, Any]:
        """Field name -> value (the values are not copied)."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def to_json(self) -> str:
        """The record as one line of canonical JSON, without the line's end."""
        return canonical(self.to_dict())

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read what `to_json` wrote.

        Args:
            line: one JSON object.

        Raises:
            DatabaseError: it is no JSON object, has unknown or missing fields, or a value that is not allowed. The
                message does not know the file: callers add it.
        """
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DatabaseError(f"not JSON ({error})") from error
        if not isinstance(values, dict):
            raise DatabaseError(f"a JSON {type(values).__name__}, not an object")
        names = {item.name for item in fields(cls)}
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if unknown := sorted(values.keys() - names):
            raise DatabaseError(f"unknown fields {', '.join(unknown)}: written by a newer flashgen?")
        if missing := sorted(needed - values.keys()):
            raise DatabaseError(f"the fields {', '.join(missing)} are missing")
        try:
            return cls(**values)
        except InvalidProblemError as error:
            raise DatabaseError(str(error)) from error


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(text: str) -> str:
    """SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def utc_now() -> str:
    """The time now, as `Record.created` wants it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidProblemError(f"record: {name}={value!r} is not allowed: it must be {allowed}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_utc(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _figure(name: str, value: Any) -> float | None:
    if value is None:
        return None
    _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, value, "a number or None")
    if not math.isfinite(value):
        return None
    _require(value >= 0, name, value, "0 or more")
    return (
        float(value) + 0.0
    )  # a database gives 1.0 for 1 and may give 0.0 for -0.0: the content digest must not see it


def _text(name: str, value: Any) -> str | None:
    if value is None:
        return None
    _require(isinstance(value, str), name, value, "a text or None")
    # What a dying compiler printed may hold lone surrogates and NUL, which databases refuse.
    return str(value).encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _plain(name: str, value: Any) -> dict[str, Any]:
    """A deep copy as plain JSON values, which also cuts the tie to the caller's dict."""
    _require(isinstance(value, Mapping), name, value, "a mapping")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidProblemError(f"record: {name} holds what JSON cannot: {error}.") from error
    return copy


def _shape(value: Any) -> dict[str, int]:
    _require(
        isinstance(value, Mapping) and set(value) == set(SHAPE_KEYS), "shape", value, f"exactly {', '.join(SHAPE_KEYS)}"
    )
    for name in SHAPE_KEYS:
        _require(_is_count(value[name]), f"shape[{name!r}]", value[name], "an integer from 0 up")
    return {name: value[name] for name in SHAPE_KEYS}


def _config(value: Any) -> dict[str, Tunable]:
    _require(isinstance(value, Mapping), "config", value, "a mapping of tunables")
    for name, knob in value.items():
        _require(isinstance(name, str), "config", name, "keyed by names")
        _require(isinstance(knob, (int, str)), f"config[{name!r}]", knob, "int, str or bool")
    return dict(sorted(value.items()))


def _versions(value: Any) -> dict[str, str]:
    copy = _plain("versions", value)
    for name, version in copy.items():
        _require(isinstance(version, str), f"versions[{name!r}]", version, "a text")
    return copy
