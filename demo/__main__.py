"""Serves three bundles, asks three questions over gRPC, and plots the answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from demo import figures, pictures, tables
from demo.figures import Example
from demo.serving import served
from likely import Client, ModelInfo, Scores, Verdict
from likely.answers import Pixels
from likely.bundle import Bundle
from likely.versions.loading import shipped

ALPHAS = (0.01, 0.05, 0.1)
ALPHA = 0.05
SEED = 2026
EACH = 6  # pictures drawn for each label
MODEL = "digits"
BUNDLES = Path(__file__).parents[1] / "bundles"
FIGURES = ("mnist.png", "fashion_mnist.png", "surprise.png", "likelihoods.png", "server.log")
DIGITS = "held-out digits"


def main() -> None:
    """Runs the whole tour."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder [build/demo]")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    bundles = (BUNDLES / "digits", *shipped(), BUNDLES / "fashion_mnist")
    with served(out / "server.log", *bundles) as server, Client(server.address) as client:
        for info in sorted(client.models(), key=lambda info: info.shape):
            console.print(_greeting(info, server.address), highlight=False)
        draw(client, [bundle.name for bundle in bundles[1:]], out, console)
        tour(client, bundles[0], out, console)
    console.print("The server has ended well. To look at:")
    for name in FIGURES:
        console.print(f"  {out / name}", highlight=False)


def draw(client: Client, names: Sequence[str], out: Path, console: Console) -> None:
    """Draws pictures of every label from each model, and scores them under all the models.

    Args:
        client: a client of a server whose models have the same shape of pictures.
        names: names of these models.
        out: folder for the figures.
        console: console to print the table on.
    """
    drawn: dict[str, Pixels] = {}
    for name in names:
        labels = client.model(name).labels
        began = time.perf_counter()
        rows = [
            client.generate(EACH, label=label, seed=SEED, self_check=True, model=name).images
            for label in range(len(labels))
        ]
        seconds = time.perf_counter() - began
        figures.generated(out / f"{name}.png", rows, labels)
        drawn[name] = np.concatenate(rows)
        again = client.generate(
            3, label=7, seed=SEED, first_index=3, self_check=True, model=name
        ).images
        same = "the same" if np.array_equal(again, rows[7][3:6]) else "OTHER"
        console.print(
            f"[bold]Draw me one.[/bold] {len(drawn[name])} pictures by label from {name} in "
            f"{seconds:.1f} s; 3 to 5 of label {labels[7]}, drawn again alone: {same}.",
            highlight=False,
        )
    scores = {
        name: {model: client.score(x, alpha=ALPHA, model=model) for model in names}
        for name, x in drawn.items()
    }
    console.print()
    console.print(tables.strangers(scores))


def tour(client: Client, bundle: Path, out: Path, console: Console) -> None:
    """Scores and classifies held-out digits, and pictures that are not digits.

    Args:
        client: a client of a server with the bundle of digits.
        bundle: folder of that bundle, which tells how its data was split.
        out: folder for the figures.
        console: console to print the tables on.
    """
    digits, y = pictures.held_out(Bundle.open(bundle).manifest)
    rng = np.random.default_rng(SEED)
    sets = {DIGITS: digits} | {name: make(digits, rng) for name, make in pictures.NO_DIGITS.items()}
    answers = {
        name: {
            alpha: client.score(x, alpha=alpha, surprise=alpha == ALPHA, model=MODEL)
            for alpha in ALPHAS
        }
        for name, x in sets.items()
    }
    console.print(tables.rejection(answers, DIGITS))
    size = client.model(MODEL).calibration_size
    console.print(tables.promise(ALPHA, size, len(digits)), highlight=False)
    scores = {name: by_alpha[ALPHA] for name, by_alpha in answers.items()}
    others = {name: one for name, one in scores.items() if name != DIGITS}
    figures.likelihoods(out / "likelihoods.png", scores[DIGITS], others)

    answer = client.classify(digits, alpha=ALPHA, model=MODEL)
    strict = client.classify(digits, alpha=ALPHA, min_posterior=0.9, model=MODEL)
    console.print(tables.labels(answer, strict, y))

    inside = _digits(digits, y.tolist(), scores[DIGITS])
    outside = [_example(name, sets[name], one, _hardest(one)) for name, one in others.items()]
    figures.surprise(out / "surprise.png", [*inside, *outside], ALPHA)
    shown = [*inside[:2], outside[-3], outside[-1]]
    console.print(tables.examples(shown, _assigned(client, shown)))


def _assigned(client: Client, shown: Sequence[Example]) -> list[str]:
    """The label assigned to each picture with its posterior, or "no label"."""
    answer = client.classify(np.stack([example.x for example in shown]), alpha=ALPHA, model=MODEL)
    names = client.model(MODEL).labels
    return [
        f"label {names[label]}, {row.max():.0%}" if verdict == Verdict.ACCEPTED else "no label"
        for label, row, verdict in zip(answer.label, answer.posterior, answer.verdict, strict=True)
    ]


def _greeting(info: ModelInfo, address: str) -> str:
    _, h, w = info.shape
    return (
        f"[bold]{info.name}@{info.version}[/bold] at {address} on {info.execution_providers[0]}: "
        f"{info.description}\n{h}x{w} pixels of {info.levels} levels; verdicts are ranked against "
        f"{info.calibration_size} pictures, so alpha may be {info.finest_alpha:.2g} or more."
    )


def _digits(x: Pixels, y: Sequence[int], scores: Scores) -> list[Example]:
    """Four accepted digits, and the one with the smallest p-value."""
    accepted = np.flatnonzero(scores.verdict == Verdict.ACCEPTED)
    rows = [*accepted[:4], int(scores.p_value.argmin())]
    return [_example(f"a {y[row]}", x, scores, row) for row in rows]


def _example(name: str, x: Pixels, scores: Scores, row: int) -> Example:
    if scores.surprise is None:
        raise ValueError("scores were asked for without their surprise maps")
    return Example(
        name, x[row, 0], scores.surprise[row, 0], float(scores.log_px[row]),
        float(scores.p_value[row]), scores.verdict[row] == Verdict.OUTLIER,
    )  # fmt: skip


def _hardest(scores: Scores) -> int:
    """The row of the picture most like a digit: by p-value, then by log p(x)."""
    return int(np.lexsort((scores.log_px, scores.p_value))[-1])


if __name__ == "__main__":
    main()
