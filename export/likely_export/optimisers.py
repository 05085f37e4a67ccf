"""The settings of a training, its learning rate schedule, AdamW and Muon."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from likely.errors import InvalidInput

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True, slots=True)
class Training:
    """How a model is trained; exactly one of `steps`, `epochs` and `budget_seconds` is set.

    Attributes:
        steps: updates of the weights.
        epochs: passes over the training part.
        budget_seconds: processor time of this process (wall time on a GPU), on one device.
            The schedule then follows the clock, so the run cannot be repeated to the bit.
        batch: pictures per step, over all devices.
        optimiser: `adamw`, or `muon` for matrices together with AdamW for all other weights
            (Jordan et al., 2024).
        learning_rate: AdamW's peak learning rate.
        muon_learning_rate: Muon's peak learning rate.
        betas: AdamW's betas.
        weight_decay: AdamW's weight decay, for weights with two or more axes.
        muon_weight_decay: Muon's weight decay.
        warm_up: share of each stretch in which the learning rates rise from 0, before they
            fall linearly back to 0.
        more_epochs: lengths of further stretches, in epochs. In each, the learning rates rise
            again to half their previous peaks, and fall to 0 (warm restarts: Loshchilov and
            Hutter, 2017, https://arxiv.org/abs/1608.03983). If the recipe of a finished run
            gains a stretch, the run continues. The mean of the weights at the ends of the
            stretches is kept if it validates better.
        average: decay of the weight average; at step t it is min(average, (1 + t) / (10 + t)).
        precision: of the arithmetic, by Lightning Fabric's name; weights stay float32. In a
            recipe, the precision it is meant for; in a run, the one that its machine used.
        clip: largest norm of the gradient of the mean objective.
        validations: validations (and checkpoints) per stretch.
        keep_best: whether to keep the weight average that validated best instead of the last.
        seed: of the data order and of everything random in the objective.
    """

    steps: int = 0
    epochs: float = 0.0
    budget_seconds: float = 0.0
    batch: int = 64
    optimiser: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    muon_weight_decay: float = 0.01
    warm_up: float = 0.03
    more_epochs: tuple[float, ...] = ()
    average: float = 0.996
    precision: Precision = "32-true"
    clip: float = 100.0
    validations: int = 20
    keep_best: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("steps", "epochs", "budget_seconds")}
        if min(lengths.values()) < 0 or sum(length > 0 for length in lengths.values()) != 1:
            settings = ", ".join(f"{name} = {length:g}" for name, length in lengths.items())
            raise InvalidInput("training", f"{settings}; exactly one must be above 0")
        for name in ("batch", "clip", "validations", "learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(
                    f"training.{name}", f"{getattr(self, name)}; it must be above 0 and finite"
                )
        if self.budget_seconds and self.more_epochs:
            raise InvalidInput("training.more_epochs", "cannot be combined with budget_seconds")
        if not all(0 < epochs < math.inf for epochs in self.more_epochs):
            raise InvalidInput(
                "training.more_epochs", f"{self.more_epochs}; all must be above 0 and finite"
            )
        for name in ("warm_up", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInput(f"training.{name}", f"{getattr(self, name)} is not in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidInput("training.betas", f"{self.betas} are not both in [0, 1)")
        for name in ("weight_decay", "muon_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidInput(
                    f"training.{name}", f"{getattr(self, name)}; it must be at least 0 and finite"
                )
        if not -(1 << 63) <= self.seed < 1 << 64:  # the range that torch accepts
            raise InvalidInput("training.seed", f"{self.seed} is not in [-2^63, 2^64)")

    def rate(self, progress: float) -> float:
        """The factor of the learning rates, in [0, 1]; each stretch peaks at half the peak before.

        Args:
            progress: in stretches; 1.5 is halfway through the second one.
        """
        if progress >= 1 + len(self.more_epochs):
            return 0.0
        stretch, progress = divmod(progress, 1)
        if progress < self.warm_up:
            rate = progress / self.warm_up
        else:
            rate = (1 - progress) / (1 - self.warm_up)
        return rate / 2**stretch

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """Whether this training, up to some point, is the `earlier` one, given as a dict."""
        now, before = dataclasses.asdict(self), {"more_epochs": (), **earlier}
        more, fewer = now.pop("more_epochs"), tuple(before.pop("more_epochs"))
        return now == before and more[: len(fewer)] == fewer


class Muon(torch.optim.Muon):
    """Muon for weights with two or more axes, each viewed as a matrix (out, everything else).

    PyTorch's own Muon orthogonalises updates in bfloat16. On processors without instructions for
    bfloat16, this takes fifteen times as long as in float32, more than the rest of a step. On
    CPUs, this class therefore computes them in the weights' own precision.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        self.weights = list(weights)
        views = [_matrix(weight, weight).detach() for weight in self.weights]
        super().__init__(views, lr=lr, weight_decay=weight_decay)
        self.views = views

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the weights once; the views share memory with them."""
        loss = None if closure is None else closure()
        for weight, view in zip(self.weights, self.views, strict=True):
            if weight.grad is not None:
                self._update(view, _matrix(weight.grad, weight))
        return loss

    def _update(self, view: Tensor, grad: Tensor) -> None:
        group = self.param_groups[0]
        rate, momentum = group["lr"], group["momentum"]
        if not (state := self.state[view]):
            state["momentum_buffer"] = torch.zeros_like(view)
        mean = state["momentum_buffer"]
        mean.lerp_(grad, 1 - momentum)
        update = orthogonal(grad.lerp(mean, momentum), torch.bfloat16 if view.is_cuda else None)
        view.mul_(1 - rate * group["weight_decay"])
        view.add_(update, alpha=-rate * math.sqrt(max(1, view.shape[0] / view.shape[1])))


def orthogonal(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns nearly U V^T of a matrix U S V^T, by Newton-Schulz iteration.

    The singular values of the result are about 1. Five steps of Muon's polynomial (Jordan et al.,
    2024, https://kellerjordan.github.io/posts/muon/).

    Args:
        matrix: (out, in).
        dtype: of the arithmetic; the matrix's own by default.
    """
    wide = matrix.to(dtype or matrix.dtype)
    wide = wide.T if len(matrix) > matrix.shape[1] else wide
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(
            wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445
        )
    return (wide.T if len(matrix) > matrix.shape[1] else wide).to(matrix.dtype)


def _matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """Reshapes to (out, everything else), in the weight's memory order, so that it is a view."""
    if tensor.ndim == 4 and not weight.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(len(tensor), -1)


def optimisers(module: nn.Module, training: Training) -> list[torch.optim.Optimizer]:
    """Returns the optimisers of a training; each group stores its peak learning rate as `peak`."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    matrices: list[Tensor] = []
    if training.optimiser == "muon":
        named = getattr(module, "matrices", None)
        matrices = list(named()) if named else list(_matrices(module))
    taken = {id(weight) for weight in matrices}
    rest = [weight for weight in weights if id(weight) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [w for w in rest if w.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [w for w in rest if w.ndim <= 1], "weight_decay": 0.0},
    ]
    chosen: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, foreach=True)
    ]
    if matrices:
        chosen.append(Muon(matrices, training.muon_learning_rate, training.muon_weight_decay))
    for optimiser in chosen:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return chosen


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    """Yields the weights of linear and convolutional layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            yield layer.weight
