"""Measures the figures, prints them and writes them to a file: `python -m bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from bench import figures, tables

BATCHES = (1, 16, 64, 256)


def main() -> None:
    """Runs the whole bench: about three minutes, if the graphs are already exported."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every measurement [9]")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="[1 16 64 256]")
    parser.add_argument("--quick", action="store_true", help="3 rounds of batches 1 and 16")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="[build/bench]")
    options = parser.parse_args()
    rounds, batches = (3, (1, 16)) if options.quick else (options.rounds, options.batches)
    console = Console()
    with console.status("") as status:
        results = figures.collect(options.cache, batches, rounds, status.update)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(tables.by_batch(results))
    console.print(tables.others(results))
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
