"""One layer's attention, counted in bytes: our tiled kernel against attention that materialises the score matrix.

The analysis is that of FlashAttention (Dao et al., arXiv 2205.14135), section 3.2: standard attention moves
Theta(N d + N^2) elements between HBM and chip (theorem 2, algorithm 0), tiled attention Theta(N^2 d^2 / M) with M elements
of fast memory. Our forward keeps query blocks in place and streams keys and values past them (FlashAttention-2, arXiv
2307.08691, algorithm 1): each of ceil(N / BLOCK_M) blocks reads the keys and values it sees, so N^2 (d + d_v) / BLOCK_M
elements, where BLOCK_M (d + d_v) is what M holds. Here the constants are counted too, with masks, grouped heads and edges.

**Issued** bytes are what the programs ask for; a GPU serves them from L2 where it can. **HBM** bytes lie between

- least: every operand once (compulsory);
- most: every issued byte (no cache at all);
- the estimate: `resident` programs run at a time, in launch order, and walk their keys in step. Where the keys and values
  that one such wave touches fit L2, each is read once in all; where they do not, each wave reads them once for itself.

Assumed, not known: one program per SM (more run where registers allow), waves in step, all of L2 free for keys and values,
queries and outputs passing through it. Padding of the head dim is masked and moves nothing; sink logits and slopes (a few
bytes a program) are left out, bias and masks of the caller too, on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashgen.errors import InvalidProblemError
from flashgen.memory import walk
from flashgen.problem import Problem
from flashgen.target import Target

_LSE_BYTES = 4  # fp32, one per query row and head
_MASK_BYTES = 1  # a boolean per probability


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What the walk depends on: query rows of a program, keys of a step."""

    block_m: int
    block_n: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            if getattr(self, name) < 1:
                raise InvalidProblemError(f"{name}={getattr(self, name)} is not allowed: a tile has 1 or more rows.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One kernel of materialised attention: what it reads and writes, in bytes."""

    name: str
    read: int
    written: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flash:
    """The tiled forward, in bytes.

    Attributes:
        q_read, k_read, v_read: issued reads.
        o_written, lse_written: writes.
        hbm_least, hbm_estimate, hbm_most: traffic with HBM, reads and writes; see the module.
        fits_l2: whether the keys and values of every wave fit L2.
        live: q, k, v, out and lse, all that exists at once.
        workspace: beyond operands and result: 0, scores stay on the chip.
        saved: kept for the backward; 0 unless training.
    """

    q_read: int
    k_read: int
    v_read: int
    o_written: int
    lse_written: int
    hbm_least: int
    hbm_estimate: int
    hbm_most: int
    fits_l2: bool
    live: int
    workspace: int
    saved: int

    @property
    def issued(self) -> int:
        """All reads and writes that the programs ask for."""
        return self.q_read + self.k_read + self.v_read + self.o_written + self.lse_written


@dataclass(frozen=True, slots=True, kw_only=True)
class Materialised:
    """Attention that writes scores S and probabilities P, in bytes.

    Attributes:
        passes: what each kernel moves.
        live: the most that exists at once: q, k, v and the larger of S beside P and of P beside out.
        workspace: the part of it that is no operand and no result.
        saved: kept for the backward; 0 unless training.
    """

    passes: tuple[Pass, ...]
    live: int
    workspace: int
    saved: int

    @property
    def hbm(self) -> int:
        """Traffic with HBM, if nothing of one pass is still in L2 for the next."""
        return sum(one.read + one.written for one in self.passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One layer, both ways."""

    problem: Problem
    tile: Tile
    flash: Flash
    materialised: Materialised


def account(
    problem: Problem, *, tile: Tile, target: Target, train: bool = False, resident: int | None = None
) -> Account:
    """Count one layer's forward.

    Args:
        problem: the call; with dropout_p, materialised attention draws and stores a mask.
        tile: of our kernel.
        target: its L2 and number of SMs.
        train: count what the backward needs: flash writes and saves lse.
        resident: programs that run at a time; None for one per SM.

    Raises:
        InvalidProblemError: resident below 1, or a tile without rows.
    """
    if resident is not None and resident < 1:
        raise InvalidProblemError(f"resident={resident} is not allowed: at least one program runs at a time.")
    return Account(
        problem=problem,
        tile=tile,
        flash=_flash(problem, tile, target, train, target.num_sms if resident is None else resident),
        materialised=_materialised(problem, train),
    )


def _flash(problem: Problem, tile: Tile, target: Target, train: bool, resident: int) -> Flash:
    size, heads = problem.spec.itemsize, problem.batch * problem.num_heads_q
    heads_kv = problem.batch * problem.num_heads_kv
    q = size * heads * problem.seqlen_q * problem.head_dim
    out = size * heads * problem.seqlen_q * problem.head_dim_v
    lse = _LSE_BYTES * heads * problem.seqlen_q if train or problem.spec.has_lse else 0
    ranges = walk.key_ranges(problem, tile.block_m, tile.block_n)
    loaded = walk.keys_loaded(ranges)
    per_key = size * (problem.head_dim + problem.head_dim_v)

    once = per_key * heads_kv * walk.keys_touched(ranges)
    together = [per_key * sum(wave.values()) for wave in walk.waves(problem, ranges, resident)]
    fits = max(together, default=0) <= target.l2_bytes
    passing = q + out + lse
    kv = per_key * heads_kv * problem.seqlen_k
    return Flash(
        q_read=q,
        k_read=size * heads * loaded * problem.head_dim,
        v_read=size * heads * loaded * problem.head_dim_v,
        o_written=out,
        lse_written=lse,
        hbm_least=passing + once,
        hbm_estimate=passing + (once if fits else sum(together)),
        hbm_most=passing + per_key * heads * loaded,
        fits_l2=fits,
        live=q + kv + out + lse,
        workspace=0,
        saved=q + kv + out + lse if train else 0,
    )


def _materialised(problem: Problem, train: bool) -> Materialised:
    """Algorithm 0 of arXiv 2205.14135, with S and P in the operands' dtype: the least such code can do.

    Scale and mask are folded into the products, keys and values of grouped heads are read in place, and masked scores are
    computed like any other. Eager code adds passes (scale, mask, a softmax in fp32, repeated keys), none is counted.
    """
    size, heads = problem.spec.itemsize, problem.batch * problem.num_heads_q
    rows_kv = problem.batch * problem.num_heads_kv * problem.seqlen_k
    q, out = (size * heads * problem.seqlen_q * d for d in (problem.head_dim, problem.head_dim_v))
    k, v = (size * rows_kv * d for d in (problem.head_dim, problem.head_dim_v))
    pairs = heads * problem.seqlen_q * problem.seqlen_k
    scores = size * pairs
    mask = _MASK_BYTES * pairs if problem.dropout_p else 0

    passes = [Pass(name="scores: S = q k^T", read=q + k, written=scores)]
    # Live beside q, k and v, and saved for the backward: softmax and tanh need their results, the products their operands.
    kept = scores
    if problem.softcap:
        passes.append(Pass(name="softcap: S = c tanh(S / c)", read=scores, written=scores))
        kept += scores
    passes.append(Pass(name="softmax: P = softmax(S)", read=scores, written=scores))
    if mask:
        passes.append(Pass(name="dropout: P = mask P", read=scores, written=scores + mask))
        kept += scores + mask
    passes.append(Pass(name="values: out = P v", read=scores + v, written=out))
    # Two matrices stand side by side in softmax (and in softcap, and in dropout, there with the mask).
    beside = max(2 * scores + mask, scores + out)
    if train:
        # What the backward keeps is live as well, when the last pass writes out.
        beside = max(beside, kept + out)
    return Materialised(
        passes=tuple(passes),
        live=q + k + v + beside,
        workspace=beside - out,
        saved=q + k + v + kept if train else 0,
    )
