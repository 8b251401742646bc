"""flashgen: an autotuned generator of exact attention kernels. Start with `flashgen.attention`.

Public names load on first use (PEP 562), so that rendering, the store and the compiling workers run without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashgen.api import (
        attention,
        decode_attention,
        explain,
        varlen_attention,
    )
    from flashgen.block_lists import reread_block_mask
    from flashgen.config import KernelConfig
    from flashgen.dispatch import Plan
    from flashgen.errors import (
        AccuracyError,
        BuildError,
        DatabaseError,
        FlashgenError,
        InvalidProblemError,
        RenderError,
        SchemaVersionError,
        TuningError,
        UnsupportedProblemError,
    )
    from flashgen.merging import merge_attention_states
    from flashgen.offline import compile_facts, export, tune
    from flashgen.problem import Problem
    from flashgen.spec import AttentionSpec
    from flashgen.target import Target

__version__ = "0.1.0"

__all__ = [
    "AccuracyError",
    "AttentionSpec",
    "BuildError",
    "DatabaseError",
    "FlashgenError",
    "InvalidProblemError",
    "KernelConfig",
    "Plan",
    "Problem",
    "RenderError",
    "SchemaVersionError",
    "Target",
    "TuningError",
    "UnsupportedProblemError",
    "__version__",
    "attention",
    "compile_facts",
    "decode_attention",
    "explain",
    "export",
    "merge_attention_states",
    "reread_block_mask",
    "tune",
    "varlen_attention",
]

_HOME = {
    "AttentionSpec": "spec",
    "KernelConfig": "config",
    "Plan": "dispatch",
    "Problem": "problem",
    "Target": "target",
    "merge_attention_states": "merging",
    "reread_block_mask": "block_lists",
    **dict.fromkeys(("compile_facts", "export", "tune"), "offline"),
    **{name: "errors" for name in __all__ if name.endswith("Error")},
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flashgen' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"flashgen.{_HOME.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
