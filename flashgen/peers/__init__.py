"""Other implementations of attention, as contestants of `flashgen bench`; none of them is a dependency.

Each is a small class (`base.Peer`) that loads its library when it is asked to and says why where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashgen.errors import InvalidProblemError
from flashgen.peers.base import OPS, BenchOp, Peer, Tensors
from flashgen.peers.flash_attn import FlashAttention2, FlashAttention3, FlashAttention4
from flashgen.peers.flex import Flex
from flashgen.peers.own import Flashgen
from flashgen.peers.sdpa import SdpaCudnn, SdpaEfficient, SdpaFlash, SdpaMath

PEERS: tuple[type[Peer], ...] = (
    SdpaFlash,
    SdpaCudnn,
    SdpaEfficient,
    SdpaMath,
    Flex,
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
)
NAMES = tuple(peer.name for peer in PEERS)


def choose(names: Sequence[str]) -> list[Peer]:
    """Peers by name; `all` stands for every one.

    Raises:
        InvalidProblemError: a name is not known; the message lists those that are.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name != "all" and name not in known:
            raise InvalidProblemError(f"peer {name!r} is not known: allowed are all, {', '.join(NAMES)}.")
    return [peer() for peer in PEERS if "all" in names or peer.name in names]


__all__ = ["NAMES", "OPS", "PEERS", "BenchOp", "Flashgen", "Peer", "Tensors", "choose"]
