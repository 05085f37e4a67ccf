"""The request of a job: everything that its output depends on, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

from likely import bayes
from likely.answers import (
    DEFAULT_MAX_DRAWS,
    LARGEST_MAX_DRAWS,
    MAX_TEMPERATURE,
    Guarantee,
    LabelRule,
    ModelInfo,
)
from likely.errors import InvalidInput, JobError, NotAnswered
from likely.noise import SEED_LIMIT
from likely.outliers import require_alpha

ALPHA = 0.05  # default alpha
SHARD = 4096  # default number of pictures in a shard
MOST_SHARDS = 100_000


class Format(StrEnum):
    """File format of the shards."""

    PARQUET = "parquet"
    NPZ = "npz"
    WEBDATASET = "webdataset"

    @property
    def suffix(self) -> str:
        """Suffix of a shard's file name."""
        return ".tar" if self is Format.WEBDATASET else f".{self}"


@dataclass(frozen=True, slots=True)
class Generation:
    """A task that draws pictures.

    Attributes:
        runs: label and count of each run of consecutive pictures. A label of None means that each
            picture's label is drawn from the model's priors.
        seed: seed of the random numbers, in [-2**63, 2**63).
        temperature: factor on the noise that levels are drawn with, in [0, 2].
        alpha: alpha of the self-check; None for no self-check.
        max_draws: maximum number of draws of one picture, the first included, in [1, 100].
        kind: always `generate`.
    """

    runs: tuple[tuple[int | None, int], ...]
    seed: int = 0
    temperature: float = 1.0
    alpha: float | None = None
    max_draws: int = DEFAULT_MAX_DRAWS
    kind: Literal["generate"] = "generate"

    @property
    def total(self) -> int:
        """Number of pictures."""
        return sum(count for _, count in self.runs)

    def between(self, start: int, stop: int) -> list[tuple[int | None, int, int]]:
        """The parts of runs that make up pictures start to stop - 1: label, first index, count."""
        parts, at = [], 0
        for label, count in self.runs:
            first, last = max(start, at), min(stop, at + count)
            if first < last:
                parts.append((label, first, last - first))
            at += count
        return parts

    def check(self, info: ModelInfo) -> None:
        """Checks that a model can do this task.

        Raises:
            InvalidInput: a value is not allowed; the error names it and what is allowed.
        """
        for label, count in self.runs:
            if label is not None and not 0 <= label < len(info.labels):
                raise InvalidInput("labels", f"{label} is not in 0 to {len(info.labels) - 1}")
            if count < 1:
                raise InvalidInput("labels", f"{count} pictures of label {label}; 1 at least")
        if not self.total:
            raise InvalidInput("labels", "no pictures are asked for")
        if not -SEED_LIMIT <= self.seed < SEED_LIMIT:
            raise InvalidInput("seed", f"{self.seed} is not in [-2**63, 2**63)")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE):
            raise InvalidInput(
                "temperature", f"{self.temperature:g} is not in [0, {MAX_TEMPERATURE:g}]"
            )
        if not 1 <= self.max_draws <= LARGEST_MAX_DRAWS:
            raise InvalidInput("max_draws", f"{self.max_draws} is not in 1 to {LARGEST_MAX_DRAWS}")
        if self.alpha is not None:
            require_alpha(self.alpha, info.finest_alpha, info.calibration_size)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A task that scores or classifies pictures.

    Attributes:
        kind: `score` or `classify`.
        total: number of pictures.
        pictures: SHA-256 of the input files, their names and their order, hexadecimal.
        alpha: accepted rate of false rejections.
        guarantee: what alpha is guaranteed for.
        fdr: accepted share of good pictures among the rejected ones of the whole job (false
            discovery rate), in (0, 1); None for no such test.
        priors: p(y), one for each label; None for the model's own.
        min_posterior: smallest posterior at which a label is assigned, in [0, 1).
        estimate_priors: whether the priors are estimated from the job's pictures.
        rule: the model that assigns the label.
    """

    kind: Literal["score", "classify"]
    total: int
    pictures: str
    alpha: float
    guarantee: Guarantee = Guarantee.MARGINAL
    fdr: float | None = None
    priors: tuple[float, ...] | None = None
    min_posterior: float = 0.0
    estimate_priors: bool = False
    rule: LabelRule = LabelRule.GENERATIVE

    @property
    def has_two_rounds(self) -> bool:
        """Whether final shards need the answers for all pictures, so the job has two rounds."""
        return self.fdr is not None or self.estimate_priors

    def check(self, info: ModelInfo) -> None:
        """Checks that a model can do this task.

        Raises:
            InvalidInput: a value is not allowed; the error names it and what is allowed.
            NotAnswered: the model lacks the rule's p(y|x).
        """
        require_alpha(self.alpha, info.finest_alpha, info.calibration_size)
        if self.fdr is not None and not 0 < self.fdr < 1:
            raise InvalidInput("fdr", f"{self.fdr:g} is not in (0, 1)")
        if self.fdr is not None and self.guarantee is not Guarantee.MARGINAL:
            raise InvalidInput("fdr", "needs p-values with the marginal guarantee")
        if not 0 <= self.min_posterior < 1:
            raise InvalidInput("min_posterior", f"{self.min_posterior:g} is not in [0, 1)")
        if self.rule is LabelRule.DISCRIMINATIVE and not info.discriminative:
            raise NotAnswered(f"model {info.name} has no p(y|x) of its own")
        if self.priors is not None:
            bayes.check_priors(self.priors, len(info.labels))
        if self.priors is not None and self.estimate_priors:
            raise InvalidInput("priors", "are either given or estimated")


Task = Generation | Judgement


@dataclass(frozen=True, slots=True)
class Request:
    """A job's task, its model and the form of its shards.

    Attributes:
        task: the task.
        model: name of the model.
        version: version of the model; not a label.
        digest: SHA-256 of the bundle's manifest, hexadecimal.
        format: file format of the shards.
        rows: number of pictures in a shard; the last one may have fewer.
    """

    task: Task
    model: str
    version: str
    digest: str
    format: Format = Format.PARQUET
    rows: int = SHARD

    @classmethod
    def of(cls, task: Task, info: ModelInfo, form: Format, rows: int) -> Request:
        """The request of a task to the described model.

        Raises:
            InvalidInput: the model cannot do the task, or there would be more than
                `MOST_SHARDS` shards.
            NotAnswered: the model lacks the rule's p(y|x).
        """
        task.check(info)
        if rows < 1 or -(-task.total // rows) > MOST_SHARDS:
            least = max(1, -(-task.total // MOST_SHARDS))
            raise InvalidInput("shard", f"{rows} pictures; expected at least {least}")
        return cls(task, info.name, info.version, info.digest, form, rows)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.task.total // self.rows)

    def span(self, shard: int) -> tuple[int, int]:
        """The index of a shard's first picture, and one past its last."""
        return shard * self.rows, min((shard + 1) * self.rows, self.task.total)

    def as_dict(self) -> dict[str, Any]:
        """The request as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def metadata(self) -> dict[str, str]:
        """The metadata of each shard: which request it is part of."""
        about = {"model": self.model, "version": self.version, "digest": self.digest}
        task = {name: self.as_dict()["task"].get(name) for name in ("kind", "alpha", "seed")}
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (about | task).items()}
        texts["request"] = json.dumps(self.as_dict(), sort_keys=True)
        return {f"likely.{k}": text for k, text in texts.items() if text != "null"}

    def require_same(self, other: dict[str, Any]) -> None:
        """Checks that a folder's manifest contains the same request.

        Raises:
            JobError: it contains another one; the error names the first difference.
        """
        here, there = _flat(self.as_dict()), _flat(other)
        # The digest comes last: if the version differs too, the version says more.
        for key in sorted(here.keys() | there.keys(), key=lambda key: (key == "digest", key)):
            if here.get(key) != there.get(key):
                raise JobError(
                    f"the folder holds another job: its {key} is {json.dumps(there.get(key))}, "
                    f"and {json.dumps(here.get(key))} is asked; name another folder, or empty it"
                )


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, **request["task"], "task": None}


def parse_runs(labels: str, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Label index and count of each part of a text such as `3=100,boot=200`.

    Args:
        labels: names or indices of labels, with counts.
        names: names of the labels, in the model's order.

    Raises:
        InvalidInput: a part is malformed, or the model has no such label.
    """
    runs = []
    for part in labels.split(","):
        label, separator, count = part.strip().rpartition("=")
        index = names.index(label) if label in names else _number(label)
        wanted = _number(count)
        if not separator or wanted < 0 or not 0 <= index < len(names):
            raise InvalidInput(
                "labels",
                f"{part.strip()!r} is no LABEL=COUNT; labels are {', '.join(names) or 'none'}",
            )
        runs.append((index, wanted))
    return tuple(runs)


def _number(text: str) -> int:
    """The number in a text; -1 if it is not one, or has more digits than Python parses."""
    try:
        return int(text) if text.isdecimal() else -1
    except ValueError:
        return -1
