"""One training loop for every model family.

The loop uses only two methods of a model, `objective` and `evaluate`, both in nats per
picture. It keeps an exponential moving average of the weights. This average is what is
validated and kept. After a second stretch, the mean of the averages at the ends of the
stretches is kept instead if it validates better. On one device, an interrupted run that
resumes from its last checkpoint ends with exactly the weights that it would have had
without the interruption: the data order is a function of (seed, epoch), and all other
random numbers come from generators whose state is in the checkpoint.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
STEPS_BETWEEN_CHECKS = 100  # between checks that the objective is finite; each waits for the GPU


class Model(Protocol):
    """What the loop requires of an `nn.Module`."""

    config: Any

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss in nats, (n,), for x: uint8 (n, c, h, w) and y: int64 (n,)."""

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """The validation loss in nats, (n,), which must be the same in every call."""


@runtime_checkable
class Expecting(Protocol):
    """A model whose loss can be averaged over the binarisation of pictures."""

    def expected_objective(self, x: Tensor, y: Tensor, chances: Tensor) -> Tensor:
        """The training loss in nats, (n,), for x drawn by Bernoulli(chances), each (n, c, h, w)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The hardware and precision for a training.

    Attributes:
        device: `auto` uses a GPU if there is one.
        devices: number of devices; with more than one, every batch is divided among them.
        precision: overrides the training's precision; None chooses what suits the processor.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    precision: Precision | None = None

    def fabric(self, precision: Precision = "32-true") -> Fabric:
        """Returns a launched Fabric with the precision that `arithmetic` chooses.

        Raises:
            DeviceError: CUDA is requested but not available, or with fewer devices.
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
        # By default, GPUs convolve float32 in TF32, with 10 bits of mantissa instead of 23.
        torch.backends.cudnn.allow_tf32 = False
        if self.devices > 1:
            # The strides of 1x1 kernels are ambiguous but equivalent; every device would warn.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return fabric

    def check(self, training: Training, pictures: int) -> None:
        """Raises unless a training on so many pictures can be divided among the devices.

        Raises:
            InvalidInput: the training ends by the clock, which differs between devices, or its
                batches cannot be divided evenly.
        """
        if self.devices > 1 and training.budget_seconds:
            raise InvalidInput(
                "training.budget_seconds",
                f"{training.budget_seconds:g} seconds end at a different step on each of "
                f"{self.devices} devices: set steps or epochs, or train on one",
            )
        if (batch := min(training.batch, pictures)) % self.devices:
            raise InvalidInput(
                "training.batch",
                f"{batch} pictures per step cannot be divided evenly among {self.devices} "
                f"devices: set a multiple of {self.devices} that is not above the {pictures} "
                "pictures to train on",
            )

    def arithmetic(self, precision: Precision) -> Precision:
        """The precision chosen, or else this one, if it is not bfloat16 without hardware for it.

        Without such hardware, bfloat16 is several times slower than float32. Only x86 processors
        (AVX-512 BF16) and NVIDIA GPUs are checked; all others are assumed to lack it.
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
    """Progress of a run.

    Attributes:
        step: number of updates so far.
        done: share of the run that is done, in [0, 1].
        seconds: processor time used (wall time on a GPU).
        validation: latest mean of `evaluate`, nats per picture; NaN before the first.
        kept: validation of the weights that would be kept now; the lowest so far, or with
            `keep_best` = false the latest.
    """

    step: int
    done: float
    seconds: float
    validation: float
    kept: float


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of a run.

    Attributes:
        weights: file with the averaged weights and the config.
        steps: number of updates.
        seconds: processor time used (wall time on a GPU).
        validation: mean of `evaluate` with these weights, nats per picture.
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
    """Trains a model, and writes its weights, checkpoints and log to a folder.

    Seeds the global generators of torch, numpy and Python.

    Args:
        model: an `nn.Module`, which is trained in place; the file contains averaged weights.
        data: data set; trains on its part `train` and validates on `validate`.
        training: settings of the training.
        folder: where to write `checkpoint.pt`, `weights.pt` and `log.jsonl`.
        resume: whether to resume from the folder's checkpoint, if there is one.
        hardware: devices and precision.
        report: called after every step, if given.

    Raises:
        InvalidInput: the checkpoint is of another model or training, or the training cannot be
            divided among the devices.
        DeviceError: the requested device is not available.
        LikelyError: the objective is no longer finite, or a file cannot be written.
    """
    hardware = hardware or Hardware()
    hardware.check(training, len(data.train))
    folder.mkdir(parents=True, exist_ok=True)
    loop = _Loop(hardware.fabric(training.precision), model, data, training, folder)
    if not (resume and loop.restore()):
        loop.start()
    with _subnormals_flushed():
        while not loop.finished:
            loop.advance()
            if report:
                report(loop.progress)
    return loop.write_weights()


@contextmanager
def _subnormals_flushed() -> Iterator[None]:
    """Treats subnormal numbers as 0 in this thread, and afterwards as numbers, torch's default.

    The gradients of saturated sigmoids are such numbers, on which CPUs are many times slower.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _has_bfloat16(on_card: bool) -> bool:
    if on_card:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private: may disappear
    return bool(asked and asked())


def check_trained(weights: Path, training: Training) -> None:
    """Raises unless a `weights.pt` is the result of this training, as far as the file tells.

    Older files do not contain the settings. The precision is not compared, because the models of
    a run may have been trained on several machines.

    Raises:
        InvalidInput: the file is of a training with other stretches, such as a shorter one that
            this one continues, or with other settings.
    """
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    if stored.get("more_epochs", ()) != training.more_epochs:
        raise InvalidInput(
            str(weights), "was trained with other stretches: train to the end of the recipe"
        )
    wanted = dataclasses.asdict(training)
    for key, setting in stored.get("training", {}).items():
        if key != "precision" and wanted.get(key, setting) != setting:
            raise InvalidInput(
                str(weights),
                f"was trained with {key} {setting} where the recipe says {wanted[key]}: "
                "train this model afresh",
            )


def begun_precision(folder: Path) -> Precision | None:
    """Returns the precision in which a model's training began; None if no file tells.

    Args:
        folder: the model's folder; its weights and checkpoint need not exist yet.
    """
    for file in filter(Path.is_file, (folder / CHECKPOINT, folder / WEIGHTS)):
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if precision := stored.get("training", {}).get("precision"):
            return cast(Precision, precision)
    return None


def check_data(folder: Path, digest: str) -> None:
    """Raises unless a model was trained on these data, split alike, as far as its files tell.

    Older weights do not contain the digest; the checkpoint beside them does.

    Args:
        folder: the model's folder; its weights and checkpoint need not exist yet.
        digest: of the data.

    Raises:
        InvalidInput: the model was trained on other data or another split.
    """
    for file in filter(Path.is_file, (folder / WEIGHTS, folder / CHECKPOINT)):
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if "data" not in stored:
            continue
        if stored["data"] != digest:
            raise InvalidInput(
                str(file),
                "was trained on other data, or on another split of it, so it may have seen "
                "what is held out here: train this model afresh",
            )
        return


class _Loop:
    """The state of a run, and the step that advances it."""

    def __init__(
        self, fabric: Fabric, model: Model, data: Dataset, training: Training, folder: Path
    ) -> None:
        self.fabric, self.training, self.folder = fabric, training, folder
        self.data, self.config = data, dataclasses.asdict(model.config)
        self.name = type(model).__name__
        # Optimisers hold views of the weights, so move the weights to their device first.
        module = fabric.to_device(cast(nn.Module, model))
        # torch's type stubs lack this overload.
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(module, multi_avg_fn=_ema_update(training.average))
        self.average.module.eval()
        self.optimisers = optimisers(module, training)
        self.module = module
        self.objective, *self.fabric_optimisers = fabric.setup(
            _Objective(module, data.train.peak), *self.optimisers
        )
        self.batches = _Batches(data.train, training, fabric.global_rank, fabric.world_size)
        self.clock = time.process_time if fabric.device.type == "cpu" else time.monotonic
        first = training.steps or math.ceil(training.epochs * self.batches.per_epoch)
        more = [math.ceil(epochs * self.batches.per_epoch) for epochs in training.more_epochs]
        self.stretch_ends = list(itertools.accumulate([first, *more], initial=0))

    def start(self) -> None:
        """Starts a new run."""
        self.step, self.earlier_seconds, self.validated = 0, 0.0, 0
        self.validation, self.best = math.nan, math.inf
        self.best_state: dict[str, Tensor] | None = None
        self.stretches_ended, self.mean_at_ends = 0, dict[str, Tensor]()
        self.session_start = self.clock()
        self.losses: list[Tensor] = []
        self._seed(self.training.seed)
        if self.fabric.is_global_zero:
            (self.folder / LOG).write_text("")

    def _seed(self, seed: int) -> None:
        """Seeds every global generator, with a different seed on each device."""
        seed += self.fabric.global_rank
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)

    @property
    def seconds(self) -> float:
        """Time used, in all sessions of the run."""
        return self.earlier_seconds + self.clock() - self.session_start

    def stretches(self, step: float) -> float:
        """Progress at a step, in stretches: 1.5 is halfway through the second one."""
        if budget := self.training.budget_seconds:
            return min(1.0, self.seconds / budget)
        return float(np.interp(step, self.stretch_ends, range(len(self.stretch_ends))))

    @property
    def finished(self) -> bool:
        """Whether the last validation has been made."""
        return self.validated >= self.training.validations * (len(self.stretch_ends) - 1)

    @property
    def progress(self) -> Progress:
        """Progress of the run."""
        budget = self.training.budget_seconds
        done = self.stretches(self.step) if budget else self.step / self.stretch_ends[-1]
        return Progress(self.step, done, self.seconds, self.validation, self.best)

    def advance(self) -> None:
        """Updates the weights once, and validates if it is time to."""
        # The rate at the middle of the step: at the start of a stretch it would be 0.
        self._update(self.training.rate(self.stretches(self.step + 0.5)))
        self.step += 1
        if self.step % STEPS_BETWEEN_CHECKS == 0:
            self._require_finite(self.losses[-1].item())
        # In a short stretch, several validations may fall into one step.
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
        for optimiser, stepper in zip(self.optimisers, self.fabric_optimisers, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            stepper.step()
        self.average.update_parameters(self.module)
        self.losses.append(loss.detach())

    def _validate(self) -> None:
        self.validation = mean_loss(self._average, self.data.validate)
        loss = torch.stack(self.losses).mean().item()
        self.losses = []
        self._require_finite(loss, self.validation)
        if self.validation < self.best or not self.training.keep_best:
            self.best = self.validation
            self.best_state = _copied(self.average.module.state_dict())
        line = {"step": self.step, "train": loss, "validation": self.validation}
        if self.step in self.stretch_ends:
            line |= self._end_stretch()
        self._log(line)

    def _end_stretch(self) -> dict[str, float]:
        """Averages the weights at the ends of the stretches; keeps the mean if it validates better.

        Each stretch ends at a different place in a valley whose middle is lower (Izmailov et al.,
        2018, https://arxiv.org/abs/1803.05407).
        """
        self.stretches_ended += 1
        now = self.average.module.state_dict()
        if self.stretches_ended == 1:
            self.mean_at_ends = _copied(now)
            return {}
        for name, mean in self.mean_at_ends.items():
            last = now[name].to(mean)
            if mean.is_floating_point():
                mean.lerp_(last, 1 / self.stretches_ended)
            else:  # an integer, such as a count of batches
                mean.copy_(last)
        middle = copy.deepcopy(self.average.module)
        middle.load_state_dict(self.mean_at_ends)
        validation = mean_loss(cast(Model, middle), self.data.validate)
        if validation < self.best:
            self.best, self.best_state = validation, _copied(self.mean_at_ends)
        return {"validation_of_ends": validation}

    def _require_finite(self, loss: float, validation: float | None = None) -> None:
        if not all(map(math.isfinite, (loss, validation or 0.0))):
            suffix = "" if validation is None else f", validation {validation}"
            raise LikelyError(
                f"training of {self.name} diverged before step {self.step}: "
                f"objective {loss}{suffix}; lower the learning rate"
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
            "ended": self.stretches_ended,
            "of_ends": self.mean_at_ends,
            "weights": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "random": _random_state(self.fabric.device),
        }
        if self.fabric.is_global_zero:
            _write(self.folder / CHECKPOINT, state)

    def restore(self) -> bool:
        """Resumes from the folder's checkpoint; returns False if there is none."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return False
        # On the CPU, because optimisers' step counts on a GPU would have to be waited for.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._check(state, path)
        self._set(state)
        return True

    def _set(self, state: Mapping[str, Any]) -> None:
        """Restores the run as it was when `state` was saved."""
        self.module.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.earlier_seconds, self.validated = (
            state["step"],
            state["seconds"],
            state["validated"],
        )
        self.validation, self.best = state["validation"], state["best"]
        self.best_state, self.losses = state["best_state"], []
        self.stretches_ended, self.mean_at_ends = state["ended"], state["of_ends"]
        if self.fabric.is_global_zero:
            _truncate_log(self.folder / LOG, self.step)
            _set_random_state(state["random"], self.fabric.device)
        else:  # the checkpoint has only the first device's generators; reseed the others
            self._seed(self.training.seed + self.step)
        self.session_start = self.clock()

    def _check(self, state: Mapping[str, Any], path: Path) -> None:
        now = {"model": self.name, "config": self.config, "data": self.data.digest}
        changed = [key for key, value in now.items() if state[key] != value]
        if not self.training.continues(state["training"]):
            changed.append("training")
        if "of_ends" not in state:
            changed.append("version of likely-export")
        if changed:
            raise InvalidInput(
                str(path), f"was made with another {changed[0]}: train afresh or in another folder"
            )

    def write_weights(self) -> Trained:
        """Writes the final weights."""
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
        self.fabric.barrier()  # other devices may go on to read it
        return Trained(file, self.step, self.seconds, self.best)


class _Objective(nn.Module):
    """The objective as a forward pass, because Fabric wraps `forward`.

    Args:
        model: the model whose objective it is.
        peak: the value of the brightnesses (`Split.grey`) that is white.
    """

    def __init__(self, model: nn.Module, peak: int) -> None:
        super().__init__()
        self.model = model
        self.peak = peak

    def forward(self, x: Tensor, y: Tensor, grey: Tensor | None = None) -> Tensor:
        """The mean loss over the batch, nats per picture."""
        if grey is not None and isinstance(self.model, Expecting):
            # Divided here, because Fabric would round a fraction passed in to bfloat16.
            return self.model.expected_objective(x, y, grey.float() / self.peak).mean()
        return cast(Model, self.model).objective(x, y).mean()


class _Batches:
    """The batch of each step, as a function of (seed, step) alone."""

    def __init__(self, split: Split, training: Training, rank: int, ranks: int) -> None:
        self.split, self.seed = split, training.seed % (1 << 64)
        self.batch = min(training.batch, len(split))
        self.per_epoch = len(split) // self.batch
        self.rank, self.ranks = rank, ranks
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def at(self, step: int) -> tuple[Tensor, ...]:
        """This rank's share of a step's batch: x, uint8 (batch, c, h, w), and y, int64 (batch,).

        If x is binarised, also the brightnesses it was drawn from, uint8 (batch, c, h, w).
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


def _ema_update(decay: float) -> Callable[[Any, Any, Any], None]:
    @torch.no_grad()
    def average(averages: list[Tensor], weights: list[Tensor], count: Tensor | int) -> None:
        # A smaller decay at the start, so that the initial random weights are soon forgotten.
        t = int(count)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + t) / (10 + t)))

    return average


@torch.no_grad()
def mean_loss(model: Model, split: Split, batch: int = 64) -> float:
    """Returns the mean of `evaluate` over a part, nats per picture."""
    device = next(cast(nn.Module, model).parameters()).device
    total = 0.0
    for start in range(0, len(split), batch):
        x = torch.from_numpy(split.x[start : start + batch]).to(device)
        y = torch.from_numpy(split.y[start : start + batch]).to(device)
        total += model.evaluate(x, y).double().sum().item()
    return total / len(split)


def _random_state(device: torch.device) -> dict[str, Any]:
    """States of all global generators; of GPUs, only this device's."""
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
        # Older checkpoints contain the states of all GPUs of their machine.
        torch.cuda.set_rng_state(cards[min(device.index or 0, len(cards) - 1)].cpu(), device)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _truncate_log(path: Path, step: int) -> None:
    """Drops lines logged after the checkpoint, which will be logged again, and incomplete lines."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
    temporary.replace(path)


def _write(path: Path, content: object) -> None:
    """Writes a file and renames it, so that readers see either the old or the new file, whole.

    Raises:
        LikelyError: it cannot be written; no partial file is left.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise LikelyError(f"{path} cannot be written; is the disk full? {error}") from error
