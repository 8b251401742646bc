"""Break the torch backend on purpose, one way at a time, and see which case of the fuzz notices.

    python tests/mutation/backends.py [--every N] [--broken-alone] [--json]

Each mutant is a copy of the package with one edit, imported by a forked process; every N-th is tried, after the whole package. Exit code 1 when
one survives, or when the text it breaks no longer stands in the source exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCKED, OPTIONS = "torch_blocked/blocked.py", "torch_blocked/options.py"
PACKED, PHILOX, EXECUTION, OPERANDS = (
    "torch_blocked/packed.py",
    "torch_blocked/philox.py",
    "execution.py",
    "operands.py",
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken edit of `file`, a path inside the package; `old` stands there exactly once. The edge case `first` is tried before the others."""

    name: str
    file: str
    old: str
    new: str
    first: str = ""


MUTANTS: tuple[Mutant, ...] = (
    Mutant("alibi's shift dropped", OPTIONS, "slopes * (i + o.alibi_shift - j).abs()", "slopes * (i - j).abs()", first="alibi"),
    Mutant("alibi without the absolute value", OPTIONS, "(i + o.alibi_shift - j).abs()", "(i + o.alibi_shift - j)"),
    Mutant("alibi follows the alignment", OPERANDS, "alibi_shift=problem.seqlen_k - problem.seqlen_q,", "alibi_shift=problem.causal_offset,"),
    Mutant("left window one key far", OPTIONS, "parts.append(j >= i + d - left)", "parts.append(j >= i + d - left - 1)"),
    Mutant("right window one key short", OPTIONS, "parts.append(j <= i + d + right)", "parts.append(j < i + d + right)", first="rows without a key, top-left window"),
    Mutant("causal one key too many", OPTIONS, "parts.append(j <= i + d)", "parts.append(j <= i + d + 1)"),
    Mutant("the range of a window one key late", OPTIONS, "max(0, first - left)", "max(0, first - left + 1)"),
    Mutant("the range of a causal block one key short", OPTIONS, "stop = min(stop, last + 1)", "stop = min(stop, last)"),
    Mutant("attn_mask ignored", OPTIONS, "parts.append(self.cut(o.attn_mask))", "pass", first="attn_mask"),
    Mutant("masks ORed", OPTIONS, "visible = visible & part", "visible = visible | part"),
    Mutant("softcap's derivative missing", OPTIONS, "ds = ds * (1.0 - torch.tanh(raw / o.softcap).square())", "pass"),
    Mutant("softcap's factor missing", OPTIONS, "cap * torch.tanh(raw / cap) if cap", "torch.tanh(raw / cap) if cap"),
    Mutant("bias cut of the wrong rows", OPTIONS, "(-2, self.rows)", "(-2, slice(0, self.rows.stop - self.rows.start))", first="bias"),
    Mutant("bias cut of the wrong keys", OPTIONS, "((-1, self.keys)", "((-1, slice(0, self.keys.stop - self.keys.start))"),
    Mutant("dbias not reduced", OPTIONS, "x.sum(dims, keepdim=True) if dims else x", "x.narrow(dims[0], 0, 1).sum(dims[1:], keepdim=True) if dims else x"),
    Mutant("captured gradient dropped", OPTIONS, "                        total += grad\n", "                        pass\n"),
    Mutant("captured gradient of the last block alone", OPTIONS, "                        total += grad\n", "                        total.copy_(grad)\n", first="hidden keys under a gated score"),
    Mutant("hidden scores reach captured gradients", BLOCKED, "raw = raw.masked_fill(~visible, 0.0)", "pass"),
    Mutant("sequence index of mods and dropout lost", OPTIONS, "(self.batch.start + first, self.batch.stop + first)", "(self.batch.start, self.batch.stop)"),
    Mutant("dropout not rescaled", OPTIONS, "p.masked_fill(~keep, 0.0) / (1.0 - o.dropout_p)", "p.masked_fill(~keep, 0.0)"),
    Mutant("dropout's mask shifted", PHILOX, "device=philox.device) + first_column * 8", "device=philox.device) + first_column * 8 + 1", first="dropout"),
    Mutant("dropout's mask of another head", OPTIONS, "b * self.num_heads + h, i, j)", "b + h, i, j)"),
    Mutant("dropout in the denominator", BLOCKED, "l_i = l_i * alpha + p.sum(-1)", "l_i = l_i * alpha + block.dropped(p).sum(-1)"),
    Mutant("no dropout in dv", BLOCKED, "_grouped_sum(block.dropped(p), dout_i, heads_kv)", "_grouped_sum(p, dout_i, heads_kv)"),
    Mutant("no dropout in dp", BLOCKED, "(block.dropped(dp) - delta)", "(dp - delta)", first="dropout"),
    Mutant("philox's words in another order", PHILOX, ".permute(2, 3, 4, 0, 5, 6, 1, 7)", ".permute(2, 3, 4, 1, 5, 6, 0, 7)"),
    Mutant("philox with nine rounds", PHILOX, "ROUNDS = 10", "ROUNDS = 9"),
    Mutant("philox's offset ignored", PHILOX, "heads & _MASK, offset & _MASK)", "heads & _MASK, offset * 0)"),
    Mutant("philox's high seed ignored", PHILOX, "(seed >> 32) & _MASK", "seed * 0", first="dropout"),
    Mutant("kept below the threshold", PHILOX, "[word >= least for", "[word < least for"),
    Mutant("sinks scaled", BLOCKED, "logits = sinks.float().view(1, -1, 1)", "logits = sinks.float().view(1, -1, 1) * 0.5"),
    Mutant("acc not rescaled for the sinks", BLOCKED, "acc * alpha.unsqueeze(-1)\n\n", "acc\n\n"),
    Mutant("dsinks of the wrong sign", BLOCKED, "sums.sinks -=", "sums.sinks +=", first="rows without a key, sinks"),
    Mutant("lse in base 2", BLOCKED, "(m_i + l_i.log())", "(m_i + l_i.log2())"),
    Mutant("the denominator not rescaled", BLOCKED, "l_i = l_i * alpha + p.sum(-1)", "l_i = l_i + p.sum(-1)"),
    Mutant("dlse missing in delta", BLOCKED, "delta = delta - dlse[batch, :, rows].unsqueeze(-1)", "pass"),
    Mutant("dlse of the wrong sign", BLOCKED, "delta = delta - dlse", "delta = delta + dlse", first="rows without a key"),
    Mutant("heads of a group not summed", BLOCKED, "return product.sum(2).transpose(1, 2)", "return product[:, :, 0].transpose(1, 2)"),
    Mutant("the wrong key/value head", BLOCKED, "grouped: Tensor = x.unflatten(2, (heads_kv, -1))", "grouped: Tensor = x.flip(2).unflatten(2, (heads_kv, -1)) if x.shape[2] != heads_kv else x.unflatten(2, (heads_kv, -1))"),
    Mutant("dk not scaled", BLOCKED, "_grouped_sum(ds, q_i.flatten(1, 2), heads_kv) * options.sm_scale", "_grouped_sum(ds, q_i.flatten(1, 2), heads_kv)"),
    Mutant("keys that nobody sees read", BLOCKED, "return torch.where(seen, blocked, 0.0)", "return blocked", first="no row has a key"),
    Mutant("seqused_k ignored", PACKED, "stop if used is None else min(stop, start + used[index])", "stop"),
    Mutant("always top-left, packed", PACKED, "offset=shift if self.bottom_right else 0", "offset=0"),
    Mutant("the first sequence's slopes", PACKED, "else slopes[index]", "else slopes[0]"),
    Mutant("the first sequence's bias", PACKED, "((-4, index, 1)", "((-4, 0, 1)", first="packed, bias"),
    Mutant("dbias of the last sequence alone", PACKED, "part += sums.bias", "part.copy_(sums.bias)"),
    Mutant("captured gradients of packed sequences dropped", PACKED, "            total += grad\n", "            pass\n"),
    Mutant("heads first taken for another order", EXECUTION, "if layout == \"bshd\" else x.transpose(1, 2)", "if layout != \"bhsd\" else x.transpose(1, 2).flip(1)"),
    Mutant("dropout forgotten", OPERANDS, "philox=self.philox if problem.dropout_p else None", "philox=None", first="dropout"),
    Mutant("the scale forgotten", OPERANDS, "sm_scale=problem.scale", "sm_scale=1.0"),
)  # fmt: skip


def apply(mutant: Mutant, folder: Path) -> None:
    """Put the package, one file of it broken, into a folder.

    Raises:
        ValueError: the text to break does not stand there exactly once.
    """
    shutil.copytree(ROOT / "flashgen", folder / "flashgen")
    path = folder / "flashgen" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        raise ValueError(f"{mutant.name}: {mutant.file} holds {text.count(mutant.old)} times, not once: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new))


def caught_by(mutant: Mutant | None) -> tuple[str, str] | None:
    """The first edge case that fails on the broken package (None: on the whole one), and how; None where it survives."""
    with tempfile.TemporaryDirectory() as folder:
        if mutant is None:
            shutil.copytree(ROOT / "flashgen", Path(folder) / "flashgen")
        else:
            apply(mutant, Path(folder))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, json.dumps(_first_failure(folder, mutant.first if mutant else "")).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
    if not said:
        raise RuntimeError(f"{mutant.name if mutant else 'the whole package'}: the process died without an answer.")
    found = json.loads(said)
    return None if found is None else (found[0], found[1])


def _first_failure(folder: str, first: str) -> tuple[str, str] | None:
    sys.path[:0] = [folder, str(ROOT / "tests" / "fuzz")]
    import edges
    import fuzz

    import flashgen

    if not str(flashgen.__file__).startswith(folder):
        return "import", f"flashgen came from {flashgen.__file__}, not from the mutant"
    if first and first not in edges.EDGES:
        raise ValueError(f"there is no edge case {first!r}")
    for name, case in sorted(edges.EDGES.items(), key=lambda item: item[0] != first):
        said = fuzz.verdict(case)
        if said is not None:
            return name, said[:300]
    return None


def main(arguments: list[str]) -> int:
    """Report on every N-th mutant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--broken-alone", action="store_true", help="not the whole package, whose edge cases are tests")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    import torch.nn.attention.flex_attention  # once, before the forks: flashgen itself is imported by each of them

    torch.set_num_threads(1)
    whole = None if given.broken_alone else caught_by(None)
    if whole is not None:
        print(f"the whole package fails {whole[0]}: {whole[1]}")
        return 1
    results = {}
    for mutant in MUTANTS[:: given.every]:
        results[mutant.name] = found = caught_by(mutant)
        if not given.json:
            said = (
                f"SURVIVED  {mutant.name}"
                if found is None
                else f"caught    {mutant.name}\n          by {found[0]}: {found[1]}"
            )
            print(said, flush=True)
    survivors = [name for name, found in results.items() if found is None]
    if given.json:
        print(json.dumps(results))
        return 1 if survivors else 0
    print(f"{len(survivors)} of {len(results)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
