"""Derive `tuning_db/portfolios` from every trial that is committed: the shipped seeds, and the recorded runs of `benchmarks/results`.

    python scripts/write_portfolios.py [--folder tuning_db/portfolios]

Run it after seeds or recorded runs changed: `tests/unit/test_portfolio.py` fails where the folder is not what the trials give.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flashgen.spec import OPS
from flashgen.store import Record, portfolios, seeds
from flashgen.tuner.portfolio import derive

ROOT = Path(__file__).resolve().parents[1]


def trials() -> list[Record]:
    """Every committed trial."""
    rows = [row for gpu in seeds.gpus() for op in OPS for row in seeds.load(gpu, op)]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*_tune.jsonl")):
        rows += [Record.from_json(line) for line in path.read_text().splitlines()]
    return rows


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "tuning_db" / "portfolios")
    folder = parser.parse_args().folder
    members = derive(trials())
    for path in folder.glob("*/*.jsonl"):
        path.unlink()
    for path in portfolios.write(folder, members):
        print(f"{path}: {len(path.read_text().splitlines())} members")


if __name__ == "__main__":
    main()
