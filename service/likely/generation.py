"""Draws pictures: chooses their noise and labels, fixes given pixels, decides what is kept."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from likely import noise
from likely.answers import Acceptance, Doubles, Draws, Floats, Labels, Pixels, SelfCheck
from likely.batching.lanes import Ask, Lanes
from likely.bundle import Manifest, Role, TensorSpec
from likely.errors import NotAnswered

Mask = npt.NDArray[np.bool_]
FIXING_NOISE = np.float32(1e6)  # noise that outweighs every log-probability


@dataclass(frozen=True, slots=True)
class _Plan:
    """Pictures to draw: row i is attempt attempts[i] at picture indices[i], with label labels[i].

    `fixed_levels` has the levels of fixed pixels, and `known` is true where a pixel is fixed;
    both are (n, c, h, w).
    """

    seed: int
    temperature: float
    indices: Sequence[int]
    attempts: Sequence[int]
    labels: Labels
    fixed_levels: Pixels | None = None
    known: Mask | None = None


class Generator:
    """Draws pictures from one model."""

    def __init__(
        self,
        manifest: Manifest,
        lanes: Lanes,
        passes: Callable[[Pixels, Labels, float], Awaitable[Mask]],
        surprise: Callable[[Pixels], Awaitable[Floats]],
        p_label: Callable[[Pixels, Labels], Awaitable[Doubles]],
        *,
        rows: int,
    ) -> None:
        """A generator over opened graphs.

        Args:
            manifest: the model's manifest.
            lanes: runs the model's graphs.
            passes: tells whether draws with given labels pass the self-check at an alpha.
            surprise: computes -log p of every pixel, float32 (n, c, h, w).
            p_label: computes the discriminative p(y|x) of one label for each picture,
                float64 (n,).
            rows: the number of rows that are best drawn at once.
        """
        self._manifest = manifest
        self._lanes = lanes
        self._passes = passes
        self._surprise = surprise
        self._p_label = p_label
        self._rows = rows

    def generate(
        self,
        label: int | None,
        count: int,
        seed: int,
        *,
        first_index: int,
        temperature: float,
        chunk: int,
        check: SelfCheck | None,
    ) -> AsyncGenerator[Draws, None]:
        """Draws pictures in chunks; the next chunk is drawn while one is consumed."""
        role = self._role(label)
        self._check_label(role, label)

        async def draw(start: int, stop: int) -> Draws:
            indices = range(first_index + start, first_index + stop)
            labels = self._labels(role, label, seed, indices)
            plan = _Plan(seed, temperature, indices, [0] * len(indices), labels)
            images = await self._draw(role, plan)
            attempts = np.ones(len(images), dtype=np.int64)
            accepted = np.ones(len(images), dtype=np.bool_)
            if check:
                attempts, accepted = await self._redraw_failing(role, plan, images, check)
            return self._answer(images, labels, indices[0], seed, attempts, accepted)

        return _draw_ahead(draw, count, chunk)

    def accept(
        self,
        label: int | None,
        count: int,
        seed: int,
        *,
        first_index: int,
        temperature: float,
        chunk: int,
        acceptance: Acceptance,
    ) -> AsyncGenerator[Draws, None]:
        """Draws pictures from p(x) and keeps each with probability p(y|x), in chunks.

        A draw is kept if the uniform number of its picture and attempt is below p(y|x), so
        that those kept follow p(y|x) p(x) / p(y) (von Neumann, 1951). The next chunk is drawn
        while one is consumed.
        """
        for role in (Role.SAMPLE, Role.DISCRIMINATE):
            self._lanes.graph(role)

        async def draw(start: int, stop: int) -> Draws:
            indices = range(first_index + start, first_index + stop)
            labels = self._choose_labels(label, seed, indices)
            images, draws, accepted = await self._draw_accepted(
                labels, seed, temperature, indices, acceptance.max_draws
            )
            return self._answer(images, labels, indices[0], seed, draws, accepted)

        return _draw_ahead(draw, count, chunk)

    def complete(
        self,
        given: Pixels,
        known: Mask,
        label: int | None,
        completions: int,
        seed: int,
        *,
        first_index: int,
        temperature: float,
        proposals: int,
        chunk: int,
    ) -> AsyncGenerator[Draws, None]:
        """Draws completions in chunks; all of one picture come before those of the next.

        An open pixel is drawn given everything before it in raster order. This is exact if
        no fixed pixel follows an open one, and the model does not draw a sketch of the whole
        picture first. Otherwise each completion is chosen among proposals, in proportion to the
        probability that each gives to the fixed pixels (sampling-importance-resampling; Rubin,
        1988). This is exact in the limit.
        """
        self._lanes.graph(Role.SAMPLE)
        self._check_label(Role.SAMPLE, label)
        chunk = max(1, chunk // proposals)

        async def draw(start: int, stop: int) -> Draws:
            rows = np.arange(start, stop).repeat(proposals)
            pictures, numbers = np.divmod(rows, completions)
            attempts = numbers * proposals + np.tile(np.arange(proposals), stop - start)
            plan = _Plan(
                seed,
                temperature,
                (first_index + pictures).tolist(),
                attempts.tolist(),
                np.full(len(rows), self._no_label_index if label is None else label),
                given[pictures],
                known[pictures],
            )
            images = await self._draw(Role.SAMPLE, plan)
            if proposals > 1:
                images = await self._resampled(plan, images, known[pictures], proposals)
            ones = np.ones(stop - start, dtype=np.int64)
            labels = np.full(stop - start, -1 if label is None else label)
            return self._answer(images, labels, start, seed, ones * proposals, ones.astype(bool))

        return _draw_ahead(draw, len(given) * completions, chunk)

    @property
    def _no_label_index(self) -> int:
        """The index that stands for no label."""
        return len(self._manifest.labels)

    def _check_label(self, role: Role, label: int | None) -> None:
        """Raises `NotAnswered` if a label is given and the graph cannot take one."""
        if label is not None and not self._takes_label(role):
            raise NotAnswered(f"model {self._manifest.name} draws from p(x) alone: no label")

    def _role(self, label: int | None) -> Role:
        """The graph to draw with: SAMPLE, unless only GENERATE is there or takes the label."""
        if Role.SAMPLE in self._lanes and (label is None or self._takes_label(Role.SAMPLE)):
            return Role.SAMPLE
        if Role.SAMPLE in self._lanes and Role.GENERATE not in self._lanes:
            return Role.SAMPLE
        return Role.GENERATE

    def _takes_label(self, role: Role) -> bool:
        return self._lanes.graph(role).input("y") is not None

    def _labels(self, role: Role, label: int | None, seed: int, indices: Sequence[int]) -> Labels:
        """The label of each picture: the requested one, or a draw; -1 if the graph takes none."""
        if not self._takes_label(role):
            return np.full(len(indices), -1)
        return self._choose_labels(label, seed, indices)

    def _choose_labels(self, label: int | None, seed: int, indices: Sequence[int]) -> Labels:
        """The label of each picture: the requested one, or a draw from the priors."""
        if label is not None:
            return np.full(len(indices), label)
        bounds = np.cumsum(self._manifest.priors)[:-1]
        return np.searchsorted(bounds, noise.uniform(seed, indices), side="right")

    async def _draw(self, role: Role, plan: _Plan) -> Pixels:
        specs = self._lanes.graph(role).inputs

        def feed(start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
            return {spec.name: _feed(spec, plan, slice(start, stop)) for spec in specs}

        (drawn,) = await self._lanes.run_all(Ask(role, len(plan.indices), feed, ("x",)))
        return drawn["x"]

    async def _redraw_failing(
        self, role: Role, plan: _Plan, images: Pixels, check: SelfCheck
    ) -> tuple[Labels, Mask]:
        """Redraws, in place, pictures that fail the check.

        Returns:
            The number of draws of each picture, and whether its last draw passed.
        """
        attempts = np.ones(len(images), dtype=np.int64)
        failing = np.flatnonzero(~await self._passes(images, plan.labels, check.alpha))
        for attempt in range(1, check.max_draws):
            if not failing.size:
                break
            again = _Plan(
                plan.seed,
                plan.temperature,
                [plan.indices[i] for i in failing.tolist()],
                [attempt] * len(failing),
                plan.labels[failing],
            )
            images[failing] = await self._draw(role, again)
            attempts[failing] += 1
            passed = await self._passes(images[failing], again.labels, check.alpha)
            failing = failing[~passed]
        accepted = np.ones(len(images), dtype=np.bool_)
        accepted[failing] = False
        return attempts, accepted

    async def _draw_accepted(
        self, labels: Labels, seed: int, temperature: float, indices: Sequence[int], most: int
    ) -> tuple[Pixels, Labels, Mask]:
        """Draws from p(x): for each picture the first draw that p(y|x) keeps, else the last.

        Returns:
            The pictures, the number of draws of each, and whether it was kept.
        """
        n = len(labels)
        images = np.empty((n, *self._manifest.shape), dtype=np.uint8)
        draws, accepted = np.full(n, most), np.zeros(n, dtype=np.bool_)
        drawn, left = 0, np.arange(n)
        while left.size and drawn < most:
            ahead = min(self._draws_at_once(labels[left]), most - drawn)
            attempts = list(range(drawn, drawn + ahead)) * left.size
            rows = left.repeat(ahead)
            picture_indices = [indices[row] for row in rows.tolist()]
            unlabelled = np.full(rows.size, self._no_label_index)
            x = await self._draw(
                Role.SAMPLE, _Plan(seed, temperature, picture_indices, attempts, unlabelled)
            )
            chance = noise.uniform(seed, picture_indices, noise.Use.ACCEPTANCE, attempts)
            kept = (chance < await self._p_label(x, labels[rows])).reshape(left.size, ahead)
            any_kept = kept.any(1)
            first = np.where(any_kept, kept.argmax(1), ahead - 1)
            images[left] = x[np.arange(left.size) * ahead + first]
            draws[left], accepted[left] = drawn + first + 1, any_kept
            drawn, left = drawn + ahead, left[~any_kept]
        return images, draws, accepted

    def _draws_at_once(self, labels: Labels) -> int:
        """The number of draws of each picture that are made at once.

        They are enough to fill a batch, but no more than the rarest label takes on average.
        Draws after the first one that is kept are discarded, so the number changes no answer.
        """
        rarest = max(float(self._manifest.priors[labels].min()), 1e-3)
        return max(1, min(self._rows // len(labels), math.ceil(1 / rarest)))

    async def _resampled(self, plan: _Plan, images: Pixels, known: Mask, proposals: int) -> Pixels:
        """Chooses one of each completion's proposals, by how probable they make fixed pixels."""
        surprise = await self._surprise(images)
        weights = -(surprise.astype(np.float64) * known).sum((1, 2, 3))
        firsts = range(0, len(images), proposals)
        gumbel = [
            noise.stream(plan.seed, plan.indices[at], noise.Use.CHOICE, plan.attempts[at]).gumbel(
                size=proposals
            )
            for at in firsts
        ]
        chosen = (weights.reshape(-1, proposals) + np.array(gumbel)).argmax(1)
        kept: Pixels = images[np.array(firsts) + chosen]
        return kept

    def _answer(
        self,
        images: Pixels,
        labels: Labels,
        first: int,
        seed: int,
        draws: Labels,
        accepted: Mask,
    ) -> Draws:
        return Draws(
            images=images,
            label=labels,
            first_index=first,
            seed=seed,
            draws=draws,
            accepted=accepted,
            model_version=self._manifest.version,
        )


def _feed(spec: TensorSpec, plan: _Plan, rows: slice) -> npt.NDArray[Any]:
    """One input of the graph, for some rows of the plan."""
    shape = spec.array_shape(1)[1:]
    indices, attempts = plan.indices[rows], plan.attempts[rows]
    if spec.name == "y":
        return plan.labels[rows]
    if spec.name == "eps":
        return noise.normal(plan.seed, indices, shape, attempts)
    gumbel = noise.gumbel(plan.seed, indices, shape, attempts)
    if plan.temperature != 1:
        gumbel *= np.float32(plan.temperature)
    if plan.fixed_levels is not None and plan.known is not None:
        _fix_levels(gumbel, plan.fixed_levels[rows], plan.known[rows])
    return gumbel


def _fix_levels(gumbel: Floats, fixed_levels: Pixels, known: Mask) -> None:
    """Puts `FIXING_NOISE` at the digits of known levels, in noise (n, h, w, c[, digits], base)."""
    base = gumbel.shape[-1]
    digits = gumbel.reshape(*gumbel.shape[:4], -1, base)
    level = fixed_levels.transpose(0, 2, 3, 1).astype(np.int64)
    where = known.transpose(0, 2, 3, 1)
    for digit in reversed(range(digits.shape[4])):
        level, value = np.divmod(level, base)
        fixing = (np.arange(base) == value[..., None]) * FIXING_NOISE
        digits[..., digit, :] = np.where(where[..., None], fixing, digits[..., digit, :])


async def _draw_ahead(
    draw: Callable[[int, int], Coroutine[Any, Any, Draws]], count: int, chunk: int
) -> AsyncGenerator[Draws, None]:
    """The draws of rows 0..count-1 in chunks; each starts while the one before is consumed."""
    upcoming: asyncio.Task[Draws] | None = None
    try:
        for start in range(0, count, chunk):
            current = upcoming or asyncio.create_task(draw(start, min(start + chunk, count)))
            upcoming, then = current, start + chunk
            answer = await current
            upcoming = (
                asyncio.create_task(draw(then, min(then + chunk, count))) if then < count else None
            )
            yield answer
    finally:
        if upcoming is not None:
            upcoming.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await upcoming  # else asyncio logs that nobody retrieved its failure
