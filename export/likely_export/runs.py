"""A run: the folder in which a recipe's models are trained, side by side.

    RUN/recipe.toml              the recipe, with the absolute path of its source
    RUN/<model>/checkpoint.pt    everything needed to resume
    RUN/<model>/weights.pt       the averaged weights and their config
    RUN/<model>/log.jsonl        one line per validation
    RUN/.<model>.lock            held by the process that trains the model

Small models gain nothing from a second thread. Each model therefore has a process with
one thread of its own, and as many processes run at once as there are cores.
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
CORRUPTED = 100  # pictures on which to check that corruptions change them

Report = Callable[[str, Progress], None]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """A folder with a recipe and, once they are trained, its models."""

    folder: Path
    recipe: Recipe

    @classmethod
    def open(cls, folder: Path, source: str | None = None) -> Run:
        """Opens the run in a folder.

        Args:
            folder: folder that `train_all` filled.
            source: where the data are now, if they have moved since training.

        Raises:
            InvalidInput: the folder contains no recipe.
        """
        if not (folder / RECIPE).is_file():
            raise InvalidInput(str(folder), f"holds no {RECIPE}, so it is no training run")
        recipe = recipes.load(folder / RECIPE, source)
        begun = _begun_precisions(recipe, folder, afresh=())
        # Commands that train several models at once may have written the recipe before they began.
        return cls(folder, recipe.with_precisions(lambda precision: precision, begun))

    def model(self, name: str, data: Dataset | None = None) -> nn.Module:
        """Loads a trained model, in evaluation mode on the CPU.

        Args:
            name: name of a model of the recipe.
            data: data it must have been trained on; not checked by default.

        Raises:
            InvalidInput: the model was not trained to the end, or its options, training or data
                differ from the recipe's.
        """
        weights, chosen = self.folder / name / train.WEIGHTS, self.recipe.models[name]
        model = families.restore(weights)
        if data is not None:
            train.check_data(self.folder / name, data.digest)
        train.check_trained(weights, chosen.training)
        _check_matches_recipe(weights, model, chosen)
        if data is not None and (levels := cast(Any, model.config).levels) != data.levels:
            raise InvalidInput(
                str(weights),
                f"was trained on {levels} levels where the recipe's data have {data.levels}: "
                "train this model afresh",
            )
        return model


@dataclass(frozen=True, slots=True)
class Job:
    """The training of one model of a recipe into its folder."""

    recipe: Recipe
    name: str
    folder: Path
    resume: bool
    hardware: Hardware
    threads: int

    @property
    def start(self) -> str:
        """The name of the model whose trained weights are read now; empty for none."""
        if self.resume and (self.folder / train.CHECKPOINT).is_file():
            return ""
        return self.recipe.models[self.name].start_from

    def run(self, report: Report | None) -> Trained:
        """Trains the model in this process."""
        torch.set_num_threads(self.threads)
        data, training = self.recipe.data.load(), self.recipe.models[self.name].training
        model = _untrained(self.recipe, self.name, data)
        if self.start:
            _copy_weights(Run(self.folder.parent, self.recipe).model(self.start, data), model)
        return train.fit(
            cast(train.Model, model),
            data,
            training,
            self.folder,
            resume=self.resume,
            hardware=dataclasses.replace(self.hardware, precision=training.precision),
            report=_throttle(partial(report, self.name)) if report else None,
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
        recipe: recipe to train.
        folder: folder of the run. A run of the same recipe, or of one with fewer stretches of
            training, is resumed, even if its data have moved.
        only: names of the models to train; all by default.
        resume: whether to resume from checkpoints; otherwise these models are trained afresh.
        hardware: devices and precision.
        threads: number of threads of each model's process.
        report: called with the name and the progress of each model, if given.
        warn: called with warnings about the data, if given.

    Raises:
        InvalidInput: there is no such model; a model, or a set to report against, does not fit the
            data; no bundle could be built from the models; a training cannot be divided among the
            devices; the folder is of another recipe or other data; another process trains one of
            the models there; or a model has begun in another precision than the one chosen.
        LikelyError: a training failed.
    """
    names = list(only) or list(recipe.models)
    for name in names:
        if name not in recipe.models:
            raise InvalidInput("model", f"{name} is none of {', '.join(recipe.models)}")
    hardware = hardware or Hardware()
    begun = _begun_precisions(recipe, folder, afresh=() if resume else names)
    for name in names:
        if (stored := begun.get(name)) and hardware.precision not in (None, stored):
            raise InvalidInput(
                f"models.{name}",
                f"has begun in {stored} in {folder}: use --precision {stored}, or train it afresh",
            )
    names.sort(key=lambda name: bool(recipe.models[name].start_from))  # others before these
    # The run's recipe, and everything derived from it, states the precision that is used.
    recipe = recipe.with_precisions(hardware.arithmetic, begun)
    jobs = [Job(recipe, name, folder / name, resume, hardware, threads) for name in names]
    data = _load_checked_data(recipe)
    for name in names:
        hardware.check(recipe.models[name].training, len(data.train))
    if warn and (
        copies := ", ".join(f"{n} of {part}" for part, n in data.count_copies().items() if n)
    ):
        warn(
            f"{data.name} holds pictures twice: {copies} are exact copies of pictures to train on, "
            "which look more probable and are accepted more often than new ones"
        )
    # With several devices, Fabric runs this code once for each; the first one owns the folder.
    is_first = hardware.devices == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    if resume:
        _require_same_run(recipe, folder, data.digest)
    with _lock_models(folder, names) if is_first else nullcontext():
        if is_first:
            for job in jobs:
                if job.start and job.start not in names:
                    Run(folder, recipe).model(job.start, data)
            _prepare(recipe, folder, names, resume)
        if hardware.devices > 1:
            hardware.fabric().barrier()
        if len(jobs) == 1 or hardware.devices > 1:
            return {job.name: job.run(report if is_first else None) for job in jobs}
        return _train_in_parallel(jobs, report)


def _begun_precisions(recipe: Recipe, folder: Path, afresh: Sequence[str]) -> dict[str, Precision]:
    """Returns the precisions in which models have begun, except those to be trained afresh."""
    precisions = {
        name: train.begun_precision(folder / name) for name in recipe.models.keys() - set(afresh)
    }
    return {name: precision for name, precision in precisions.items() if precision}


def _untrained(recipe: Recipe, name: str, data: Dataset) -> nn.Module:
    """Returns an untrained model for the data, whose weights are a function of the recipe's seed.

    Raises:
        InvalidInput: its options contradict each other, its training or the data.
    """
    chosen = recipe.models[name]
    if chosen.training.keep_best and chosen.options.get("contrast"):
        raise InvalidInput(
            f"models.{name}.training.keep_best",
            "keeps what validates best, but validation leaves the contrast out: set it to false",
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


def _copy_weights(earlier: nn.Module, model: nn.Module) -> None:
    """Copies all weights of an earlier model to the weights of the same names.

    Raises:
        InvalidInput: a weight of the earlier model has no counterpart of its shape.
    """
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in earlier.named_parameters():
            if name not in weights or weights[name].shape != weight.shape:
                kind = type(earlier).__name__
                raise InvalidInput("start_from", f"{name} of the {kind} has no counterpart")
            weights[name].copy_(weight)


def _load_checked_data(recipe: Recipe) -> Dataset:
    """Loads the recipe's data, and checks all that would otherwise fail in training or later.

    All models are checked, also those that are not trained now, because a bundle needs them.

    Raises:
        InvalidInput: a model cannot be created for the data, no bundle can be built from the models
            (`plan.check`), a set to report against does not fit (`Recipe.others`), or none of the
            contrast's corruptions changes the data.
    """
    data = recipe.data.load()
    recipe.others(data.levels)
    models = {name: _untrained(recipe, name, data) for name in recipe.models}
    for name, model in models.items():
        if earlier := recipe.models[name].start_from:
            try:
                _copy_weights(models[earlier], model)
            except InvalidInput as error:
                raise InvalidInput(f"models.{name}", str(error)) from error
    plan.check(recipe, data, models)
    if any(part.kind == "contrast" for part in recipe.calibration.parts):
        few = data.fit.subsample(CORRUPTED)
        corruptions.corrupt_for_contrast(recipe.calibration.contrast, few.x, data.levels)
    return data


def _require_same_run(recipe: Recipe, folder: Path, digest: str) -> None:
    """Raises unless the folder belongs to this recipe and these data, or is new.

    Raises:
        InvalidInput: it belongs to others.
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
def _lock_models(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Creates the folder, and keeps other processes from training these models in it meanwhile.

    Raises:
        InvalidInput: another process trains one of them, or the path is a file.
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
                problem = "is being trained by another process"
                raise InvalidInput(str(folder / name), problem) from error
            except OSError:
                pass  # a file system without locking
        yield


def _prepare(recipe: Recipe, folder: Path, names: Sequence[str], resume: bool) -> None:
    recipe.write(folder / RECIPE)
    if not resume:
        # What started from a model that is trained afresh would not be what the recipe describes.
        started = [name for name, model in recipe.models.items() if model.start_from in names]
        for name in [*names, *started]:
            shutil.rmtree(folder / name, ignore_errors=True)


def _check_matches_recipe(weights: Path, model: nn.Module, chosen: recipes.Model) -> None:
    """Raises unless a model has the recipe's family and options, defaults included.

    Raises:
        InvalidInput: it differs; names the first difference.
    """
    if type(model) is not families.family(chosen.family).model:
        raise InvalidInput(
            str(weights),
            f"holds a {type(model).__name__} where the recipe says {chosen.family}: "
            "train this model afresh",
        )
    config: Any = model.config
    wanted = families.config(
        chosen.family,
        chosen.options,
        shape=config.shape,
        levels=config.levels,
        labels=config.labels,
    )
    for key in (field.name for field in dataclasses.fields(wanted)):
        if (stored := getattr(config, key)) != (expected := getattr(wanted, key)):
            default = "" if key in chosen.options else ", by default,"
            raise InvalidInput(
                str(weights),
                f"was trained with {key} {stored} where the recipe says{default} {expected}: "
                "train this model afresh",
            )


def _throttle(report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    last = 0.0

    def forward(now: Progress) -> None:
        nonlocal last
        if now.done >= 1 or time.monotonic() - last >= SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            report(now)

    return forward


def _train_in_parallel(jobs: Sequence[Job], report: Report | None) -> dict[str, Trained]:
    # Spawn instead of fork: a child forked after OpenMP has run hangs.
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    waiting = {job.name: context.Process(target=_run_worker, args=(job, messages)) for job in jobs}
    running: dict[str, BaseProcess] = {}
    trained: dict[str, Trained] = {}
    try:
        while waiting or running:
            untrained = waiting.keys() | running.keys()
            ready = [job for job in jobs if job.name in waiting and job.start not in untrained]
            ready.sort(key=lambda job: not job.start)  # the longest chains go on first
            for job in ready[: machine.cores() - len(running)]:
                running[job.name] = waiting.pop(job.name)
                running[job.name].start()
            name, message = _receive(messages, running)
            if isinstance(message, Progress):
                if report:
                    report(name, message)
            elif isinstance(message, Trained):
                trained[name] = message
                running.pop(name).join()
            else:
                raise LikelyError(f"training of {name} failed: {message}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    return {job.name: trained[job.name] for job in jobs}


def _receive(
    messages: Any, running: Mapping[str, BaseProcess]
) -> tuple[str, Progress | Trained | str]:
    """Waits for the next message of a worker; a worker that died silently counts as one."""
    while True:
        ended = [name for name, process in running.items() if process.exitcode is not None]
        try:
            # The last message of an ended process has arrived by now, and is returned first.
            message: tuple[str, Progress | Trained | str] = messages.get(
                timeout=0 if ended else 1.0
            )
            return message
        except queue.Empty:
            for name in ended:
                return name, f"its process ended with code {running[name].exitcode}"


def _run_worker(job: Job, messages: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        messages.put((job.name, job.run(lambda name, now: messages.put((name, now)))))
    except LikelyError as error:
        messages.put((job.name, str(error)))
    except Exception as error:
        traceback.print_exc()
        messages.put((job.name, f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """Ends this process once its parent is gone; safe, because files are written by renaming."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
