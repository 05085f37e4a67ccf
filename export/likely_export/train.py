"""One training loop for every model family.

The loop knows a model only by `objective` and `evaluate`, both in nats a picture.
Weights are averaged exponentially as they descend, and the average is what is
validated and kept; after a second stretch, the mean of those that ended the
stretches, where it is better. On one device, a run that was interrupted goes on from its
last checkpoint to the very weights that it would have reached undisturbed: the
data order is a function of (seed, epoch), and every other random number comes
from generators whose state the checkpoint holds.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from likely.errors import DeviceError, InvalidInput, LikelyError
from likely_export.data import Dataset, Split
from likely_export.optimisers import Precision, Training, optimisers

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
LOG = "log.jsonl"
STEPS_BETWEEN_LOOKS = 100  # at the objective, each of which waits for a GPU


class Model(Protocol):
    """What the loop needs of an `nn.Module` to train it."""

    config: Any

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """What training lowers, nats (n,), for x: uint8 (n, c, h, w) and y: int64 (n,)."""

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """What validation compares, nats (n,), the same at every call."""


@runtime_checkable
class Expecting(Protocol):
    """A model that learns more from pictures drawn afresh, if told what they are drawn by."""

    def expected_objective(self, x: Tensor, y: Tensor, chances: Tensor) -> Tensor:
        """What training lowers, nats (n,), for x drawn by Bernoulli(chances), each (n, c, h, w)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a model is trained on.

    Attributes:
        device: `auto` takes a GPU if there is one.
        devices: how many; more than one splits every batch among them.
        precision: another than what suits the training and the processor.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    precision: Precision | None = None

    def fabric(self, precision: Precision = "32-true") -> Fabric:
        """A launched Fabric, of that precision where it suits and no other was chosen.

        Raises:
            DeviceError: CUDA is asked for and not there, or there are fewer cards.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("device cuda was asked for, but torch sees no CUDA device")
        if self._on_card and self.devices > (there := torch.cuda.device_count()):
            raise DeviceError(
                f"{self.devices} CUDA devices were asked for, but torch sees no more than {there}"
            )
        fabric = Fabric(
            accelerator=self.device, devices=self.devices, precision=self.arithmetic(precision)
        )
        fabric.launch()
        # Else a card convolves with 10 bits of a float32's 23, whatever the precision's name.
        torch.backends.cudnn.allow_tf32 = False
        if self.devices > 1:
            # Kernels of 1 x 1 lie alike in either layout; torch says so on every device.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return fabric

    def check(self, training: Training, pictures: int) -> None:
        """Returns if a training on so many pictures can be divided among so many devices.

        Raises:
            InvalidInput: it ends by the clock, and each device has its own, or its batches leave
                some devices more pictures than others.
        """
        if self.devices > 1 and training.budget_seconds:
            raise InvalidInput(
                "training.budget_seconds",
                f"{training.budget_seconds:g} seconds are over at another step on each of "
                f"{self.devices} devices: give steps or epochs, or train on one",
            )
        if (batch := min(training.batch, pictures)) % self.devices:
            raise InvalidInput(
                "training.batch",
                f"{batch} pictures a step are not the same number on each of {self.devices} "
                f"devices: give a multiple of {self.devices} that is not above the {pictures} "
                "pictures to train on",
            )

    def arithmetic(self, precision: Precision) -> Precision:
        """The precision chosen; without a choice that one, but bfloat16 only in hardware.

        What has no units for it is several times slower in it than in float32. Only x86
        processors (AVX-512 BF16) and NVIDIA cards are taken to have any.
        """
        if self.precision:
            return self.precision
        lacking = precision != "32-true" and not _has_bfloat16(self._on_card)
        return "32-true" if lacking else precision

    @property
    def _on_card(self) -> bool:
        return self.device != "cpu" and torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: updates made.
        done: the part of the run that is over, in [0, 1].
        seconds: processor time used (wall time on a GPU).
        validation: the last mean of `evaluate`, nats a picture; NaN before the first.
        best: the lowest so far.
    """

    step: int
    done: float
    seconds: float
    validation: float
    best: float


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run came to.

    Attributes:
        weights: the file with the averaged weights and the config.
        steps: updates made.
        seconds: processor time used (wall time on a GPU).
        validation: mean of `evaluate` under these weights, nats a picture.
    """

    weights: Path
    steps: int
    seconds: float
    validation: float


def fit(
    model: Model,
    data: Dataset,
    training: Training,
    folder: Path,
    *,
    resume: bool = True,
    hardware: Hardware | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Trained:
    """Trains a model and leaves weights, checkpoint and log in the folder.

    Seeds torch's, numpy's and Python's global generators.

    Args:
        model: an `nn.Module`; trained in place, its averaged weights are in the file.
        data: trained on `train`, watched on `validate`.
        training: how.
        folder: where `checkpoint.pt`, `weights.pt` and `log.jsonl` go.
        resume: go on from the folder's checkpoint, if it has one.
        hardware: on what.
        report: called after every step, if given.

    Raises:
        InvalidInput: the checkpoint is of another model or another training, or this one does not
            go with so many devices.
        DeviceError: the device asked for is not there.
        LikelyError: the objective is no longer finite.
    """
    hardware = hardware or Hardware()
    hardware.check(training, len(data.train))
    folder.mkdir(parents=True, exist_ok=True)
    loop = _Loop(hardware.fabric(training.precision), model, data, training, folder)
    if not (resume and loop.restore()):
        loop.start()
    while not loop.finished:
        loop.advance()
        if report:
            report(loop.progress)
    return loop.keep()


def _has_bfloat16(on_card: bool) -> bool:
    if on_card:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private: may go
    return bool(asked and asked())


def restore_weights(model: nn.Module, file: Path) -> None:
    """Loads the state of a `weights.pt` into a model of the same config."""
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state"])


def check_trained(weights: Path, training: Training) -> None:
    """Returns if a `weights.pt` is of the end of a training, as far as it tells.

    Older files do not tell the settings. What the arithmetic was is not asked: a run's models may
    have been trained on several machines.

    Raises:
        InvalidInput: it is of one with other stretches, such as a shorter one that this continues,
            or with other settings.
    """
    told = torch.load(weights, map_location="cpu", weights_only=True)
    if told.get("more_epochs", ()) != training.more_epochs:
        raise InvalidInput(
            str(weights), "is of a training with other stretches: train to the end of the recipe"
        )
    wanted = dataclasses.asdict(training)
    for key, given in told.get("training", {}).items():
        if key != "precision" and wanted.get(key, given) != given:
            raise InvalidInput(
                str(weights),
                f"was trained with {key} {given} where the recipe says {wanted[key]}: "
                "train this model afresh",
            )


def begun_in(folder: Path) -> Precision | None:
    """What a model's training is computed in, by its files; None where none tells.

    Args:
        folder: the model's, whose weights and checkpoint may not be there yet.
    """
    for file in filter(Path.is_file, (folder / CHECKPOINT, folder / WEIGHTS)):
        told = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if precision := told.get("training", {}).get("precision"):
            return cast(Precision, precision)
    return None


def check_data(folder: Path, digest: str) -> None:
    """Returns if a model was trained on this data, divided likewise, as far as its files tell.

    Older weights do not say it themselves; the checkpoint beside them does.

    Args:
        folder: the model's, whose weights and checkpoint may not be there yet.
        digest: of the data.

    Raises:
        InvalidInput: it was trained on other data, or other parts of it.
    """
    for file in filter(Path.is_file, (folder / WEIGHTS, folder / CHECKPOINT)):
        told = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if "data" not in told:
            continue
        if told["data"] != digest:
            raise InvalidInput(
                str(file),
                "was trained on other data, or on another division of it, so it may have seen "
                "what is held out here: train this model afresh",
            )
        return


class _Loop:
    """The state of a run and how it moves by one step."""

    def __init__(
        self, fabric: Fabric, model: Model, data: Dataset, training: Training, folder: Path
    ) -> None:
        self.fabric, self.training, self.folder = fabric, training, folder
        self.data, self.config = data, dataclasses.asdict(model.config)
        self.name = type(model).__name__
        # Optimisers hold views of the weights, so these must have arrived on their device.
        module = fabric.to_device(cast(nn.Module, model))
        # torch's types leave this overload out.
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(module, multi_avg_fn=_averaging(training.average))
        self.average.module.eval()
        self.optimisers = optimisers(module, training)
        self.module = module
        self.objective, *self.steppers = fabric.setup(
            _Objective(module, data.train.peak), *self.optimisers
        )
        self.batches = _Batches(data.train, training, fabric.global_rank, fabric.world_size)
        self.clock = time.process_time if fabric.device.type == "cpu" else time.monotonic
        first = training.steps or math.ceil(training.epochs * self.batches.per_epoch)
        more = [math.ceil(epochs * self.batches.per_epoch) for epochs in training.more_epochs]
        self.ends = list(itertools.accumulate([first, *more], initial=0))

    def start(self) -> None:
        """A fresh run."""
        self.step, self.used, self.validated = 0, 0.0, 0
        self.validation, self.best = math.nan, math.inf
        self.best_state: dict[str, Tensor] | None = None
        self.ended, self.of_ends = 0, dict[str, Tensor]()
        self.began = self.clock()
        self.losses: list[Tensor] = []
        self._seed(self.training.seed)
        if self.fabric.is_global_zero:
            (self.folder / LOG).write_text("")

    def _seed(self, seed: int) -> None:
        """Seeds every global generator, differently on every device."""
        seed += self.fabric.global_rank
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)

    @property
    def seconds(self) -> float:
        """Time used, over all resumptions."""
        return self.used + self.clock() - self.began

    def stretches(self, step: float) -> float:
        """How many stretches are over at a step, the part of one that is not included."""
        if budget := self.training.budget_seconds:
            return min(1.0, self.seconds / budget)
        return float(np.interp(step, self.ends, range(len(self.ends))))

    @property
    def finished(self) -> bool:
        """Whether the last validation closed the run."""
        return self.validated >= self.training.validations * (len(self.ends) - 1)

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        budget = self.training.budget_seconds
        done = self.stretches(self.step) if budget else self.step / self.ends[-1]
        return Progress(self.step, done, self.seconds, self.validation, self.best)

    def advance(self) -> None:
        """One update of the weights, and a validation when it is due."""
        # The middle of a step, else the first of a stretch would move nothing.
        self._update(self.training.rate(self.stretches(self.step + 0.5)))
        self.step += 1
        if self.step % STEPS_BETWEEN_LOOKS == 0:
            self._require_finite(self.losses[-1].item())
        # A short stretch may pass several validations in one step.
        due = math.floor(self.stretches(self.step) * self.training.validations + 1e-9)
        if due > self.validated:
            self.validated = due
            self._validate()
            self._save()

    def _update(self, rate: float) -> None:
        self.objective.train()
        self.objective.zero_grad(set_to_none=True)
        loss = self.objective(*map(self.fabric.to_device, self.batches.at(self.step)))
        self.fabric.backward(loss)
        nn.utils.clip_grad_norm_(self.module.parameters(), self.training.clip, foreach=True)
        for optimiser, stepper in zip(self.optimisers, self.steppers, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            stepper.step()
        self.average.update_parameters(self.module)
        self.losses.append(loss.detach())

    def _validate(self) -> None:
        self.validation = mean_of(self._average, self.data.validate)
        loss = torch.stack(self.losses).mean().item()
        self.losses = []
        self._require_finite(loss, self.validation)
        if self.validation < self.best or not self.training.keep_best:
            self.best = self.validation
            self.best_state = _copied(self.average.module.state_dict())
        line = {"step": self.step, "train": loss, "validation": self.validation}
        if self.step in self.ends:
            line |= self._end_stretch()
        self._log(line)

    def _end_stretch(self) -> dict[str, float]:
        """Averages the averages with which the stretches ended, and keeps that where it is better.

        Each stretch ends in another place of the same valley, whose middle lies lower (Izmailov
        et al., 2018, https://arxiv.org/abs/1803.05407).
        """
        self.ended += 1
        now = self.average.module.state_dict()
        if self.ended == 1:
            self.of_ends = _copied(now)
            return {}
        for name, mean in self.of_ends.items():
            last = now[name].to(mean)
            if mean.is_floating_point():
                mean.lerp_(last, 1 / self.ended)
            else:  # a count
                mean.copy_(last)
        middle = copy.deepcopy(self.average.module)
        middle.load_state_dict(self.of_ends)
        validation = mean_of(cast(Model, middle), self.data.validate)
        if validation < self.best:
            self.best, self.best_state = validation, _copied(self.of_ends)
        return {"validation_of_ends": validation}

    def _require_finite(self, loss: float, validation: float | None = None) -> None:
        if not all(map(math.isfinite, (loss, validation or 0.0))):
            told = "" if validation is None else f", validation {validation}"
            raise LikelyError(
                f"training of {self.name} diverged before step {self.step}: "
                f"objective {loss}{told}; lower the learning rate"
            )

    @property
    def _average(self) -> Model:
        return cast(Model, self.average.module)

    def _log(self, line: dict[str, float]) -> None:
        line |= {"epoch": self.step / self.batches.per_epoch, "seconds": self.seconds}
        if self.fabric.is_global_zero:
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps({k: round(v, 4) for k, v in line.items()}) + "\n")

    def _save(self) -> None:
        state = {
            "model": self.name,
            "config": self.config,
            "training": dataclasses.asdict(self.training),
            "data": self.data.digest,
            "step": self.step,
            "seconds": self.seconds,
            "validated": self.validated,
            "validation": self.validation,
            "best": self.best,
            "best_state": self.best_state,
            "ended": self.ended,
            "of_ends": self.of_ends,
            "weights": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "random": _random_state(self.fabric.device),
        }
        if self.fabric.is_global_zero:
            _write(self.folder / CHECKPOINT, state)

    def restore(self) -> bool:
        """Takes the folder's checkpoint up; False where there is none."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return False
        # What is not a weight stays with the processor: a step's number on a card is waited for.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._check(state, path)
        self.start_from(state)
        return True

    def start_from(self, state: Mapping[str, Any]) -> None:
        """The run as it was when `state` was saved."""
        self.module.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.used, self.validated = state["step"], state["seconds"], state["validated"]
        self.validation, self.best = state["validation"], state["best"]
        self.best_state, self.losses = state["best_state"], []
        self.ended, self.of_ends = state["ended"], state["of_ends"]
        if self.fabric.is_global_zero:
            _cut_log(self.folder / LOG, self.step)
            _set_random_state(state["random"], self.fabric.device)
        else:  # the first device's noise is in the checkpoint; the others draw anew
            self._seed(self.training.seed + self.step)
        self.began = self.clock()

    def _check(self, state: Mapping[str, Any], path: Path) -> None:
        now = {"model": self.name, "config": self.config, "data": self.data.digest}
        changed = [key for key, value in now.items() if state[key] != value]
        if not self.training.continues(state["training"]):
            changed.append("training")
        if "of_ends" not in state:
            changed.append("version of likely-export")
        if changed:
            raise InvalidInput(
                str(path), f"was made with another {changed[0]}: train afresh or elsewhere"
            )

    def keep(self) -> Trained:
        """Writes the weights to be used."""
        file = self.folder / WEIGHTS
        assert self.best_state is not None
        content = {
            "model": self.name,
            "config": self.config,
            "more_epochs": self.training.more_epochs,
            "training": dataclasses.asdict(self.training),
            "data": self.data.digest,
            "state": self.best_state,
        }
        if self.fabric.is_global_zero:
            _write(file, content)
        return Trained(file, self.step, self.seconds, self.best)


class _Objective(nn.Module):
    """The objective as a forward pass, which is what Fabric's wrappers guard.

    Args:
        model: whose objective it is.
        peak: the largest value of what pictures are drawn by.
    """

    def __init__(self, model: nn.Module, peak: int) -> None:
        super().__init__()
        self.model = model
        self.peak = peak

    def forward(self, x: Tensor, y: Tensor, grey: Tensor | None = None) -> Tensor:
        """Nats a picture, mean over the batch."""
        if grey is not None and isinstance(self.model, Expecting):
            # Divided here, for a fraction that was handed in Fabric would round to bfloat16.
            return self.model.expected_objective(x, y, grey.float() / self.peak).mean()
        return cast(Model, self.model).objective(x, y).mean()


class _Batches:
    """Which pictures a step sees: a function of (seed, step) and nothing else."""

    def __init__(self, split: Split, training: Training, rank: int, ranks: int) -> None:
        self.split, self.seed = split, training.seed % (1 << 64)
        self.batch = min(training.batch, len(split))
        self.per_epoch = len(split) // self.batch
        self.rank, self.ranks = rank, ranks
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def at(self, step: int) -> tuple[Tensor, ...]:
        """This rank's share of that step: x uint8 (batch, c, h, w), y int64 (batch,).

        Where x is drawn, what it is drawn by, too: uint8 (batch, c, h, w).
        """
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._stream(epoch, 0).permutation(len(self.split))
        rows: npt.NDArray[np.int64] = self.order[i * self.batch : (i + 1) * self.batch]
        rows = rows[self.rank :: self.ranks]
        x = self.split.redraw(rows, self._stream(step, 1 + self.rank))
        arrays = [x, self.split.y[rows]]
        if self.split.grey is not None:
            arrays.append(self.split.grey[rows])
        return tuple(map(torch.from_numpy, arrays))

    def _stream(self, index: int, use: int) -> np.random.Generator:
        key, counter = [self.seed, index], [0, 0, 0, use]
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    @torch.no_grad()
    def average(averages: list[Tensor], weights: list[Tensor], count: Tensor | int) -> None:
        # A young average forgets faster, or it would be of random weights for long.
        t = int(count)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + t) / (10 + t)))

    return average


@torch.no_grad()
def mean_of(model: Model, split: Split, batch: int = 64) -> float:
    """The mean of `evaluate` over a part, nats a picture."""
    device = next(cast(nn.Module, model).parameters()).device
    total = 0.0
    for start in range(0, len(split), batch):
        x = torch.from_numpy(split.x[start : start + batch]).to(device)
        y = torch.from_numpy(split.y[start : start + batch]).to(device)
        total += model.evaluate(x, y).double().sum().item()
    return total / len(split)


def _random_state(device: torch.device) -> dict[str, Any]:
    """Of every global generator, but of cards that of this device alone."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if (cards := state["cuda"]) and device.type == "cuda":
        # Older checkpoints hold the states of all cards that their machine had.
        torch.cuda.set_rng_state(cards[min(device.index or 0, len(cards) - 1)].cpu(), device)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _cut_log(path: Path, step: int) -> None:
    """Drops what was logged after the checkpoint, for it will be logged again, and half a line."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    temporary.replace(path)


def _write(path: Path, content: object) -> None:
    """Writes by rename, so that a reader finds the old file or the new one, whole.

    Raises:
        LikelyError: it cannot be written; nothing of it is left.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk by the latter
        temporary.unlink(missing_ok=True)
        raise LikelyError(f"{path} cannot be written; is the disk full? {error}") from error
