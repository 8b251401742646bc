"""A training step counted: against the published formula, by hand, and against what torch keeps, allocates and multiplies."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import flashgen
from flashgen.errors import InvalidProblemError, UnsupportedProblemError
from flashgen.memory import (
    Shape,
    Strategy,
    Workspace,
    fused_kernels,
    layer,
    parameters,
    step,
    torch_backend,
    training_of,
)
from flashgen.memory.tape import Tape, Value
from flashgen.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PLAIN = sorted(name for name, model in PRESETS.items() if model.mlp_width is not None)


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape(**changes: Any) -> Shape:
    sizes = {
        "batch": 2, "seqlen": 32, "hidden": 48, "heads_q": 4, "heads_kv": 4, "head_dim": 12, "mlp_width": 192, "layers": 2,
        "vocab": 40, "positions": 32, "causal": True,
    }  # fmt: skip
    return Shape(**{**sizes, **changes})


def total(one: Shape, **strategy: Any) -> int:
    return sum(kept.size for kept in layer(one, Strategy(**strategy)))


# -- the published formula --


@pytest.mark.parametrize(("s", "b", "h", "a"), [(64, 3, 128, 8), (2048, 1, 12288, 96), (7, 2, 24, 3)])
def test_a_layer_is_korthikantis(s: int, b: int, h: int, a: int) -> None:
    """ArXiv 2205.05198: equation 1, s b h (34 + 5 a s / h), and 2 s b h where everything is recomputed; they leave out norms' statistics."""
    one = shape(batch=b, seqlen=s, hidden=h, heads_q=a, heads_kv=a, head_dim=h // a, mlp_width=4 * h)
    statistics = 2 * 2 * 4 * s * b
    materialised = {"attention": "materialised", "precision": "16bit", "dropout": True}
    assert total(one, **materialised) - statistics == s * b * h * 34 + 5 * a * s * s * b
    assert total(one, **materialised, checkpoint=True) == 2 * s * b * h
    # Flash attention is their selective recomputation, which leaves s b h 34, with lse beside.
    assert total(one, attention="flash", precision="16bit", dropout=True) - statistics == s * b * h * 34 + 4 * a * s * b


def test_mixed_precision_by_hand() -> None:
    """Autocast: residuals and statistics in fp32, weights a second time in 16 bit, scores in fp32 and 16 bit."""
    one = shape()
    rows, pairs, h = 64, 2 * 4 * 32 * 32, 48
    kept = {one.name: one.size for one in layer(one, Strategy(attention="materialised"))}
    assert kept["input"] == kept["residual"] == 4 * rows * h
    assert kept["normed"] == 2 * 2 * rows * h
    assert kept["weights, cast"] == 2 * 12 * h * h
    assert (kept["probabilities"], kept["probabilities, cast"]) == (4 * pairs, 2 * pairs)
    assert kept["q"] == kept["k"] == kept["v"] == kept["out"] == 2 * rows * h
    flash = {one.name: one.size for one in layer(one, Strategy(attention="flash"))}
    assert {"q, k and v", "out", "lse"} <= set(flash) and not any("probabilities" in name for name in flash)
    assert flash["q, k and v"] == 3 * 2 * rows * h and flash["lse"] == 4 * 2 * 4 * 32


# -- the tape --


def test_storages_live_as_long_as_somebody_holds_them() -> None:
    tape = Tape()
    x = Value(tape.new("x", 100), 4)
    y = tape.op("y", [x], 10, 4, lambda _: [None], saves=[x])
    assert (tape.heap.alive, tape.heap.peak) == (140, 140)
    del x
    assert tape.heap.alive == 140, "y's backward needs x"
    assert [one.name for one in tape.saved.values()] == ["x"]
    tape.run_backward(y, tape.new("gradient", 40))
    assert tape.saved == {} and tape.heap.alive == 40 and tape.heap.peak == 180
    del y
    assert tape.heap.alive == 0


def test_a_step_leaves_the_gradients_and_nothing_else() -> None:
    one = shape()
    for strategy in (Strategy(), Strategy(attention="materialised", checkpoint=True, precision="fp32", dropout=True)):
        counted = step(one, strategy)
        assert counted.gradients == counted.parameters == 4 * parameters(one)
        assert counted.saved < counted.peak and counted.peak > counted.gradients


def test_the_cuda_softmax_takes_an_array_more() -> None:
    """Seen on one H200: a peak of 8.75 GiB where the count without it was 7.75, with scores of 1 GiB; nothing is saved."""
    one = shape(layers=1, vocab=0, seqlen=512)
    cpu, cuda = (step(one, Strategy(attention="materialised", device=device)) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    assert cuda.peak == cpu.peak + 4 * one.pairs and cuda.saved == cpu.saved


def test_more_workspace_is_a_higher_peak() -> None:
    one = shape()
    assert step(one, Strategy(workspace=Workspace(backward=10**9))).peak > 10**9 > step(one, Strategy()).peak


# -- against torch --


def torch_layer(one: Shape, strategy: Strategy, weights: dict[str, Tensor]) -> Tensor:
    """What `transformer` counts, in torch, with every option: grouped heads, a gate, a softcap, dropout."""

    def project(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, weights[name])

    def drop(x: Tensor) -> Tensor:
        # Its CPU code keeps the mask in the dtype of x, this one a byte an element on every device.
        return torch.native_dropout(x, 0.1, True)[0] if strategy.dropout else x

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (one.hidden,), weights[name], weights[name + " offset"])

    def attend(qkv: Tensor) -> Tensor:
        group = one.heads_q // one.heads_kv
        q, k, v = qkv.unflatten(-1, (-1, one.head_dim)).split([one.heads_q, one.heads_kv, one.heads_kv], 2)
        if strategy.attention == "flash":
            out = flashgen.attention(q, k, v, causal=True, dropout_p=0.1 if strategy.dropout else 0.0)
            assert isinstance(out, Tensor)
            return out.flatten(2)
        # Keys of a group serve its query heads in place: (batch, kv head, group and query, dim).
        q = q.unflatten(2, (one.heads_kv, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = q @ k.permute(0, 2, 3, 1) * one.head_dim**-0.5
        if one.softcap:
            scores = torch.tanh(scores / 50.0) * 50.0
        hidden = scores.new_full((one.seqlen, one.seqlen), -torch.inf).triu(1)
        scores = scores + hidden.repeat(group, 1)
        p = drop(torch.softmax(scores.float(), -1).to(v.dtype))
        out = (p @ v.transpose(1, 2)).unflatten(2, (group, one.seqlen))
        return out.permute(0, 3, 1, 2, 4).flatten(2)

    x = weights["x"]
    x = x + drop(project("proj", attend(project("qkv", norm(x, "norm 1")))))
    up = project("up", norm(x, "norm 2"))
    if one.gated:
        gate, up = up.chunk(2, -1)
        active = functional.silu(gate) * up
    else:
        active = functional.gelu(up)
    return x + drop(project("down", active))


@pytest.mark.parametrize("attention", ["materialised", "flash"])
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heads_kv": 2},
        {"gated": True, "mlp_width": 72},
        {"softcap": True},
        {"dropout": True},
        {"hidden": 40},  # attention wider than the residual stream
    ],
    ids=str,
)
def test_a_layer_keeps_what_torch_keeps(attention: Any, precision: Any, changes: dict[str, Any]) -> None:
    dropout = changes.get("dropout", False)
    one = shape(**{name: value for name, value in changes.items() if name != "dropout"})
    strategy = Strategy(attention=attention, precision=precision, dropout=dropout)
    columns = 2 * one.mlp_width if one.gated else one.mlp_width
    sizes = {
        "x": (one.batch, one.seqlen, one.hidden), "qkv": (one.qkv_width, one.hidden), "proj": (one.hidden, one.attention_width),
        "up": (columns, one.hidden), "down": (one.hidden, one.mlp_width),
        **dict.fromkeys(("norm 1", "norm 1 offset", "norm 2", "norm 2 offset"), (one.hidden,)),
    }  # fmt: skip
    weights = {name: torch.randn(size, requires_grad=True) for name, size in sizes.items()}
    theirs = {x.untyped_storage().data_ptr() for name, x in weights.items() if name != "x"}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
    ):
        y = torch_layer(one, strategy, weights)
    measured = sum(size for address, size in kept.items() if address not in theirs)
    if dropout and attention == "flash":
        measured -= 16  # seed and offset
    del y
    assert sum(k.size for k in layer(one, strategy)) == measured


def test_flops_are_torchs() -> None:
    """Materialised, since torch counts no operators of ours; the checkpointed step does what is said again on top."""
    from torch.utils.flop_counter import FlopCounterMode

    memory = example("training_memory")
    one, counts = shape(), {}
    for checkpoint in (False, True):
        training = memory.Training(
            one, Strategy(attention="materialised", checkpoint=checkpoint, precision="fp32", device="cpu")
        )
        with FlopCounterMode(display=False) as forward:
            loss = training.forward()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counts[checkpoint] = forward.get_total_flops(), backward.get_total_flops()
    counted = step(one, Strategy(attention="materialised", checkpoint=True, precision="fp32"))
    assert counts[False][0] == counts[True][0] == counted.flops
    assert counts[False][1] == 2 * counted.flops
    assert counts[True][1] - counts[False][1] == counted.recomputed_flops > 0


def test_flash_skips_hidden_pairs_and_multiplies_the_scores_again() -> None:
    one = shape(causal=False)
    both = 4 * one.pairs * one.head_dim
    assert step(one, Strategy()).flops == step(one, Strategy(attention="materialised")).flops
    assert step(one, Strategy()).recomputed_flops == one.layers * both // 2
    seen = [sum(min(i + 1, w) for i in range(32)) for w in (32, 5, 1)]
    assert [shape(window=w).visible_pairs for w in (None, 5, 1)] == [2 * 4 * n for n in seen]


def test_the_count_is_what_an_h200_measured() -> None:
    """All eight ways; the bound is the example's."""
    document = json.loads((ROOT / "benchmarks/results/h200_training_memory.json").read_text())
    one, ways = Shape(**document["shape"]), document["ways"]
    assert len(ways) == 8 and document["device"] == "NVIDIA H200"
    for way in ways:
        chosen = {name: way[name] for name in ("attention", "checkpoint", "precision")}
        counted = step(one, Strategy(**chosen, workspace=fused_kernels(one)))
        for figure in ("saved", "peak", "parameters", "optimizer"):
            assert getattr(counted, figure) == pytest.approx(way["measured"][figure], rel=0.05), (chosen, figure)


def test_a_file_of_figures_is_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, path = example("training_memory"), tmp_path / "memory.json"
    arguments = (
        f"training_memory --batch 1 --seqlen 64 --hidden 32 --heads 2 --layers 1 --vocab 32 --steps 1 --json {path}"
    )
    monkeypatch.setattr(sys, "argv", arguments.split())
    ran: list[Strategy] = []
    measure = memory.measure
    monkeypatch.setattr(memory, "measure", lambda one, way, steps: ran.append(way) or measure(one, way, steps))
    memory.main()
    whole = json.loads(path.read_text())
    assert len(ran) == len(whole["ways"]) == 8
    path.write_text(json.dumps(whole | {"ways": whole["ways"][:5]}))
    memory.main()
    assert len(ran) == 8 + 3 and ran[8].attention == "flash" and ran[8].precision == "autocast"
    assert json.loads(path.read_text())["ways"][:5] == whole["ways"][:5]
    path.write_text(json.dumps(whole | {"device": "another"}))
    memory.main()
    assert len(ran) == 8 + 3 + 8
    capsys.readouterr()


def test_a_wrong_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example fails where the walk forgets what a softmax keeps."""
    memory = example("training_memory")
    arguments = "training_memory --batch 1 --seqlen 64 --hidden 32 --heads 2 --layers 1 --vocab 32 --steps 1"
    monkeypatch.setattr(sys, "argv", arguments.split())
    true = memory.step
    monkeypatch.setattr(
        memory, "step", lambda one, strategy: replace(true(one, strategy), saved=int(true(one, strategy).saved * 0.93))
    )
    assert memory.main() == 1


def test_the_loss_curves_of_a_wrong_kernel_part() -> None:
    gpt = example("train_tiny_gpt")
    steps = 8
    losses = gpt.train(gpt.eager, steps)
    bound = gpt.allowed(losses, [gpt.train(gpt.yardstick(seed), steps) for seed in (1, 2)])

    def parts(attention: Any) -> bool:
        return any(abs(x - y) > most for x, y, most in zip(gpt.train(attention, steps), losses, bound, strict=True))

    def scaled(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flashgen.attention(q, k, v, causal=True, softmax_scale=q.shape[-1] ** -0.5 * 1.001)

    def forgets(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flashgen.attention(q, k.detach(), v, causal=True)  # right forward, no dk

    assert not parts(gpt.flash)
    assert parts(scaled) and parts(forgets)


# -- models and bad input --


@pytest.mark.parametrize("name", PLAIN)
def test_plain_models_are_counted_four_ways(name: str) -> None:
    row = training_of(name)
    materialised, flash, again, both = row.ways
    assert [way.name for way in row.ways] == [
        "materialised", "flash", "materialised, checkpointed", "flash, checkpointed",
    ]  # fmt: skip
    assert row.layers == PRESETS[name].num_layers
    assert flash.step.saved < materialised.step.saved and both.step.peak < again.step.peak
    assert flash.step.peak < materialised.step.peak and both.step.saved == again.step.saved < flash.step.saved
    assert materialised.recomputed_flops == 0 < flash.again < both.again
    assert row.precision == ("fp32" if PRESETS[name].dtype == "fp32" else "autocast")


def test_a_models_parameters_are_the_published_number() -> None:
    """8.03 billion (The Llama 3 Herd of Models, arXiv 2407.21783, says 8B), 7.24 billion of Mistral 7B (7.3B): arXiv 2310.06825."""
    for name, billions in (("llama3-8b", 8.03), ("mistral-7b", 7.24)):
        assert training_of(name, seqlen=8).ways[0].step.parameters / 4e9 == pytest.approx(billions, abs=0.01)


def test_the_torch_backends_workspace_does_not_grow_with_pairs() -> None:
    short, long = shape(seqlen=2048, batch=1), shape(seqlen=4096, batch=1)
    for precision in ("fp32", "autocast"):
        strategy = Strategy(precision=precision)  # type: ignore[arg-type]
        assert torch_backend(long, strategy).backward <= 2 * torch_backend(short, strategy).backward


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: shape(batch=0), "batch=0"),
        (lambda: shape(heads_kv=3), "heads_q=4 is not a multiple"),
        (lambda: shape(vocab=-1), "vocab=-1"),
        (lambda: Strategy(attention="fast"), "attention='fast'"),  # type: ignore[arg-type]
        (lambda: Strategy(precision="fp8"), "allowed are fp32, autocast, 16bit"),  # type: ignore[arg-type]
        (lambda: step(shape(), Strategy(), optimizer="adam"), "optimizer='adam'"),  # type: ignore[arg-type]
        (lambda: training_of("gpt-9"), "not known"),
        (lambda: training_of("llama3-8b", seqlen=0), "seqlen=0"),
        (lambda: training_of("llama3-8b", precision="fp8"), "precision='fp8'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call: Any, said: str) -> None:
    with pytest.raises(InvalidProblemError, match=said):
        call()


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(PLAIN)))
def test_what_is_no_plain_layer_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedProblemError, match=f"layers of {name} are no plain ones"):
        training_of(name)
