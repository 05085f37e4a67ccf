"""Measures the figures, prints them and writes them to a file: `python -m bench.serving`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from bench.serving import bundles, figures, soak, tables
from bench.serving.measures import Pace

WHOLE = Pace(rounds=7, seconds=2.0, batches=(1, 4, 8, 16, 32, 64))
QUICK = Pace(rounds=1, seconds=0.25, batches=(1, 8))


def main() -> None:
    """Runs the whole bench, in about six minutes, or a soak test."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of 0.25 seconds each")
    parser.add_argument("--rounds", type=int, help=f"rounds of every measurement [{WHOLE.rounds}]")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="only a soak test, this long")
    parser.add_argument(
        "--leaving",
        type=float,
        default=soak.CANCELLED_SHARE,
        help=f"share of the soak's requests that their callers cancel [{soak.CANCELLED_SHARE}]",
    )
    parser.add_argument("--out", type=Path, help="[build/bench-serving.json, build/soak.json]")
    parser.add_argument("--cache", type=Path, default=Path("build/bench-serving"))
    options = parser.parse_args()
    pace = QUICK if options.quick else WHOLE
    if options.rounds:
        pace = Pace(options.rounds, pace.seconds, pace.batches)
    console = Console()
    with console.status("") as status:
        folders = {
            name: bundles.find_or_export(name, options.cache, status.update)
            for name in bundles.SCORERS
        }
        if options.soak:
            results = soak.soak(folders["light"], options.soak, status.update, options.leaving)
        else:
            results = figures.collect(folders, pace, status.update)
    out = options.out or Path("build", "soak.json" if options.soak else "bench-serving.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    for table in [tables.soak_table] if options.soak else [tables.goals_table, tables.others]:
        console.print(table(results))
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
