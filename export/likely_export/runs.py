"""A run: the folder in which a recipe's models are trained, side by side.

    RUN/recipe.toml              the recipe, with its source made absolute
    RUN/<model>/checkpoint.pt    everything needed to go on
    RUN/<model>/weights.pt       the averaged weights and their config
    RUN/<model>/log.jsonl        a line a validation
    RUN/.<model>.lock            held by the process that trains it

Small models gain nothing from a second thread, so each has a process of one
thread to itself, and as many run at once as there are processors.
"""

from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from likely import machine
from likely.errors import InvalidInput, LikelyError
from likely_export import corruptions, families, plan, recipes, train
from likely_export.data import Dataset
from likely_export.optimisers import Precision
from likely_export.recipes import Recipe
from likely_export.train import Hardware, Progress, Trained

RECIPE = "recipe.toml"
SECONDS_BETWEEN_REPORTS = 0.2
CORRUPTED = 100  # pictures, to see whether corruptions change them

Report = Callable[[str, Progress], None]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """A folder with a recipe and, once trained, its models."""

    folder: Path
    recipe: Recipe

    @classmethod
    def open(cls, folder: Path, source: str | None = None) -> Run:
        """The run in that folder.

        Args:
            folder: that `train_all` filled.
            source: where its data lie now, if not where they lay in training.

        Raises:
            InvalidInput: it holds no recipe.
        """
        if not (folder / RECIPE).is_file():
            raise InvalidInput(str(folder), f"holds no {RECIPE}, so it is no training run")
        return cls(folder, recipes.load(folder / RECIPE, source))

    def model(self, name: str, data: Dataset | None = None) -> nn.Module:
        """The trained model of that name, in evaluation mode on the CPU.

        Args:
            name: of a model of the recipe.
            data: that it must have been trained on; not asked by default.

        Raises:
            InvalidInput: it was not trained to the end, or in another way than the recipe says
                now, or on other data.
        """
        weights, chosen = self.folder / name / train.WEIGHTS, self.recipe.models[name]
        model = families.restore(weights)
        if data is not None:
            train.check_data(self.folder / name, data.digest)
        train.check_trained(weights, chosen.training)
        _check_made(weights, model, chosen)
        if data is not None and (its := cast(Any, model.config).levels) != data.levels:
            raise InvalidInput(
                str(weights),
                f"was trained on {its} levels where the recipe's data have {data.levels}: "
                "train this model afresh",
            )
        return model


@dataclass(frozen=True, slots=True)
class Job:
    """One model of a recipe, to be trained into its folder."""

    recipe: Recipe
    name: str
    folder: Path
    resume: bool
    hardware: Hardware
    threads: int

    def run(self, report: Report | None) -> Trained:
        """Trains it in this process."""
        torch.set_num_threads(self.threads)
        data, training = self.recipe.data.load(), self.recipe.models[self.name].training
        return train.fit(
            cast(train.Model, _untrained(self.recipe, self.name, data)),
            data,
            training,
            self.folder,
            resume=self.resume,
            hardware=dataclasses.replace(self.hardware, precision=training.precision),
            report=_seldom(partial(report, self.name)) if report else None,
        )


def train_all(
    recipe: Recipe,
    folder: Path,
    *,
    only: Sequence[str] = (),
    resume: bool = True,
    hardware: Hardware | None = None,
    threads: int = 1,
    report: Report | None = None,
    warn: Warn | None = None,
) -> dict[str, Trained]:
    """Trains the models of a recipe into a run folder.

    Args:
        recipe: what to train.
        folder: the run; a folder of the same recipe, or of one with fewer stretches of
            training, is gone on with, wherever its data lie now.
        only: names of models; all by default.
        resume: go on from checkpoints; otherwise these models start afresh.
        hardware: on what.
        threads: of each model's process.
        report: told where each model stands, if given.
        warn: told what is doubtful about the data, if given.

    Raises:
        InvalidInput: no such model, a model or a set to report against does not go with the data,
            no bundle could be built of the models, a training does not go with so many devices,
            the folder is of another recipe or other data, another process trains one of the
            models there, or a model has begun in another precision than was chosen.
        LikelyError: a training failed.
    """
    names = list(only) or list(recipe.models)
    for name in names:
        if name not in recipe.models:
            raise InvalidInput("model", f"{name} is none of {', '.join(recipe.models)}")
    hardware = hardware or Hardware()
    begun = _begun(recipe, folder, afresh=() if resume else names)
    for name in names:
        if (its := begun.get(name)) and hardware.precision not in (None, its):
            raise InvalidInput(
                f"models.{name}",
                f"has begun in {its} in {folder}: go on with --precision {its}, or train it afresh",
            )
    # The run, and all that is told of it, says so.
    recipe = recipe.computed(hardware.arithmetic, begun)
    jobs = [Job(recipe, name, folder / name, resume, hardware, threads) for name in names]
    data = _check(recipe)
    for name in names:
        hardware.check(recipe.models[name].training, len(data.train))
    if warn and (copies := ", ".join(f"{n} of {part}" for part, n in data.copies().items() if n)):
        warn(
            f"{data.name} holds pictures twice: of those to train on, {copies} are copies, to the "
            "byte, which look more probable and are accepted more often than new ones"
        )
    # With several devices Fabric runs this very code once for each; the first keeps the folder.
    is_first = hardware.devices == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    if resume:
        _require_same(recipe, folder, data.digest)
    with _alone(folder, names) if is_first else nullcontext():
        if is_first:
            _prepare(recipe, folder, names, resume)
        if hardware.devices > 1:
            hardware.fabric().barrier()
        if len(jobs) == 1 or hardware.devices > 1:
            return {job.name: job.run(report if is_first else None) for job in jobs}
        return _side_by_side(jobs, report)


def _begun(recipe: Recipe, folder: Path, afresh: Sequence[str]) -> dict[str, Precision]:
    """What the models of a run folder have begun in, but for those that are to begin anew."""
    told = {name: train.begun_in(folder / name) for name in recipe.models.keys() - set(afresh)}
    return {name: precision for name, precision in told.items() if precision}


def _untrained(recipe: Recipe, name: str, data: Dataset) -> nn.Module:
    """The model of that name for the data; its weights are a function of the recipe's seed.

    Raises:
        InvalidInput: its options do not go with each other, its training or the data.
    """
    chosen = recipe.models[name]
    if chosen.training.keep_best and chosen.options.get("contrast"):
        raise InvalidInput(
            f"models.{name}.training.keep_best",
            "keeps what validates best, and validation leaves the contrast out: give false",
        )
    try:
        return families.create(
            chosen.family,
            chosen.options,
            shape=data.shape,
            levels=data.levels,
            labels=len(data.labels),
            seed=chosen.training.seed,
        )
    except InvalidInput as error:
        raise InvalidInput(f"models.{name}", str(error)) from error


def _check(recipe: Recipe) -> Dataset:
    """The recipe's data, if what would only fail in a training, or after it, goes with them.

    All models are asked of, also those that are not to be trained now: a bundle needs them.

    Raises:
        InvalidInput: a model cannot be made for the data, no bundle can be built of the models
            (`plan.check`), a set to report against is of another shape, or no corruption to
            learn from changes the data.
    """
    data = recipe.data.load()
    recipe.others(data.levels)
    plan.check(recipe, data, {name: _untrained(recipe, name, data) for name in recipe.models})
    if any(part.kind == "contrast" for part in recipe.calibration.parts):
        few = data.fit.some(CORRUPTED)
        corruptions.contrasting(recipe.calibration.contrast, few.x, data.levels)
    return data


def _require_same(recipe: Recipe, folder: Path, digest: str) -> None:
    """Returns if the folder is of that recipe and of those data, or of none yet.

    Raises:
        InvalidInput: it is of others.
    """
    if not (folder / RECIPE).is_file():
        return
    if not recipe.continues(recipes.load(folder / RECIPE)):
        raise InvalidInput(
            str(folder), "was trained by another recipe: choose another folder or train afresh"
        )
    for name in recipe.models:
        train.check_data(folder / name, digest)


@contextmanager
def _alone(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Within it, no other process trains these models in that folder, which is made.

    Raises:
        InvalidInput: one does, or it is no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidInput(str(folder), "is a file: a run needs a folder") from error
    with ExitStack() as stack:
        for name in names:
            lock = stack.enter_context((folder / f".{name}.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                told = "is being trained by another process"
                raise InvalidInput(str(folder / name), told) from error
            except OSError:
                pass  # a file system without locks
        yield


def _prepare(recipe: Recipe, folder: Path, names: Sequence[str], resume: bool) -> None:
    recipe.write(folder / RECIPE)
    if not resume:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)


def _check_made(weights: Path, model: nn.Module, chosen: recipes.Model) -> None:
    """Returns if a model is of the family and has the options that a recipe gives or leaves to it.

    Raises:
        InvalidInput: it is another one; names the first thing that differs.
    """
    if type(model) is not families.family(chosen.family).model:
        raise InvalidInput(
            str(weights),
            f"holds a {type(model).__name__} where the recipe says {chosen.family}: "
            "train this model afresh",
        )
    given: Any = model.config
    wanted = families.config(
        chosen.family,
        chosen.options,
        shape=given.shape,
        levels=given.levels,
        labels=given.labels,
    )
    for key in (field.name for field in dataclasses.fields(wanted)):
        if (its := getattr(given, key)) != (told := getattr(wanted, key)):
            default = "" if key in chosen.options else ", by default,"
            raise InvalidInput(
                str(weights),
                f"was trained with {key} {its} where the recipe says{default} {told}: "
                "train this model afresh",
            )


def _seldom(report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    last = 0.0

    def forward(now: Progress) -> None:
        nonlocal last
        if now.done >= 1 or time.monotonic() - last >= SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            report(now)

    return forward


def _side_by_side(jobs: Sequence[Job], report: Report | None) -> dict[str, Trained]:
    # Spawned, not forked: a fork of a process whose OpenMP has run hangs.
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    waiting = {job.name: context.Process(target=_work, args=(job, told)) for job in jobs}
    running: dict[str, BaseProcess] = {}
    trained: dict[str, Trained] = {}
    try:
        while waiting or running:
            while waiting and len(running) < machine.cores():
                name = next(iter(waiting))
                running[name] = waiting.pop(name)
                running[name].start()
            name, news = _next(told, running)
            if isinstance(news, Progress):
                if report:
                    report(name, news)
            elif isinstance(news, Trained):
                trained[name] = news
                running.pop(name).join()
            else:
                raise LikelyError(f"training of {name} failed: {news}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    return {job.name: trained[job.name] for job in jobs}


def _next(told: Any, running: Mapping[str, BaseProcess]) -> tuple[str, Progress | Trained | str]:
    """The next news of a worker; a worker that died without a word is news too."""
    while True:
        ended = [name for name, process in running.items() if process.exitcode is not None]
        try:
            # What an ended process said last has arrived by now, and comes before its end.
            news: tuple[str, Progress | Trained | str] = told.get(timeout=0 if ended else 1.0)
            return news
        except queue.Empty:
            for name in ended:
                return name, f"its process ended with code {running[name].exitcode}"


def _work(job: Job, told: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        told.put((job.name, job.run(lambda name, now: told.put((name, now)))))
    except LikelyError as error:
        told.put((job.name, str(error)))
    except Exception as error:
        traceback.print_exc()
        told.put((job.name, f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """Ends this process once its parent is gone, however that was; files are written by rename."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
