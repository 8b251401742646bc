"""The measured surfaces of `data/`, and the compiled facts of this project's kernel at the same tiles."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flashgen import Problem, Target
from flashgen.compile_pool import CompilePool
from flashgen.config import KernelConfig
from flashgen.facts import CompiledFacts
from flashgen.render import render
from flashgen.variants import by_name

DATA = Path(__file__).parent / "data"
FACTS = DATA / "facts_triton_fwd_sm_90.jsonl"
H200 = Target.named("h200")
TRITON_FWD = by_name("triton_fwd")

Surface = dict[KernelConfig, float]
Facts = dict[str, dict[KernelConfig, CompiledFacts]]


def plain() -> dict[Problem, Surface]:
    """Milliseconds by problem and tile; the knobs are this project's `triton_fwd`'s, the kernel is another."""
    return _read("h200_triton_attention_fwd.jsonl", TRITON_FWD.name)


def gluon() -> dict[Problem, Surface]:
    """The same of a warp-specialised Gluon kernel, with knobs of its own."""
    return _read("h200_gluon_attention_fwd.jsonl", "gluon_prototype")


def name(problem: Problem) -> str:
    """A short name, e.g. `d128 S8192 causal`."""
    return f"d{problem.head_dim} S{problem.seqlen_q} {'causal' if problem.causal else 'full'}"


def load_facts(specs: Iterable[str]) -> tuple[Facts, list[str]]:
    """The committed facts by spec key, and remarks: which kernel text they belong to, where it is not today's."""
    found: Facts = defaultdict(dict)
    digests: dict[str, str] = {}
    triton = ""
    for line in FACTS.read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        facts = CompiledFacts.from_json(row["facts"])
        found[row["spec_key"]][TRITON_FWD.config(**row["config"])] = facts
        digests[row["spec_key"]], triton = row["digest"], facts.triton_version
    remarks = [f"facts of {FACTS.name}, compiled with Triton {triton}"]
    for problem in {problem.spec.key: problem for problem in plain()}.values():
        key = problem.spec.key
        today = render(problem.spec, TRITON_FWD).digest
        if key in specs and digests.get(key) != today:
            remarks.append(
                f"{key}: of kernel text {digests.get(key, 'none')[:12]}, today's is {today[:12]}: --recompile"
            )
    return dict(found), remarks


def compile_all(workers: int | None = None) -> Iterator[str]:
    """Compile every measured tile with today's template (minutes, cached) and write `FACTS`; yields progress in words."""
    lines = []
    surfaces = plain()
    for problem in {problem.spec.key: problem for problem in surfaces}.values():
        tiles = {tile for other, times in surfaces.items() if other.spec == problem.spec for tile in times}
        source = render(problem.spec, TRITON_FWD)
        done = 0
        with CompilePool(workers) as pool:
            for config, result in pool.map(source, H200, sorted(tiles, key=lambda tile: tile.label)):
                if isinstance(result, CompiledFacts):
                    done += 1
                    row = {"spec_key": problem.spec.key, "digest": source.digest, "config": config.to_dict()}
                    # Seconds to compile are of this machine: they would change the file with every run.
                    row["facts"] = {**result.to_json(), "compile_s": 0.0}
                    lines.append(json.dumps(row, sort_keys=True, separators=(",", ":")))
        yield f"{problem.spec.key}: {done} of {len(tiles)} compiled"
    FACTS.write_text("".join(f"{line}\n" for line in sorted(lines)))


def _read(file: str, variant: str) -> dict[Problem, Surface]:
    found: dict[Problem, Surface] = defaultdict(dict)
    for line in (DATA / file).read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        if not row.get("ms"):
            continue  # it did not fit
        problem = Problem(
            dtype="bf16",
            batch=row["batch"],
            seqlen_q=row["seqlen"],
            seqlen_k=row["seqlen"],
            num_heads_q=row["num_heads"],
            num_heads_kv=row["num_heads"],
            head_dim=row["head_dim"],
            head_dim_v=row["head_dim"],
            causal=row["causal"],
        )
        found[problem][KernelConfig(variant=variant, **row["config"])] = row["ms"]
    return dict(found)
