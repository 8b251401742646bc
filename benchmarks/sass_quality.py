"""Instructions of the Hopper forward's main loop, counted in the machine code: no GPU needed.

    python benchmarks/sass_quality.py [--json] [--target h100]

Every default configuration of head dim 64, 128 and 256, full and causal, is compiled for sm_90a with the installed Triton. The counts
are warp instructions for 128 x 128 scores. `exp2` has a floor: one for each of the 16,384 scores, 512 for 32 lanes each; what
`mufu` shows beyond is the correction of a row's running maximum, once a key block.
"""

from __future__ import annotations

import argparse
import json
import sys

from flashgen.facts import CompiledFacts, compile_facts
from flashgen.spec import AttentionSpec
from flashgen.target import Target
from flashgen.variants import by_name

VARIANT = by_name("gluon_fwd_sm90")
KEYS = [f"attention_fwd-bf16-d{d}{causal}" for d in (64, 128, 256) for causal in ("", "-causal")]
GROUPS = {
    "tensor": ("hgmma",),
    "mufu": ("mufu",),
    "fma_alu": ("fp32", "alu", "select"),
    "shared": ("shared", "shuffle", "async_copy"),
    "barrier": ("barrier",),
    "spill": ("spill",),
    "other": ("other", "global"),
}
WARP_ROWS, LANES, TILE = 16, 32, 128 * 128


def per_tile(facts: CompiledFacts, block_n: int) -> dict[str, float]:
    """Warp instructions for a 128 x 128 tile of scores, by group; one warp's pass covers 16 rows x BLOCK_N keys."""
    passes = TILE / (WARP_ROWS * block_n)
    counts = {name: sum(facts.loop.get(kind, 0) for kind in kinds) * passes for name, kinds in GROUPS.items()}
    return {**counts, "total": facts.loop.get("total", 0) * passes, "exp2_floor": TILE / LANES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100", help="a Hopper GPU, see `flashgen show targets`")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    target, rows = Target.named(arguments.target), []
    for key in KEYS:
        spec = AttentionSpec.from_key(key)
        config = VARIANT.default(spec, target)
        facts = compile_facts(spec, config, target)
        rows.append(
            {
                "spec": key,
                "config": config.label,
                "triton": facts.triton_version,
                "registers": facts.n_regs,
                "smem_bytes": facts.smem_bytes,
                "spill_bytes": facts.spill_bytes,
                "serialised": facts.serialised,
                "per_tile": per_tile(facts, int(config.BLOCK_N)),
            }
        )
    if arguments.json:
        print(json.dumps(rows))
        return 0
    print(
        f"{'spec':30}"
        + "".join(f"{name:>10}" for name in rows[0]["per_tile"])
        + f"{'spilled':>9}{'smem':>8} serialised"
    )
    for row in rows:
        counts = "".join(f"{value:10.0f}" for value in row["per_tile"].values())
        print(
            f"{row['spec']:30}{counts}{row['spill_bytes']:9}{row['smem_bytes']:8} {'yes' if row['serialised'] else 'no'}"
        )
    print(f"warp instructions for 128 x 128 scores; Triton {rows[0]['triton']}, {target.arch}a")
    return 0


if __name__ == "__main__":
    sys.exit(main())
