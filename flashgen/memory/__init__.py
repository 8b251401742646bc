"""What attention costs in memory and traffic, counted: our tiles against materialised attention, and what training keeps.

`account(problem, tile=..., target=...)` counts one layer's attention; `of_model(preset, seqlen, target)` every kind of a model's layers.
`step(shape, strategy)` walks a whole training step of a transformer; `training_of(preset)` that of a model.
Nothing here is measured, and nothing is a time.
"""

from __future__ import annotations

from flashgen.memory.account import Account, Flash, Materialised, Pass, Tile, account
from flashgen.memory.model import LayerAccount, ModelAccount, of_model
from flashgen.memory.strategy import PRECISIONS, Precision, Shape, Strategy, Workspace
from flashgen.memory.trained_model import ModelTraining, Way, training_of
from flashgen.memory.training import OPTIMIZERS, PARTS, Kept, Optimizer, Step, layer, parameters, step
from flashgen.memory.units import size
from flashgen.memory.workspace import fused_kernels, torch_backend

__all__ = [
    "OPTIMIZERS",
    "PARTS",
    "PRECISIONS",
    "Account",
    "Flash",
    "Kept",
    "LayerAccount",
    "Materialised",
    "ModelAccount",
    "ModelTraining",
    "Optimizer",
    "Pass",
    "Precision",
    "Shape",
    "Step",
    "Strategy",
    "Tile",
    "Way",
    "Workspace",
    "account",
    "fused_kernels",
    "layer",
    "of_model",
    "parameters",
    "size",
    "step",
    "torch_backend",
    "training_of",
]
