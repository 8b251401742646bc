"""A traced program and samples of what it captures as JSON: for another process, which has the functions no more."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from flashgen.mods.aten import DTYPES, TORCH
from flashgen.mods.captures import Capture
from flashgen.mods.graph import Graph, Node, ordered
from flashgen.mods.programs import Program


def to_json(program: Program, samples: Sequence[Tensor]) -> dict[str, Any]:
    """What `from_json` reads: nodes in order, roots and captures by number, samples as bytes."""
    roots = [root for root in (program.score, program.mask, program.block) if root is not None]
    nodes = ordered(*roots)
    numbers = {id(node): number for number, node in enumerate(nodes)}

    def number(root: Node | None) -> int | None:
        return None if root is None else numbers[id(root)]

    return {
        "nodes": [[node.op, node.dtype, _value(node.value), [numbers[id(arg)] for arg in node.args]] for node in nodes],
        "score": number(program.score),
        "mask": number(program.mask),
        "block": number(program.block),
        "captures": [{**asdict(replace(row, tensor=None)), "shape": list(row.shape)} for row in program.captures],
        "title": program.title,
        "digest": program.digest,
        "samples": [_bytes(sample) for sample in samples],
    }


def from_json(data: Mapping[str, Any]) -> tuple[Program, tuple[Tensor, ...]]:
    """The program and the samples, on the CPU.

    Raises:
        ValueError: the program is not the one that was written: its digest differs.
    """
    graph, nodes = Graph(), list[Node]()
    for op, dtype, value, args in data["nodes"]:
        # As it was, not simplified once more: the text must not change on the way.
        nodes.append(graph._share(op, tuple(nodes[arg] for arg in args), dtype, _number(value)))
    score, mask, block = (None if data[name] is None else nodes[data[name]] for name in ("score", "mask", "block"))
    program = Program(
        score=score,
        mask=mask,
        block=block,
        captures=tuple(Capture(**{**row, "shape": tuple(row["shape"])}) for row in data["captures"]),
        sources=tuple(range(len(data["captures"]))),
        title=data["title"],
        sites={},
        graph=graph,
    )
    if program.digest != data["digest"]:
        raise ValueError(f"the program that came has digest {program.digest}, the one that was sent {data['digest']}")
    return program, tuple(_tensor(sample) for sample in data["samples"])


def _value(value: Any) -> Any:
    """JSON has no NaN and no infinity, and does not tell 1 from 1.0 in every reader."""
    return {"float": value.hex()} if isinstance(value, float) else value


def _number(value: Any) -> Any:
    return float.fromhex(value["float"]) if isinstance(value, dict) else value


def _bytes(sample: Tensor) -> dict[str, Any]:
    dense = sample.detach().cpu().contiguous()
    raw = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    return {"dtype": DTYPES[dense.dtype], "shape": list(dense.shape), "bytes": base64.b64encode(raw).decode()}


def _tensor(data: Mapping[str, Any]) -> Tensor:
    raw = bytearray(base64.b64decode(data["bytes"]))
    dtype = TORCH[data["dtype"]]
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty((0,), dtype=dtype)
    return flat.reshape(data["shape"]).clone()
