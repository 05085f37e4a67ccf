import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from likely.errors import DeviceError, InvalidInput, LikelyError
from likely_export import data, train
from likely_export.data import Dataset, Sizes
from likely_export.optimisers import Muon, Precision, Training, optimisers
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig
from likely_export.train import Hardware, Progress


@dataclass(frozen=True)
class ToyConfig:
    shape: tuple[int, int, int]
    explode_at: int = 0


class Toy(nn.Module):
    """Independent Bernoulli pixels behind layers of all kinds, with every kind of randomness."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        c, h, w = config.shape
        self.calls = 0
        self.conv = nn.Conv2d(c, 6, 3, padding=1)
        kernel = self.conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.conv.weight = nn.Parameter(kernel)
        self.norm = nn.BatchNorm2d(6)  # its buffers must survive too
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(6 * h * w, c * h * w)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(torch.relu(self.conv(x.float()))).flatten(1)
        logits: Tensor = self.out(self.drop(flat))
        return logits

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        blank = x * float(random.random() < 0.9) * float(np.random.rand() < 0.9)
        loss = self.evaluate(x, y, self(blank) + 0.1 * torch.randn(len(x), 1))
        return loss * (torch.nan if self.calls == self.config.explode_at else 1)

    def evaluate(self, x: Tensor, y: Tensor, logits: Tensor | None = None) -> Tensor:
        logits = self(x) if logits is None else logits
        target = x.flatten(1).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return loss.sum(1)


TRAINING = Training(epochs=6, batch=16, validations=6, average=0.9, learning_rate=0.01)
MUON = replace(TRAINING, optimiser="muon", weight_decay=0.01)


class Expecting(Toy):
    """A model that can be told what pictures are drawn by."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.received: list[tuple[Tensor, Tensor]] = []

    def expected_objective(self, x: Tensor, y: Tensor, chances: Tensor) -> Tensor:
        self.received.append((x, chances))
        return super().objective(x, y)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Noisy bars, binarised afresh at each access."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 140)
    bars = np.where(y[:, None, None, None] == np.arange(4) % 2, 220, 30)
    x = np.broadcast_to(bars, (140, 1, 3, 4)).astype(np.uint8)
    path = tmp_path_factory.mktemp("bars") / "bars.npz"
    np.savez(path, x=x, y=y)
    return data.load(path, Sizes(fit=10, calibrate=10, validate=20, test=10), binarise=True)


def toy(pictures: Dataset, explode_at: int = 0) -> Toy:
    torch.manual_seed(5)
    return Toy(ToyConfig(pictures.shape, explode_at))


def state(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / train.WEIGHTS, weights_only=True)["state"]
    return found


LONGER = replace(TRAINING, epochs=3, more_epochs=(2, 1), validations=2)


@pytest.mark.parametrize(
    "training", [TRAINING, MUON, LONGER, replace(TRAINING, epochs=0, steps=29)]
)
def test_an_interrupted_run_ends_with_the_same_bits(
    pictures: Dataset, training: Training, tmp_path: Path
) -> None:
    whole = train.fit(toy(pictures), pictures, training, tmp_path / "whole")

    for stop in (7, 11, 26):  # none of them a step with a checkpoint

        def interrupt(now: Progress, stop: int = stop) -> None:
            if now.step == stop:
                raise Stop

        torch.manual_seed(stop)
        with pytest.raises(Stop):
            train.fit(toy(pictures), pictures, training, tmp_path / "cut", report=interrupt)
    torch.manual_seed(99)
    rest = train.fit(toy(pictures), pictures, training, tmp_path / "cut")

    assert (rest.steps, rest.validation) == (whole.steps, whole.validation)
    for name, weight in state(tmp_path / "whole").items():
        assert torch.equal(weight, state(tmp_path / "cut")[name]), name
    logs = [(tmp_path / run / train.LOG).read_text().splitlines() for run in ("whole", "cut")]
    assert [json.loads(line)["train"] for line in logs[0]] == [
        json.loads(line)["train"] for line in logs[1]
    ]
    last = [
        torch.load(tmp_path / run / train.CHECKPOINT, weights_only=True) for run in ("whole", "cut")
    ]
    for name, weight in last[0]["weights"].items():
        assert torch.equal(weight, last[1]["weights"][name])


def test_a_line_that_was_half_written_is_written_again(pictures: Dataset, tmp_path: Path) -> None:
    train.fit(toy(pictures), pictures, TRAINING, tmp_path)
    whole = (tmp_path / train.LOG).read_text()
    (tmp_path / train.LOG).write_text(whole + whole.splitlines()[-1][:20])
    train.fit(toy(pictures), pictures, TRAINING, tmp_path)
    assert (tmp_path / train.LOG).read_text() == whole


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_pictures_are_drawn_by_is_told_to_models_that_learn_of_it(
    pictures: Dataset, precision: Precision, tmp_path: Path
) -> None:
    model, hardware = Expecting(ToyConfig(pictures.shape)), Hardware("cpu", precision=precision)
    forty = replace(TRAINING, epochs=0, steps=40)
    train.fit(model, pictures, forty, tmp_path / "drawn", hardware=hardware)
    assert len(model.received) == 40
    x, chances = (torch.stack(each) for each in zip(*model.received, strict=True))
    assert set(x.unique().tolist()) == {0, 1}
    assert torch.allclose(chances.unique(), torch.tensor([30 / 255, 220 / 255]))
    for chance in chances.unique():
        drawn = x[chances == chance].double()
        assert drawn.mean().item() == pytest.approx(chance.item(), abs=4 * 0.5 / len(drawn) ** 0.5)

    given = replace(pictures, train=replace(pictures.train, grey=None))
    model = Expecting(ToyConfig(pictures.shape))
    train.fit(model, given, TRAINING, tmp_path / "given", hardware=hardware)
    assert model.calls and not model.received


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_autoregressive_model_learns_of_what_pictures_are_drawn_by(
    pictures: Dataset, precision: Precision, tmp_path: Path
) -> None:
    config = PixelCNNConfig(pictures.shape, 2, labels=2, channels=8, layers=1, head=8)
    done = train.fit(
        PixelCNN(config),
        pictures,
        replace(MUON, epochs=30, learning_rate=0.03),
        tmp_path,
        hardware=Hardware("cpu", precision=precision),
    )
    assert done.validation < 7  # of 12 coins' 8.3; the pictures' own are 4.6


def test_training_lowers_the_objective_and_says_how_far_it_is(
    pictures: Dataset, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    model = toy(pictures)
    before = train.mean_loss(model.eval(), pictures.validate)
    done = train.fit(model, pictures, TRAINING, tmp_path, report=seen.append)
    assert done.validation < before - 1
    assert [now.step for now in seen] == list(range(1, done.steps + 1))
    assert seen[-1].done == 1 and done.steps == 6 * (90 // 16)
    lines = [json.loads(line) for line in (tmp_path / train.LOG).read_text().splitlines()]
    assert len(lines) == TRAINING.validations and lines[-1]["step"] == done.steps
    assert min(line["validation"] for line in lines) == pytest.approx(done.validation, abs=1e-4)


def test_the_weights_kept_are_those_that_were_validated(pictures: Dataset, tmp_path: Path) -> None:
    done = train.fit(toy(pictures), pictures, TRAINING, tmp_path)
    again = toy(pictures)
    again.load_state_dict(state(tmp_path))
    # Not to the bit: where a tensor lies in memory decides in which order some processors add.
    found = train.mean_loss(again.eval(), pictures.validate)
    assert found == pytest.approx(done.validation, rel=1e-6)


def test_two_seeds_and_two_runs(pictures: Dataset, tmp_path: Path) -> None:
    settings = (TRAINING, TRAINING, replace(TRAINING, seed=1))
    for i, training in enumerate(settings):
        train.fit(toy(pictures), pictures, training, tmp_path / str(i))
    first, again, other = (state(tmp_path / str(i))["out.weight"] for i in range(3))
    assert torch.equal(first, again) and not torch.equal(first, other)


class Saturating(Toy):
    """A model whose gradients are subnormal, as those of a saturated sigmoid."""

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        self.gradient = torch.ones(1, requires_grad=True)
        (self.gradient * 1e-39).backward()
        return super().objective(x, y)


@pytest.mark.skipif(
    not torch.set_flush_denormal(False), reason="this processor cannot flush subnormal numbers"
)
def test_subnormal_numbers_do_not_slow_training(pictures: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Saturating(ToyConfig(pictures.shape))
    train.fit(model, pictures, replace(TRAINING, epochs=1, validations=1), tmp_path)
    assert model.gradient.grad is not None and model.gradient.grad.item() == 0
    assert (torch.tensor(1e-39) * 1).item() > 0  # the caller's arithmetic is as it was


def test_a_budget_of_processor_time_ends_a_run(pictures: Dataset, tmp_path: Path) -> None:
    training = Training(budget_seconds=0.3, batch=16, validations=3)
    done = train.fit(toy(pictures), pictures, training, tmp_path)
    assert done.steps > 5 and 0.3 <= done.seconds < 3


def test_a_run_that_diverges_says_so(pictures: Dataset, tmp_path: Path) -> None:
    with pytest.raises(LikelyError, match=r"Toy diverged before step \d+: objective nan"):
        train.fit(toy(pictures, explode_at=6), pictures, TRAINING, tmp_path)


def test_a_run_that_diverges_says_so_long_before_it_validates(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "STEPS_BETWEEN_CHECKS", 4)
    seldom = replace(TRAINING, validations=1)
    with pytest.raises(LikelyError, match=r"Toy diverged before step 8: objective nan; lower"):
        train.fit(toy(pictures, explode_at=6), pictures, seldom, tmp_path)


def test_a_checkpoint_of_another_training_is_refused(pictures: Dataset, tmp_path: Path) -> None:
    train.fit(toy(pictures), pictures, TRAINING, tmp_path)
    with pytest.raises(InvalidInput, match="another training"):
        train.fit(toy(pictures), pictures, replace(TRAINING, batch=8), tmp_path)
    with pytest.raises(InvalidInput, match="another config"):
        train.fit(toy(pictures, explode_at=99), pictures, TRAINING, tmp_path)
    train.fit(toy(pictures), pictures, replace(TRAINING, batch=8), tmp_path, resume=False)


def test_a_checkpoint_of_an_older_version_is_refused(pictures: Dataset, tmp_path: Path) -> None:
    train.fit(toy(pictures), pictures, TRAINING, tmp_path)
    content = torch.load(tmp_path / train.CHECKPOINT, weights_only=True)
    del content["of_ends"]
    torch.save(content, tmp_path / train.CHECKPOINT)
    with pytest.raises(InvalidInput, match="another version of likely-export"):
        train.fit(toy(pictures), pictures, TRAINING, tmp_path)


def test_a_finished_run_goes_on_when_its_recipe_gains_a_stretch(
    pictures: Dataset, tmp_path: Path
) -> None:
    whole = train.fit(toy(pictures), pictures, LONGER, tmp_path / "whole")
    for stretches in range(3):
        training = replace(LONGER, more_epochs=LONGER.more_epochs[:stretches])
        grown = train.fit(toy(pictures), pictures, training, tmp_path / "grown")
    assert (grown.steps, grown.validation) == (whole.steps, whole.validation)
    for name, weight in state(tmp_path / "whole").items():
        assert torch.equal(weight, state(tmp_path / "grown")[name]), name
    lines = (tmp_path / "grown" / train.LOG).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == pytest.approx(
        [1.5, 3, 4, 5, 5.5, 6], abs=0.2
    )
    with pytest.raises(InvalidInput, match="another training"):
        train.fit(toy(pictures), pictures, replace(LONGER, more_epochs=(2,)), tmp_path / "grown")


@pytest.mark.parametrize(("keep_best", "kept"), [(True, 2.0), (False, 4.0)])
def test_progress_tells_what_would_be_kept_now(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_best: bool, kept: float
) -> None:
    means = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(train, "mean_loss", lambda *_: next(means))
    seen: list[Progress] = []
    training = replace(TRAINING, epochs=1, validations=3, keep_best=keep_best)
    done = train.fit(toy(pictures), pictures, training, tmp_path, report=seen.append)
    assert (seen[-1].validation, seen[-1].kept, done.validation) == (4.0, kept, kept)


@pytest.mark.parametrize("found", [[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
def test_what_ended_the_stretches_is_averaged_where_that_is_better(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[float]
) -> None:
    means = iter(found)
    monkeypatch.setattr(train, "mean_loss", lambda *_: next(means))
    training = replace(TRAINING, epochs=1, validations=1, keep_best=False)
    train.fit(toy(pictures), pictures, training, tmp_path)
    first = state(tmp_path)
    training = replace(training, more_epochs=(1,))
    grown = train.fit(toy(pictures), pictures, training, tmp_path)
    average = torch.load(tmp_path / train.CHECKPOINT, weights_only=True)["average"]
    for name, weight in state(tmp_path).items():
        last = average[f"module.{name}"]
        assert not torch.equal(first[name], last)
        is_mean = found[2] < found[1] and last.is_floating_point()
        torch.testing.assert_close(weight, (first[name] + last) / 2 if is_mean else last)
    assert grown.validation == min(found)
    lines = [json.loads(line) for line in (tmp_path / train.LOG).read_text().splitlines()]
    assert [line.get("validation_of_ends") for line in lines] == [None, found[2]]


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("unexpected pos 4 vs 0")])
def test_nothing_but_whole_files_is_ever_seen(
    pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    train.fit(toy(pictures), pictures, TRAINING, tmp_path)
    before = (tmp_path / train.CHECKPOINT).read_bytes()

    def full(_: object, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    message = rf"checkpoint\.pt cannot be written; is the disk full\? {error}"
    with pytest.raises(LikelyError, match=message):
        train.fit(toy(pictures), pictures, TRAINING, tmp_path, resume=False)
    assert (tmp_path / train.CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_muon_moves_kernels_in_place_and_along_orthogonal_directions() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=layout))
        optimiser = Muon([weight], lr=1.0, weight_decay=0.0)
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        optimiser.step()
        moved = weight.detach().flatten(1)
        assert torch.linalg.svdvals(moved).sub(1).abs().max() < 0.35
        assert nn.functional.cosine_similarity(moved, -weight.grad.flatten(1)).min() > 0.5


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_moves_as_that_of_pytorch_does(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    pair = Muon([ours], lr=0.1, weight_decay=0.2), torch.optim.Muon([theirs], 0.1, 0.2)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        for optimiser in pair:
            optimiser.step()
    # They differ by the roundings of bfloat16, which PyTorch's is computed in.
    assert (ours - theirs).abs().max() < 0.02 < (ours - 1).abs().max()


def test_every_weight_has_one_optimiser(pictures: Dataset) -> None:
    for training in (TRAINING, MUON):
        model = toy(pictures)
        found = optimisers(model, training)
        held = sum(w.numel() for o in found for g in o.param_groups for w in g["params"])
        assert held == sum(weight.numel() for weight in model.parameters())


def test_rates_rise_and_fall_linearly() -> None:
    training = Training(steps=1, warm_up=0.2)
    assert [training.rate(p) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert Training(steps=1, warm_up=0).rate(0) == 1


def test_rates_rise_anew_to_half_their_peaks() -> None:
    training = Training(steps=1, warm_up=0.2, more_epochs=(1, 1))
    found = [training.rate(p) for p in (0.2, 1 - 1e-9, 1, 1.1, 1.2, 1.6, 2.2, 3)]
    assert found == pytest.approx([1, 0, 0, 0.25, 0.5, 0.25, 0.25, 0], abs=1e-6)
    assert Training(budget_seconds=1, warm_up=0).rate(1) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"steps": 1, "epochs": 1},
        {"steps": -1},
        {"steps": 1, "batch": 0},
        {"steps": 1, "clip": float("inf")},
        {"steps": 1, "more_epochs": (1, 0)},
        {"steps": 1, "more_epochs": (float("inf"),)},
        {"budget_seconds": 1, "more_epochs": (1,)},
        {"steps": 1, "weight_decay": -0.1},
        {"steps": 1, "weight_decay": float("inf")},
        {"steps": 1, "muon_weight_decay": -0.1},
        {"steps": 1, "betas": (0.9, 1.0)},
        {"steps": 1, "betas": (-0.1, 0.9)},
        {"steps": 1, "seed": 1 << 64},
        {"steps": 1, "seed": -(1 << 63) - 1},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="training"):
        Training(**wrong)


@pytest.mark.parametrize("seed", [-(1 << 63), (1 << 64) - 1])
def test_the_outermost_seeds_are_torchs_too(seed: int) -> None:
    torch.Generator().manual_seed(Training(steps=1, seed=seed).seed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what is to be missing")
def test_a_device_that_is_not_there_is_an_error(pictures: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        train.fit(toy(pictures), pictures, TRAINING, tmp_path, hardware=Hardware("cuda"))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_cards_than_there_are_is_an_error(
    device: Any, pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    hardware = Hardware(device, devices=2, precision="32-true")
    with pytest.raises(DeviceError, match=r"2 CUDA devices .* no more than 1"):
        train.fit(toy(pictures), pictures, TRAINING, tmp_path, hardware=hardware)


@pytest.mark.parametrize(
    ("batch", "devices", "says"),
    [(1, 2, "1 pictures per step"), (3, 2, "a multiple of 2"), (96, 4, "90 .* not above the 90")],
)
def test_every_device_has_as_many_pictures_of_a_batch_as_the_others(
    batch: int,
    devices: int,
    says: str,
    pictures: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Hardware, "fabric", None)  # which would begin processes
    assert len(pictures.train) == 90
    training, hardware = replace(TRAINING, batch=batch), Hardware("cpu", devices)
    with pytest.raises(InvalidInput, match=rf"training\.batch: .*{says}"):
        train.fit(toy(pictures), pictures, training, tmp_path, hardware=hardware)
    hardware.check(replace(training, batch=4), 90)


@pytest.mark.parametrize("saved", [1, 3])
@pytest.mark.parametrize("index", [0, 1])
def test_of_cards_the_state_of_the_one_trained_on_is_kept(
    index: int, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, kept = torch.device("cuda", index), torch.Generator().manual_seed(3).get_state()
    found: list[tuple[Tensor, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [kept] * 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: kept + device.index)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: found.append(given))
    state = train._random_state(card)
    assert len(state["cuda"]) == 1 and torch.equal(state["cuda"][0], kept + index)
    if saved > 1:  # as older checkpoints have them, of machines with more cards
        state["cuda"] = [kept + place for place in range(saved)]
    train._set_random_state(state, card)
    train._set_random_state(state, torch.device("cpu"))
    ((taken, there),) = found
    assert torch.equal(taken, kept + index) and there == card
    assert train._random_state(torch.device("cpu"))["cuda"] == []


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_left_to_processors_that_have_it(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert Hardware("cpu").arithmetic("bf16-mixed") == ("bf16-mixed" if has else "32-true")
    assert Hardware("cpu").arithmetic("32-true") == "32-true"
    assert Hardware("cpu", precision="bf16-mixed").arithmetic("32-true") == "bf16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not has)
    assert Hardware("auto").arithmetic("bf16-mixed") == ("32-true" if has else "bf16-mixed")


def test_a_card_is_told_not_to_round_what_it_convolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Hardware("cpu").fabric("32-true")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_training_runs_on_a_gpu(pictures: Dataset, tmp_path: Path) -> None:
    hardware = Hardware("cuda", precision="bf16-mixed")
    assert train.fit(toy(pictures), pictures, MUON, tmp_path, hardware=hardware).steps == 30
    saved = torch.load(tmp_path / train.CHECKPOINT, weights_only=True)
    assert len(saved["random"]["cuda"]) == 1
    saved["random"]["cuda"] *= torch.cuda.device_count() + 1  # as of a machine with one card more
    torch.save(saved, tmp_path / train.CHECKPOINT)
    longer = replace(MUON, more_epochs=(1,))
    assert train.fit(toy(pictures), pictures, longer, tmp_path, hardware=hardware).steps == 35
