"""What the arguments of a call must be: one check per kind of argument, none of which reads a GPU's memory. Importing it does not import torch.

Every refusal is an `InvalidProblemError` that names the argument, says what was given and what is allowed. Values inside
tensors (the offsets of packed sequences) are looked at on a CPU only: on a GPU that would synchronise (FLASHGEN_CHECK_VALUES).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

from flashgen import settings
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.spec import DType

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["bshd", "bhsd"]
CausalAlignment = Literal["bottom-right", "top-left"]
LAYOUTS: tuple[Layout, ...] = ("bshd", "bhsd")
ALIGNMENTS: tuple[CausalAlignment, ...] = ("bottom-right", "top-left")
_FAR = 1 << 62  # keys: what an operator's schema can carry
MAX_FLOAT32 = 3.4028234663852886e38
_DTYPE_NAMES = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}

# -- scalars --


def require(ok: bool, name: str, given: object, allowed: str) -> None:
    """Refuse a value that is not `ok`."""
    if not ok:
        raise InvalidProblemError(f"{name}={given!r} is not allowed: {name} must be {allowed}.")


def require_equal(what: str, given: int, whose: str, wanted: int) -> None:
    """Refuse two sizes that differ."""
    if given != wanted:
        raise InvalidProblemError(f"{what} is {given}, but {whose} is {wanted}: they must be equal.")


def one_of(name: str, given: Any, allowed: tuple[str, ...]) -> None:
    """Refuse what is not one of a few words."""
    require(isinstance(given, str) and given in allowed, name, given, f"one of {', '.join(allowed)}")


def flag(name: str, value: Any) -> bool:
    """True or False; 0 and 1 pass. A text or a tensor does not: "False" would be true."""
    require(isinstance(value, (bool, int)) and value in (0, 1), name, value, "True or False")
    return bool(value)


def number(name: str, value: Any) -> float:
    """A finite number that fp32 can hold; whatever `float()` takes, except texts."""
    # A compiler's symbolic number is one of these, and is not to be asked for more.
    recorded = not isinstance(value, (int, float)) and getattr(value, "requires_grad", False)
    given = value.detach() if recorded else value  # or PyTorch would warn of what is refused below
    try:
        found = math.nan if isinstance(value, (str, bytes)) else float(given)
    except OverflowError:
        found = math.inf
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several elements
        raise InvalidProblemError(f"{name}={value!r} is a {type(value).__name__}: it must be a number.") from None
    if isinstance(value, (str, bytes)):
        raise InvalidProblemError(f"{name}={value!r} is a {type(value).__name__}: it must be a number.")
    require(abs(found) <= MAX_FLOAT32, name, value, "a finite number that fp32 can hold")
    if recorded and _records():
        raise InvalidProblemError(
            f"{name} is a tensor that wants a gradient, and numbers get none: scale q with it, or let a score_mod read it; "
            f"pass {name}.item() where no gradient is meant."
        )
    return found


def length(name: str, value: Any) -> None:
    """Refuse what is no length; a symbolic int of a compiler is one."""
    allowed = "the length of the longest sequence, an int from 0 up (of a tensor: .item())"
    symbolic = type(value).__name__ == "SymInt"
    require(symbolic or (isinstance(value, int) and not isinstance(value, bool) and value >= 0), name, value, allowed)


def window(value: Any) -> tuple[int, int]:
    """The two sides of `window_size`."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not all(isinstance(side, int) and not isinstance(side, bool) and side >= -1 for side in value):
        raise InvalidProblemError(
            f"window_size={value!r} must be a pair (left, right) of ints, each -1 (no limit) or a number of keys from 0 up."
        )
    return min(value[0], _FAR), min(value[1], _FAR)


# -- q, k and v --


def qkv(q: Any, k: Any, v: Any, layout: str, *, dims: int = 4) -> DType:
    """Tensors of `dims` dimensions, one dtype and one device; returns the dtype's name."""
    one_of("layout", layout, LAYOUTS)
    dtype = "fp32"
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not hasattr(value, "dim") or not hasattr(value, "stride"):
            raise InvalidProblemError(f"{name} is a {type(value).__name__}: it must be a torch.Tensor.")
        if str(value.layout) != "torch.strided" or value.is_nested:
            raise InvalidProblemError(
                f"{name} has layout {value.layout}{' and is nested' if value.is_nested else ''}: it must be a dense (strided) tensor. For sequences of several lengths, see "
                "flashgen.varlen_attention."
            )
        if value.dim() != dims:
            order = "batch, heads, seqlen, head_dim" if layout == "bhsd" else "batch, seqlen, heads, head_dim"
            order = order if dims == 4 else "total, heads, head_dim"
            raise InvalidProblemError(
                f"{name} has shape {tuple(value.shape)}: it must have {dims} dimensions, ({order})."
            )
        found = _DTYPE_NAMES.get(str(value.dtype))
        if found is None:
            raise InvalidProblemError(
                f"{name} has dtype {value.dtype}: allowed are {', '.join(_DTYPE_NAMES)}. Cast it."
            )
        if name == "q":
            dtype = found
        elif found != dtype:
            raise InvalidProblemError(
                f"{name} has dtype {value.dtype}, q has {q.dtype}: q, k and v must have one dtype. Cast one."
            )
        if value.device != q.device:
            raise InvalidProblemError(
                f"{name} is on {value.device}, q on {q.device}: q, k and v must be on one device. Move one."
            )
    return cast(DType, dtype)


# -- how they lie --


def tma_addressable(tensor: Tensor) -> bool:
    """Whether a TMA descriptor can express a tensor: base address and strides are multiples of 16 bytes, and none is 0.

    Dimensions of size 1 may have any stride, since it is never stepped over; the last one is not looked at.
    """
    size = tensor.element_size()
    strides = [tensor.stride(dim) * size for dim in range(tensor.dim() - 1) if tensor.shape[dim] > 1]
    try:
        address = 0 if without_values(tensor) else tensor.data_ptr()
    except (
        RuntimeError
    ):  # inside torch.func.grad or vmap a tensor has no address; the operator asks again with what it wraps
        return False
    return address % 16 == 0 and all(step > 0 and step % 16 == 0 for step in strides)


def without_values(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no memory: a meta tensor, or a fake one that stands for a GPU's."""
    return tensor.is_meta or hasattr(tensor, "fake_mode")


def is_copied(tensor: Tensor) -> bool:
    """Whether a kernel gets a copy: its last stride is not 1."""
    return tensor.stride(-1) != 1 and tensor.shape[-1] != 1


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of them now."""
    return _records() and any(tensor.requires_grad for tensor in tensors if tensor is not None)


def _records() -> bool:
    """Whether autograd is switched on."""
    import torch  # here: rendering and tuning a named problem work without it

    return torch.is_grad_enabled()


# -- packed sequences --


def packing(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqused_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
) -> int:
    """The offsets and lengths of packed sequences; returns how many sequences there are.

    Shapes, dtypes and devices are checked everywhere, values on a CPU only, or with FLASHGEN_CHECK_VALUES, which synchronises.
    """
    batch = _int32("cu_seqlens_q", cu_seqlens_q, q) - 1
    require(batch >= 0, "length of cu_seqlens_q", batch + 1, "the number of sequences plus one")
    if (other := _int32("cu_seqlens_k", cu_seqlens_k, q)) != batch + 1:
        raise InvalidProblemError(
            f"cu_seqlens_q has {batch + 1} entries, cu_seqlens_k {other}: they must be equally long, one more than there "
            "are sequences."
        )
    if seqused_k is not None:
        require_equal("length of seqused_k", _int32("seqused_k", seqused_k, q), "the number of sequences", batch)
    length("max_seqlen_q", max_seqlen_q)
    length("max_seqlen_k", max_seqlen_k)
    if q.device.type == "cpu" or (q.device.type == "cuda" and settings.read().check_values):
        packing_values(
            cu_seqlens_q.tolist(),
            cu_seqlens_k.tolist(),
            None if seqused_k is None else seqused_k.tolist(),
            (q.shape[0], k.shape[0]),
            (max_seqlen_q, max_seqlen_k),
        )
    return batch


def packing_values(
    ends_q: list[int], ends_k: list[int], used: list[int] | None, totals: tuple[int, int], longest: tuple[int, int]
) -> None:
    """The numbers themselves: offsets from 0 to the total that never fall, `used` inside its sequence, no sequence too long.

    Args:
        ends_q, ends_k: the values of cu_seqlens_q and cu_seqlens_k.
        used: the values of seqused_k.
        totals: rows of q and of k.
        longest: max_seqlen_q and max_seqlen_k.
    """
    lengths_q = _lengths("q", ends_q, totals[0])
    lengths_k = _lengths("k", ends_k, totals[1])
    if used is not None:
        for index, (count, full) in enumerate(zip(used, lengths_k, strict=True)):
            if not 0 <= count <= full:
                raise InvalidProblemError(
                    f"seqused_k[{index}]={count}, but sequence {index} has {full} keys by cu_seqlens_k: it must be from 0 to that."
                )
        lengths_k = used
    for name, most, lengths in (("max_seqlen_q", longest[0], lengths_q), ("max_seqlen_k", longest[1], lengths_k)):
        if max(lengths, default=0) > most:
            raise InvalidProblemError(
                f"{name}={most} is less than the longest sequence, {max(lengths)}: it must be at least that."
            )


def _int32(name: str, value: Any, like: Tensor) -> int:
    """A 1-d int32 tensor beside `like`; returns its length."""
    if getattr(value, "dim", lambda: 0)() != 1 or str(value.dtype) != "torch.int32" or value.device != like.device:
        given = (
            f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
            if hasattr(value, "dtype")
            else f"a {type(value).__name__}"
        )
        raise InvalidProblemError(f"{name} is {given}: it must be a 1-dimensional int32 tensor on {like.device}.")
    if value.numel() > 1 and value.stride(0) != 1:  # kernels read it as it lies
        raise InvalidProblemError(
            f"{name} has stride {value.stride(0)}: it must be contiguous; pass {name}.contiguous()."
        )
    return int(value.numel())


def _lengths(which: str, ends: list[int], total: int) -> list[int]:
    lengths = [stop - start for start, stop in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
        shown = str(ends) if len(ends) <= 12 else f"[{', '.join(map(str, ends[:6]))}, ..., {ends[-1]}]"
        raise InvalidProblemError(
            f"cu_seqlens_{which}={shown} must start at 0, never fall, and end at {total}, {which}'s number of rows. "
            f"Rows beyond the last sequence are to be cut off: {which}[:cu_seqlens_{which}[-1]]."
        )
    return lengths


# -- operands --


def generator(value: Any, device: Any) -> None:
    """A torch.Generator of the device, or None; where no seed will be drawn (device None) any device's will do."""
    if value is None:
        return
    if not hasattr(value, "device") or not hasattr(value, "manual_seed"):
        raise InvalidProblemError(
            f"generator={value!r} is a {type(value).__name__}: it must be a torch.Generator or None."
        )
    if device is not None and value.device.type != device.type:
        raise InvalidProblemError(
            f"generator is on {value.device}, q on {device}: make it there, torch.Generator(device={device.type!r})."
        )


def operand(name: str, value: Tensor) -> None:
    """The layout and dtype of an optional tensor: dense, floating, alibi_slopes float32, attn_mask bool."""
    if str(value.layout) != "torch.strided" or value.is_nested:
        raise InvalidProblemError(
            f"{name} has layout {value.layout}: it must be a dense (strided) tensor: .to_dense()."
        )
    if name == "attn_mask":
        if str(value.dtype) != "torch.bool":
            raise InvalidProblemError(
                f"attn_mask has dtype {value.dtype}: it must be torch.bool (True = may attend). "
                "An additive float mask goes into `bias`."
            )
    elif not value.is_floating_point():
        raise InvalidProblemError(f"{name} has dtype {value.dtype}: it must be a floating-point tensor. Cast it.")
    elif name == "alibi_slopes" and str(value.dtype) != "torch.float32":
        raise InvalidProblemError(
            f"alibi_slopes has dtype {value.dtype}: it must be torch.float32, as in FlashAttention. Cast it: .float()."
        )


def shape(name: str, value: Tensor, allowed: list[tuple[int, ...]]) -> None:
    """Refuse every shape but a few."""
    if tuple(value.shape) not in allowed:
        raise InvalidProblemError(
            f"{name} has shape {tuple(value.shape)}: it must be {' or '.join(map(str, allowed))}."
        )


def broadcasts(name: str, value: Tensor, scores: tuple[int, ...]) -> None:
    """Refuse what does not broadcast, right-aligned, to the scores."""
    tail = scores[len(scores) - value.dim() :] if value.dim() <= 4 else ()
    if value.dim() > 4 or any(size not in (1, full) for size, full in zip(value.shape, tail, strict=True)):
        raise InvalidProblemError(
            f"{name} has shape {tuple(value.shape)}: it must broadcast to (batch, num_heads_q, seqlen_q, seqlen_k) = {scores}, "
            "right-aligned, in either layout."
        )


_BLOCK_MASK = (
    "BLOCK_SIZE",
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "mask_mod",
    "seq_lengths",
)


def is_block_mask(mask: Any) -> None:
    """A BlockMask, whatever for."""
    for name in _BLOCK_MASK:
        if not hasattr(mask, name):
            raise InvalidProblemError(
                f"block_mask is a {type(mask).__name__}: it must be a torch.nn.attention.flex_attention.BlockMask, from "
                "create_block_mask()."
            )


def block_mask(mask: Any, scores: tuple[int, int, int, int], device: Any) -> None:
    """A BlockMask for these scores (batch, num_heads_q, seqlen_q, seqlen_k)."""
    is_block_mask(mask)
    counts = mask.kv_num_blocks
    if counts.device != device:
        raise InvalidProblemError(
            f"block_mask is on {counts.device}, q on {device}: they must be on one device. Move it: block_mask.to(...)."
        )
    batch, heads = counts.shape[:2] if counts.dim() == 3 else (0, 0)
    if batch not in (1, scores[0]) or heads not in (1, scores[1]):
        raise InvalidProblemError(
            f"block_mask was made for batch {batch} and {heads} heads, the call has batch {scores[0]} and {scores[1]} query "
            "heads: each must be equal or 1. Make it with B=None, H=None to share it."
        )
    if tuple(mask.seq_lengths) != scores[2:]:
        raise InvalidProblemError(
            f"block_mask was made for Q_LEN, KV_LEN = {tuple(mask.seq_lengths)}, the call has {scores[2:]}: they must be "
            "equal. Make it for these lengths."
        )


# From here on the rounding of lse changes a row's probabilities by more than rounding them to bf16 does.
_LARGEST_LSE = float(1 << 17)


def row_sums(dout: Tensor | None, dlse: Tensor | None, lse: Tensor, layout: str) -> None:
    """Refuse to differentiate rows whose lse is too large to hold the sum of their scores, where a gradient reaches them; synchronises.

    Args:
        dout, dlse: gradients of out and of lse (batch, num_heads_q, seqlen_q), of packed sequences (num_heads_q, total_q).
        lse: as the forward wrote it.
        layout: of dout.

    Raises:
        UnsupportedProblemError: says how large it is, and what does differentiate them.
    """
    if without_values(lse):
        return
    large = (lse.abs() > _LARGEST_LSE) & lse.isfinite()
    if not large.any():
        return
    reached = large.new_zeros(large.shape)
    if dout is not None:
        rows = (dout != 0).any(-1)  # NaN too
        reached |= rows.mT if rows.dim() == 2 or layout == "bshd" else rows
    if dlse is not None:
        reached |= dlse != 0
    if (large & reached).any():
        raise UnsupportedProblemError(
            f"a row's scores are as large as {lse[large & reached].abs().max():.3g}: its lse, one fp32 number, no longer holds their sum, and the "
            "gradients of a generated kernel would be NaN. Hide keys with a mask or a bias of -inf instead of a huge negative number, "
            "scale q and k, or take backend='torch', which sums such rows anew."
        )
