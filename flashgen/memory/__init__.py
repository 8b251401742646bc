"""What attention costs in memory and traffic, counted: our tiles against materialised attention.

`account(problem, tile=..., target=...)` counts one layer; `of_model(preset, seqlen, target)` every kind of a model's layers.
Nothing here is measured, and nothing is a time.
"""

from __future__ import annotations

from flashgen.memory.account import Account, Flash, Materialised, Pass, Tile, account
from flashgen.memory.model import LayerAccount, ModelAccount, of_model
from flashgen.memory.units import size

__all__ = [
    "Account",
    "Flash",
    "LayerAccount",
    "Materialised",
    "ModelAccount",
    "Pass",
    "Tile",
    "account",
    "of_model",
    "size",
]
