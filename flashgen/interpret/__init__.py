"""Run a rendered kernel on CPU tensors, in the simulator (Gluon) or in Triton's interpreter: slow, for checking.

Interpretation happens in one long-lived worker process that sets TRITON_INTERPRET before importing triton; this process
never imports triton, since interpreting and compiling in one process breaks both. Tensors travel through a shared
anonymous file with their strides. Everything in that file that is no input is NaN before a launch, and what is no
output must be unchanged after it: a kernel that writes where it must not is found out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashgen.build import write_source
from flashgen.errors import BuildError, InvalidProblemError
from flashgen.interpret.process import running_worker, shutdown, state, worker_pid
from flashgen.render import KernelSource
from flashgen.simulator import simulate
from flashgen.variants import REGISTRY

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["launch", "launch_backward", "launch_of", "shutdown", "worker_pid"]


def launch(
    source: KernelSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    **values: Any,
) -> None:
    """Run the `launch` function of a rendered kernel without a GPU.

    A Gluon kernel runs in this process, in the simulator; any other in the interpreting worker, which is started if need be.

    Thread-safe: one launch at a time. The first call of a process takes a second or two for the worker to import torch
    and triton.

    Args:
        source: the rendered kernel.
        q, k, v, o, lse: CPU tensors as the rendered launch takes them; results are copied into o and lse. If the
            kernel leaves an element of them alone it becomes NaN.
        **values: numbers, tunables and further tensors, as the rendered launch takes them.

    Raises:
        InvalidProblemError: a tensor is not on the CPU.
        BuildError: the worker cannot start; the kernel raised (its line is in the message), crashed the worker, or
            wrote outside its outputs. o and lse are untouched then, and the next call works again.
        SimulationError: the simulator found a defect.

    """
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse}
    _run(source, tensors, ("o", "lse"), values)


def launch_backward(
    source: KernelSource,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    **values: Any,
) -> None:
    """Run the `launch` function of a rendered backward in the interpreting worker; as `launch`, into dq, dk and dv.

    Args:
        source: the rendered kernels.
        dout, dlse, q, k, v, out, lse, dq, dk, dv: CPU tensors as the rendered launch takes them.
        **values: numbers, tunables and further tensors, as the rendered launch takes them; dsinks, dbias and
            those of captured tensors are written too.

    Raises:
        InvalidProblemError, BuildError: as `launch`.

    """
    tensors = {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    sums = tuple(name for name in values if name in ("dsinks", "dbias") or name.startswith("dcaptured_"))
    _run(source, tensors, ("dq", "dk", "dv", *sums), values)


def launch_of(source: KernelSource) -> Callable[..., None]:
    """`launch` or `launch_backward`, whichever the rendered kernel is for."""
    return launch_backward if source.spec.op == "attention_bwd" else launch


def _run(
    source: KernelSource, tensors: dict[str, Tensor | None], outputs: tuple[str, ...], values: dict[str, Any]
) -> None:
    import torch

    tensors = tensors | {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}
    values = {name: x for name, x in values.items() if name not in tensors}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device.type != "cpu":
            raise InvalidProblemError(f"{name} is on {tensor.device}: the interpreter takes CPU tensors only.")
    if _in_gluon(source):
        simulate(source, {**tensors, **values})
        return
    path = str(write_source(source))
    with state.lock:
        worker = running_worker()
        try:
            worker.launch(source.name, path, tensors, outputs, values)
        except BuildError:
            raise
        except BaseException:  # Ctrl-C among them: an answer nobody waits for must not meet the next question
            worker.stop()
            raise


def _in_gluon(source: KernelSource) -> bool:
    """Whether a file is Gluon's; a text of no known variant is taken for plain Triton."""
    return any(variant.name == source.variant and variant.backend == "gluon" for variant in REGISTRY)
