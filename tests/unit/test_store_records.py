"""Records: one form for a value, its JSON line and its identity."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
from store_support import CONFIG, SHAPE, make, predicted

from flashgen.errors import DatabaseError, InvalidProblemError
from flashgen.store.records import STATUSES, Record, utc_now

FULL = make(
    latency_p10_ms=1.2,
    latency_p90_ms=1.3,
    max_abs_error=3e-3,
    facts={"n_regs": 168, "loop": {"HGMMA": 4}, "serialised": False},
    rank=2,
    bound_by="tensor",
    predicted_ms=1.1,
    model="m1",
    message="one\ntwo \u2028 three",
)


@pytest.mark.parametrize("record", [FULL, make(), predicted(), make(config={"flag": True, "mode": "x"})])
def test_json_line_round_trips(record: Record) -> None:
    line = record.to_json()
    assert len(line.splitlines()) == 1
    again = Record.from_json(line)
    assert again == record
    assert again.to_json() == line
    assert again.sha == record.sha
    assert json.loads(line)["config"] == record.config


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_is_storable(status: str) -> None:
    assert Record.from_json(make(status=status).to_json()).status == status


def test_every_field_but_origin_is_part_of_the_identity() -> None:
    other = {
        "op": "attention_bwd",
        "spec_key": "k",
        "variant": "v",
        "digest": "e" * 64,
        "gpu": "a100",
        "arch": "sm_80",
        "target": {},
        "shape": SHAPE | {"batch": 3},
        "config": CONFIG | {"BLOCK_M": 64},
        "status": "censored",
        "latency_ms": 2.0,
        "latency_p10_ms": 1.0,
        "latency_p90_ms": 4.0,
        "max_abs_error": 1.0,
        "error_ratio": None,
        "facts": None,
        "rank": 3,
        "bound_by": "memory",
        "predicted_ms": 9.0,
        "model": "m2",
        "message": None,
        "quality": "low",
        "versions": {},
        "protocol": "p",
        "session": "s2",
        "created": "2026-02-01T00:00:00Z",
    }
    names = {field.name for field in fields(Record)} - {"origin"}
    assert set(other) == names  # a new field cannot be forgotten
    shas = {FULL.sha, *(replace(FULL, **{name: value}).sha for name, value in other.items())}
    assert len(shas) == len(names) + 1
    assert replace(FULL, origin="colleague").sha == FULL.sha


def test_values_take_one_form() -> None:
    record = make(latency_ms=2, max_abs_error=-0.0, facts={"tiles": (1, 2)}, config={"a_flag": False})
    assert isinstance(record.latency_ms, float)
    assert math.copysign(1.0, record.max_abs_error or 0.0) == 1.0
    assert record.facts == {"tiles": [1, 2]}
    assert record.config["a_flag"] is False
    assert list(record.config) == sorted(record.config)
    assert record.sha == Record.from_json(record.to_json()).sha


def test_what_json_cannot_hold_becomes_none_and_cannot_win() -> None:
    record = make(status="wrong_result", max_abs_error=math.inf, error_ratio=math.nan)
    assert (record.max_abs_error, record.error_ratio) == (None, None)


def test_text_of_a_dying_compiler_is_storable() -> None:
    record = make(status="crashed", message="a\0b\udc80")
    assert record.message == "a\N{REPLACEMENT CHARACTER}b?"
    record.message.encode()


def test_a_record_does_not_change_with_the_callers_dicts() -> None:
    facts, config = {"loop": {"HGMMA": 4}}, dict(CONFIG)
    record = replace(FULL, facts=facts, config=config)
    sha = record.sha
    facts["loop"]["HGMMA"] = 5
    config["BLOCK_M"] = 1
    assert record.sha == sha


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"digest": "abc"}, "digest='abc'"),
        ({"status": "fine"}, "status='fine'"),
        ({"quality": "good"}, "quality='good'"),
        ({"op": ""}, "op=''"),
        ({"created": "yesterday"}, "created='yesterday'"),
        ({"created": "2026-01-31T12:00:00"}, "created="),
        ({"created": "2026-01-31T12:00:00+02:00"}, "created="),
        ({"latency_ms": -1.0}, "latency_ms=-1.0"),
        ({"latency_ms": "1"}, "latency_ms='1'"),
        ({"latency_ms": True}, "latency_ms=True"),
        ({"rank": -1}, "rank=-1"),
        ({"shape": {"depth": 1}}, "shape="),
        ({"shape": {"batch": -1}}, r"shape\['batch'\]=-1"),
        ({"shape": {"batch": 1.0}}, r"shape\['batch'\]=1.0"),
        ({"config": {"BLOCK_M": 1.5}}, r"config\['BLOCK_M'\]=1.5"),
        ({"facts": {"x": math.nan}}, "facts holds what JSON cannot"),
        ({"target": {"x": object()}}, "target holds what JSON cannot"),
        ({"versions": {"torch": 2}}, r"versions\['torch'\]=2"),
        ({"message": b"x"}, "message=b'x'"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidProblemError, match=named):
        make(**changes)


@pytest.mark.parametrize("name", ["latency_ms", "latency_p10_ms", "latency_p90_ms"])
def test_a_prediction_never_holds_a_measured_time(name: str) -> None:
    with pytest.raises(InvalidProblemError, match=f"measured time .{name}.; use predicted_ms"):
        predicted(**{name: 1.0})


@pytest.mark.parametrize("latency", [None, 0.0, math.nan])
def test_a_measurement_always_holds_a_time(latency: float | None) -> None:
    with pytest.raises(InvalidProblemError, match="latency_ms"):
        make(latency_ms=latency)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list, not an object"),
        (json.dumps(make().to_dict() | {"colour": 1}), "unknown fields colour"),
        (json.dumps({"op": "attention_fwd"}), "arch, config, created, digest"),
        (json.dumps(make().to_dict() | {"status": ["ok"]}), "status="),
        (json.dumps(make().to_dict() | {"shape": None}), "shape=None"),
    ],
)
def test_a_bad_line_is_a_database_error(line: str, named: str) -> None:
    with pytest.raises(DatabaseError, match=named):
        Record.from_json(line)


def test_utc_now_is_accepted() -> None:
    now = utc_now()
    assert make(created=now).created == now
