"""A transformer's training step on a tape: which tensors each operation makes, saves and frees, as PyTorch's eager mode does.

The model is the plain one: token embedding, `layers` times [norm, q/k/v projection, attention, output projection, residual, norm, MLP, residual],
norm, output projection, cross entropy in fp32. Projections have no bias, norms keep mean and reciprocal deviation in fp32, rotary embeddings keep
nothing (their factors are constants), and dropout, where there is some, follows Megatron's places: probabilities, attention's result, the MLP's.

What is saved is what Korthikanti et al. (Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198) count in section 4.1:
all in 16 bit, a GELU MLP of 4 h and dropout give their equation 1, s b h (34 + 5 a s / h) bytes a layer, and a checkpointed layer the 2 s b h of its
input (section 5); `tests/unit/test_memory_training.py` holds the walk to both. Flash attention keeps out and lse (fp32) in place of everything that
is a s / h (FlashAttention, arXiv 2205.14135, section 3.1, "recomputation").
"""

from __future__ import annotations

from collections.abc import Callable

from flashgen.memory.strategy import Shape, Strategy
from flashgen.memory.tape import Buffer, Node, Tape, Value

_FP32, _INT64, _BOOL = 4, 8, 1


class Transformer:
    """The model on a tape. Parameters are leaves without storage here: `training` counts what lies there before a step."""

    def __init__(self, tape: Tape, shape: Shape, strategy: Strategy) -> None:
        self.tape, self.shape, self.strategy = tape, shape, strategy
        self.parameters: dict[str, Value] = {}
        self._casts: dict[str, Value] = {}  # autocast's cache of weights, until its region ends

    # -- parameters --

    def parameter(self, name: str, numel: int) -> Value:
        """A leaf; its storage has size 0, since it is there before the step and after it."""
        if name not in self.parameters:
            leaf = Node(-1, (), (), None)
            self.parameters[name] = Value(self.tape.new("", 0), self.strategy.weight_size, leaf)
        return self.parameters[name]

    def leave_autocast(self) -> None:
        """The region ends, and with it the cache: copies that nothing saved are freed."""
        self._casts = {}

    # -- operations --

    def cast(self, x: Value, itemsize: int, numel: int | None = None) -> Value:
        """X in another precision: x itself where it is in it."""
        if x.itemsize == itemsize:
            return x
        count, before = x.numel if numel is None else numel, x.itemsize
        return self.tape.op(
            "cast", [x], count, itemsize, lambda _: [self.tape.new("gradient, cast back", count * before)]
        )

    def linear(self, name: str, x: Value, width_in: int, width_out: int) -> Value:
        """A projection of every token, in the compute dtype."""
        size, rows = self.strategy.compute_size, x.numel // width_in
        if x.itemsize != size:
            x = self.cast(x, size)
            x.buffer.name = "normed"
        weight = self.parameter(name, width_in * width_out)
        if weight.itemsize != size:
            if name not in self._casts:
                copy = self.cast(weight, size, width_in * width_out)
                copy.buffer.name = "weights, cast"
                self._casts[name] = copy
            weight = self._casts[name]
        new = self.tape.new

        def backward(_: Buffer) -> list[Buffer]:
            return [
                new("gradient of activations", rows * width_in * size),
                new("gradient of weights", width_in * width_out * size),
            ]

        return self.tape.op(name, [x, weight], rows * width_out, size, backward, saves=[x, weight])

    def norm(self, name: str, x: Value) -> Value:
        """A norm over each token's columns, in the dtype of x, with statistics in fp32."""
        hidden, rows = self.shape.hidden, self.shape.rows
        gain = self.parameter(name, hidden)
        statistics = self.tape.new("norm statistics", 2 * _FP32 * rows)
        size, numel, new = x.itemsize, x.numel, self.tape.new
        return self.tape.op(
            "normed", [x, gain], numel, size,
            lambda _: [new("gradient of activations", numel * size), new("gradient of weights", 2 * hidden * size)],
            saves=[x, statistics],
        )  # fmt: skip

    def pointwise(self, name: str, x: Value, *, saves_input: bool = False, inputs: int = 1) -> Value:
        """An elementwise operation with one result; `inputs` > 1: x holds that many operands side by side."""
        size, numel, new = x.itemsize, x.numel, self.tape.new
        return self.tape.op(
            name, [x], numel // inputs, size, lambda _: [new("gradient of activations", numel * size)],
            saves=[x] if saves_input else [],
        )  # fmt: skip

    def dropout(self, name: str, x: Value) -> Value:
        """Dropout with a mask of a byte an element; x itself where there is none."""
        if not self.strategy.dropout:
            return x
        size, numel, new = x.itemsize, x.numel, self.tape.new
        mask = new(f"{name}: mask", numel * _BOOL)
        return self.tape.op(name, [x], numel, size, lambda _: [new("gradient", numel * size)], saves=[mask])

    def add(self, x: Value, y: Value) -> Value:
        """The residual sum; both gradients are the one that comes."""
        y_size, numel, new = y.itemsize, y.numel, self.tape.new

        def backward(grad: Buffer) -> list[Buffer]:
            return [grad, grad if y_size == x_size else new("gradient, cast back", numel * y_size)]

        x_size = x.itemsize
        return self.tape.op("residual", [x, y], numel, x_size, backward)

    # -- attention --

    def flash(self, qkv: Value) -> Value:
        """Saves q, k and v (views of one storage), out and lse."""
        s, size, new, work = self.shape, self.strategy.compute_size, self.tape.new, self.strategy.workspace
        lse = new("lse", _FP32 * s.batch * s.heads_q * s.seqlen)
        out_numel, qkv_bytes = s.rows * s.attention_width, qkv.buffer.size

        def backward(_: Buffer) -> list[Buffer]:
            while_it_runs = new("workspace", work.backward)
            grads = new("gradients of q, k and v", qkv_bytes)
            del while_it_runs
            # They are three tensors, and the split's backward stacks them into one.
            return [new("gradient of q, k and v, stacked", grads.size)]

        out = self.tape.op("out", [qkv], out_numel, size, backward, saves=[qkv, lse], saves_result=True)
        while_it_runs = new("workspace", work.forward)
        del while_it_runs
        return out

    def materialised(self, qkv: Value) -> Value:
        """Eager attention: scale and mask after the product, softmax in fp32, its result cast back to the values' dtype.

        Products want their operands contiguous by head and copy them; the copies are what is saved, and the projection's result dies.
        """
        s, size, new = self.shape, self.strategy.compute_size, self.tape.new
        q_numel, kv_numel = s.rows * s.attention_width, s.rows * s.heads_kv * s.head_dim
        width, qkv_bytes = self.strategy.softmax_size, qkv.buffer.size

        # Gradients of q, k and v meet here and are stacked.
        split = Value(
            qkv.buffer,
            size,
            self.tape.node([qkv], [], lambda _: [new("gradient of q, k and v, stacked", qkv_bytes)]),
        )
        copy_q = self.tape.op("q", [split], q_numel, size, lambda grad: [grad])
        copy_k = self.tape.op("k", [split], kv_numel, size, lambda grad: [grad])

        def backward_scores(_: Buffer) -> list[Buffer]:
            return [new("gradient of q", q_numel * size), new("gradient of k", kv_numel * size)]

        scores = self.tape.op("scores", [copy_q, copy_k], s.pairs, size, backward_scores, saves=[copy_q, copy_k])
        del copy_q, copy_k
        scores = self.pointwise("scores, scaled", scores)
        if s.softcap:
            scores = self.pointwise("scores, divided by the cap", scores)
            scores = self.tape.op(
                "tanh",
                [scores],
                s.pairs,
                size,
                lambda _: [new("gradient of scores", s.pairs * size)],
                saves_result=True,
            )
            scores = self.pointwise("scores, capped", scores)
        scores = self.tape.op("scores, masked", [scores], s.pairs, size, lambda grad: [grad])
        wide = self.cast(scores, width)
        del scores
        on_cuda = self.strategy.device == "cuda"

        def backward_softmax(_: Buffer) -> list[Buffer]:
            product = new("gradient times probabilities", s.pairs * width if on_cuda else 0)
            grads = [new("gradient of scores", s.pairs * width)]
            del product
            return grads

        probabilities = self.tape.op("probabilities", [wide], s.pairs, width, backward_softmax, saves_result=True)
        del wide
        narrow = self.cast(probabilities, size)
        if narrow is not probabilities:
            narrow.buffer.name = "probabilities, cast"
        narrow = self.dropout("probabilities, dropped", narrow)
        copy_v = self.tape.op("v", [split], kv_numel, size, lambda grad: [grad])

        def backward_values(_: Buffer) -> list[Buffer]:
            contiguous = new("gradient of out, by head", q_numel * size)
            grads = [new("gradient of probabilities", s.pairs * size), new("gradient of v", kv_numel * size)]
            del contiguous
            return grads

        by_head = self.tape.op("out, by head", [narrow, copy_v], q_numel, size, backward_values, saves=[narrow, copy_v])
        return self.tape.op("out", [by_head], q_numel, size, lambda grad: [grad])

    # -- the model --

    def attention(self, x: Value, layer: int) -> Value:
        """Norm, projections and attention; without the residual."""
        s = self.shape
        qkv = self.linear(f"{layer} qkv", self.norm(f"{layer} norm 1", x), s.hidden, s.qkv_width)
        qkv.buffer.name = "q, k and v"
        attend = self.flash if self.strategy.attention == "flash" else self.materialised
        out = attend(qkv)
        del qkv
        y = self.linear(f"{layer} proj", out, s.attention_width, s.hidden)
        return self.dropout("attention, dropped", y)

    def mlp(self, x: Value, layer: int) -> Value:
        """Norm, up, activation, down; without the residual."""
        s = self.shape
        columns = 2 * s.mlp_width if s.gated else s.mlp_width
        up = self.linear(f"{layer} up", self.norm(f"{layer} norm 2", x), s.hidden, columns)
        up.buffer.name = "gate and up" if s.gated else "up"
        if s.gated:
            active = self.gate(up)
        else:
            active = self.pointwise("active", up, saves_input=True)
        del up
        return self.dropout("mlp, dropped", self.linear(f"{layer} down", active, s.mlp_width, s.hidden))

    def gate(self, up: Value) -> Value:
        """act(gate) * up: keeps both halves and act(gate)."""
        size, numel, new = up.itemsize, up.numel // 2, self.tape.new
        acted = new("gate, activated", numel * size)

        def backward(_: Buffer) -> list[Buffer]:
            halves = new("gradients of gate and up", 2 * numel * size)
            inner = new("gradient of the activated gate", numel * size)
            del inner
            return [halves]

        return self.tape.op("active", [up], numel, size, backward, saves=[up, acted])

    def layer(self, x: Value, number: int) -> Value:
        """One block."""
        x = self.add(x, self.attention(x, number))
        return self.add(x, self.mlp(x, number))

    def checkpointed(self, function: Callable[[Value], Value], x: Value) -> Value:
        """Run without saving; in the backward run again, saving, and differentiate that.

        torch stops the second run at the last tensor that is needed; what comes after it here, the last product's result, is freed before
        anything larger is made.
        """
        before, self.tape.keeps = self.tape.keeps, False
        try:
            result = function(x)
        finally:
            self.tape.keeps = before
        buffer, size = x.buffer, x.itemsize

        def backward(grad: Buffer) -> list[Buffer | None]:
            outer, self._casts = self._casts, {}
            leaf = Node(-1, (), (), None)
            again = function(Value(buffer, size, leaf))
            self._casts = outer
            again = Value(self.tape.new("", 0), again.itemsize, again.node)
            self.tape.run_backward(again, grad)
            return [leaf.grad]

        return Value(result.buffer, result.itemsize, self.tape.node([x], [x.buffer], backward))

    def run_layer(self, x: Value, number: int) -> Value:
        """One block, checkpointed where the strategy says so."""
        if self.strategy.checkpoint:
            return self.checkpointed(lambda one: self.layer(one, number), x)
        return self.layer(x, number)

    def stream(self) -> Value:
        """The residual stream as an input that wants a gradient."""
        size = self.strategy.weight_size
        return Value(self.tape.new("input", self.shape.rows * self.shape.hidden * size), size, Node(-1, (), (), None))

    def embed(self) -> Value:
        """Tokens (and positions) as rows of the residual stream; a leaf where there is no vocabulary."""
        s, size, new = self.shape, self.strategy.weight_size, self.tape.new
        numel = s.rows * s.hidden
        if not s.vocab:
            return self.stream()
        table = self.parameter("embedding", s.vocab * s.hidden)
        tokens = new("tokens", _INT64 * s.rows)
        x = self.tape.op(
            "embedded", [table], numel, size,
            lambda _: [new("gradient of weights", s.vocab * s.hidden * size)], saves=[tokens],
        )  # fmt: skip
        if not s.positions:
            return x
        position_table = self.parameter("positions", s.positions * s.hidden)
        ids = new("positions", _INT64 * s.seqlen)
        position = self.tape.op(
            "positions, embedded", [position_table], s.seqlen * s.hidden, size,
            lambda _: [new("gradient of weights", s.positions * s.hidden * size)], saves=[ids],
        )  # fmt: skip

        def backward(grad: Buffer) -> list[Buffer]:
            return [grad, new("gradient of positions", s.seqlen * s.hidden * size)]

        return self.tape.op("embedded", [x, position], numel, size, backward)

    def head(self, x: Value) -> Value:
        """Norm and output projection."""
        s = self.shape
        return self.linear("head", self.norm("norm", x), s.hidden, s.vocab)

    def loss(self, logits: Value) -> Value:
        """Cross entropy in fp32: keeps log-probabilities."""
        numel, new = logits.numel, self.tape.new
        targets = new("targets", _INT64 * self.shape.rows)
        wide = self.cast(logits, _FP32)
        del logits
        log_p = self.tape.op(
            "log-probabilities", [wide], numel, _FP32, lambda _: [new("gradient of logits", numel * _FP32)],
            saves_result=True,
        )  # fmt: skip
        return self.tape.op(
            "loss", [log_p], 1, _FP32, lambda _: [new("gradient of log-probabilities", numel * _FP32)], saves=[log_p, targets],
        )  # fmt: skip
