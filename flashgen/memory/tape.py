"""A training step without numbers: storages with sizes, and a reverse-mode tape that makes and frees them as PyTorch does.

A `Buffer` counts from its making until nothing refers to it, and that is literal: the walk holds buffers in the variables in which a
model holds tensors, so a temporary of the walk dies where the model's dies. The tape keeps what a node saves until the node has run backward,
runs nodes in PyTorch's order (the youngest that is ready) and adds gradients up in place.

Nothing is rounded to an allocator's granularity and no pool is counted: the peak is what is asked for, all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


class Heap:
    """What is alive, and the most that ever was, in bytes."""

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0

    def add(self, size: int) -> None:
        """A storage is made (or freed, where size is negative)."""
        self.alive += size
        self.peak = max(self.peak, self.alive)


class Buffer:
    """A storage of `size` bytes, alive while something refers to it."""

    __slots__ = ("_heap", "name", "size")

    def __init__(self, heap: Heap, name: str, size: int) -> None:
        self.name, self.size, self._heap = name, size, heap
        heap.add(size)

    def __del__(self) -> None:
        self._heap.add(-self.size)


# From the gradient of a node's output to those of its inputs, in order; None where an input wants none.
Backward = Callable[[Buffer], Sequence["Buffer | None"]]


@dataclass(slots=True, eq=False)
class Node:
    """What autograd remembers of one operation."""

    number: int
    inputs: tuple[Node | None, ...]
    saved: tuple[Buffer, ...]
    backward: Backward | None
    grad: Buffer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of the walk: its storage, the bytes of an element, and where it comes from."""

    buffer: Buffer
    itemsize: int
    node: Node | None = None

    @property
    def numel(self) -> int:
        """Elements of the storage."""
        return self.buffer.size // self.itemsize


@dataclass(slots=True)
class Tape:
    """Operations in order, and what they keep for the backward.

    Attributes:
        heap: where buffers are counted.
        keeps: whether nodes save anything; off while a checkpointed function runs forward.
        kept: every node that saves something and has not run backward, by number.
    """

    heap: Heap = field(default_factory=Heap)
    keeps: bool = True
    kept: dict[int, Node] = field(default_factory=dict)
    _number: int = 0

    def new(self, name: str, size: int) -> Buffer:
        """A fresh storage."""
        return Buffer(self.heap, name, size)

    def op(
        self,
        name: str,
        inputs: Sequence[Value],
        numel: int,
        itemsize: int,
        backward: Backward,
        *,
        saves: Sequence[Value | Buffer] = (),
        saves_result: bool = False,
    ) -> Value:
        """One differentiable operation: makes its result, and saves what its backward reads.

        Args:
            name: of the result.
            inputs: in the order of the gradients that `backward` gives.
            numel, itemsize: of the result.
            backward: makes the inputs' gradients; what it needs of `saves` it gets by being alive as long as they are.
            saves: kept until the backward has run.
            saves_result: whether the result is kept as well (softmax, attention).
        """
        result = self.new(name, numel * itemsize)
        buffers = tuple(x.buffer if isinstance(x, Value) else x for x in saves)
        if saves_result:
            buffers += (result,)
        return Value(result, itemsize, self.node(inputs, buffers, backward))

    def node(self, inputs: Sequence[Value], saved: Sequence[Buffer], backward: Backward) -> Node:
        """The tape's side of an operation whose result exists already, a view for example."""
        self._number += 1
        made = Node(self._number, tuple(x.node for x in inputs), tuple(saved) if self.keeps else (), backward)
        if made.saved:
            self.kept[made.number] = made
        return made

    @property
    def saved(self) -> dict[int, Buffer]:
        """The different storages that are kept, by identity."""
        return {id(buffer): buffer for node in self.kept.values() for buffer in node.saved}

    def run_backward(self, result: Value, grad: Buffer) -> None:
        """Differentiate: afterwards nothing is kept, and leaves hold their gradients."""
        if result.node is None:
            return
        result.node.grad = grad
        del grad
        ready = {result.node.number: result.node}
        while ready:
            # Inputs are older than results: when the youngest runs, all who give to it have run.
            node = ready.pop(max(ready))
            self._run(node, ready)

    def _run(self, node: Node, ready: dict[int, Node]) -> None:
        grad, node.grad = node.grad, None
        if grad is None or node.backward is None:
            node.grad = grad  # a leaf's stays
            return
        grads = list(node.backward(grad))
        if node.saved:
            del self.kept[node.number]
            node.saved = ()
        node.backward = grad = None
        for giver in reversed(range(len(grads))):
            one, target = grads.pop(), node.inputs[giver]
            if one is None or target is None:
                continue
            if target.grad is None:
                target.grad = one  # a second one is added in place, and dies
            if target.backward is not None:
                ready[target.number] = target
