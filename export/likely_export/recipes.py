"""Recipes: what to train on which data, and which of the bundle's questions each model answers.

A recipe is a TOML file. Recipes that ship with likely are loaded by name, all others by path.
Relative paths in a recipe are relative to its folder.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_type_hints

import numpy as np
import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from likely.answers import Pixels
from likely.bundle import Name, Role
from likely.errors import InvalidInput
from likely_export import data, sources
from likely_export.attributes import ATTRIBUTES
from likely_export.calibrate import FOLDS, PartConfig
from likely_export.corruptions import CHOOSING, HARD, INLIERS, PANEL
from likely_export.families import GIVEN_BY_DATA, family
from likely_export.optimisers import Precision, Training
from likely_export.sources import Source
from likely_export.statistics import STATISTICS

_Named = TypeVar("_Named", str, float)

UNKNOWN = "extra_forbidden"  # pydantic's error type for an unknown key


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Table):
    """The pictures and how they are split; see `data.load`."""

    source: str
    levels: int = Field(0, ge=0, le=256)
    binarise: bool = False
    labels: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    seed: int = 0
    splits: data.Sizes

    @field_validator("splits", mode="before")
    @classmethod
    def _known_splits(cls, splits: Any) -> Any:
        return _checked(data.Sizes, splits)

    def load(self) -> data.Dataset:
        """Loads the data set and splits it."""
        return data.load(
            self.source,
            self.splits,
            levels=self.levels,
            binarise=self.binarise,
            labels=self.labels,
            without=self.without,
            seed=self.seed,
        )


MODEL_KEYS = ("family", "start_from", "training")  # of a model's table; all others are its options


class Model(_Table):
    """A family, the options of its config, and its training.

    Attributes:
        start_from: name of the model whose trained weights this one starts with; empty to start
            from nothing. It may have further weights of its own.
    """

    family: str
    options: dict[str, Any] = {}
    start_from: str = ""
    training: Training

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, table: Any) -> Any:
        if not isinstance(table, Mapping) or "options" in table:
            return table
        fields = {key: table[key] for key in MODEL_KEYS if key in table}
        return {**fields, "options": {key: table[key] for key in table.keys() - fields.keys()}}

    @field_validator("training", mode="before")
    @classmethod
    def _known_training(cls, training: Any) -> Any:
        return _checked(Training, training)

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        options = _checked(family(self.family).config, self.options, given_elsewhere=GIVEN_BY_DATA)
        # Frozen for users, but not for this validator, which turns lists into tuples.
        self.options.clear()
        self.options.update(options)
        return self


class Calibration(_Table):
    """How outlier decisions are made, and what the report checks.

    Attributes:
        statistics: names of `likely_export.statistics.STATISTICS`; by default all that need no
            model beside the density.
        parts: how the statistics are combined; see `calibrate.PartConfig`.
        contrast: corruptions that a contrast part learns from; none of them is reported.
        alphas: rates of false rejections to check on the test part.
    """

    statistics: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(
        n for n, s in STATISTICS.items() if s.needs is None
    )
    parts: Annotated[tuple[PartConfig, ...], Field(min_length=1)] = (PartConfig(),)
    contrast: tuple[str, ...] = tuple(CHOOSING)
    alphas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.01, 0.05, 0.1)

    @field_validator("statistics")
    @classmethod
    def _known_statistics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in STATISTICS]:
            raise ValueError(f"{unknown[0]} is none of {', '.join(STATISTICS)}")
        return _unique(names)

    @field_validator("parts", mode="before")
    @classmethod
    def _known_parts(cls, parts: Any) -> Any:
        checked = tuple(_checked(PartConfig, part) for part in parts)
        for part in checked:
            _unique(part.statistics)
        return checked

    @field_validator("contrast")
    @classmethod
    def _known_corruptions(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in CHOOSING]:
            raise ValueError(f"{unknown[0]} is none of {', '.join(CHOOSING)}")
        return _unique(names)

    @field_validator("alphas")
    @classmethod
    def _different_alphas(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        return _unique(alphas)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for part in self.parts:
            if unknown := [name for name in part.statistics if name not in self.statistics]:
                raise ValueError(f"parts: {unknown[0]} is not among the statistics")
            if part.kind == "contrast" and not self.contrast:
                raise ValueError("contrast: a part learns from corruptions, and none are named")
        return self


class Latent(_Table):
    """Directions to find through the features, in addition to those of the labels.

    Attributes:
        attributes: names of `likely_export.attributes.ATTRIBUTES`.
    """

    attributes: tuple[str, ...] = ()

    @field_validator("attributes")
    @classmethod
    def _known_attributes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in ATTRIBUTES]:
            raise ValueError(f"{unknown[0]} is none of {', '.join(ATTRIBUTES)}")
        return _unique(names)


class Anchor(_Table):
    """A published figure.

    Attributes:
        figure: figure of ours to show it beside, such as `accuracy`.
        value: published value.
        source: where it was published, and what differs.
    """

    figure: str
    value: float
    source: str


class Evaluation(_Table):
    """What the report compares the bundle with.

    Attributes:
        others: sources of other data sets by name, relative to the folder of the recipe's own
            source; sets that do not exist are left out.
        anchors: published figures to show beside ours.
    """

    others: dict[Name, str] = {}
    anchors: tuple[Anchor, ...] = ()

    @field_validator("others")
    @classmethod
    def _named_like_no_set_of_ours(cls, others: dict[Name, str]) -> dict[Name, str]:
        if taken := [name for name in others if name in {INLIERS, *PANEL, *HARD}]:
            raise ValueError(f"{taken[0]} is the name of a set of every report: choose another")
        return others


class Recipe(_Table):
    """Everything that determines a bundle."""

    name: Name
    version: Name
    description: str = Field("", max_length=1000)
    data: Data
    models: dict[Name, Model] = Field(min_length=1)
    roles: dict[Role, Name | tuple[Name, ...]]
    calibration: Calibration = Calibration()
    latent: Latent = Latent()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not {Role.DENSITY, Role.ENCODE} & set(self.roles):
            raise ValueError("roles: a bundle needs a density model, or one that encodes")
        for role in (Role.CONDITIONAL, Role.DISCRIMINATE):  # p(x) decides what has no label
            if role in self.roles and Role.DENSITY not in self.roles:
                raise ValueError(f"roles: a {role} model needs a density model beside it")
        for role in self.roles:
            for model in self.models_of(role):
                if model not in self.models:
                    raise ValueError(f"roles.{role}: {model} is none of {', '.join(self.models)}")
        self._check_starts()
        if Role.DENSITY in self.roles:
            self._check_statistics()
            self._check_sizes()
        return self

    def _check_starts(self) -> None:
        for name, model in self.models.items():
            if not (earlier := model.start_from):
                continue
            if earlier not in self.models:
                known = ", ".join(self.models)
                raise ValueError(f"models.{name}.start_from: {earlier} is none of {known}")
            if earlier == name or self.models[earlier].start_from:
                raise ValueError(
                    f"models.{name}.start_from: {earlier} does not start from nothing itself"
                )

    def _check_statistics(self) -> None:
        families = {self.models[name].family for name in self.models_of(Role.DENSITY)[1:]}
        for name in self.calibration.statistics:
            if (needed := STATISTICS[name].needs) and needed not in families:
                raise ValueError(f"calibration: {name} needs a {needed} beside the density")

    def _check_sizes(self) -> None:
        """Raises unless the splits are large enough for what is fitted on them, and for alpha."""
        sizes, alphas = self.data.splits, self.calibration.alphas
        if all(alpha * (sizes.calibrate + 1) < 1 for alpha in alphas):
            raise ValueError(
                f"calibration.alphas: {sizes.calibrate} calibration pictures promise no alpha "
                f"below {1 / (sizes.calibrate + 1):.4g}, and all of these are"
            )
        if sizes.fit < FOLDS:
            raise ValueError(
                f"data.splits.fit: {sizes.fit} pictures; to combine statistics, at least {FOLDS} "
                "are needed"
            )
        # Neighbouring rows are in different folds, so every fold leaves one of two to learn from.
        learns = any(part.kind == "contrast" for part in self.calibration.parts)
        if learns and sizes.fit < 2 * len(self.calibration.contrast):
            raise ValueError(
                f"data.splits.fit: {sizes.fit} pictures; a contrast needs two for each of its "
                f"{len(self.calibration.contrast)} corruptions"
            )
        # Cross-fitting fits the parts without one fold of the split.
        least = sizes.fit - -(-sizes.fit // FOLDS)
        for part in self.calibration.parts:
            needed = {"mixture": part.components, "neighbours": part.neighbours}.get(part.kind, 1)
            if not 1 <= needed <= least:
                raise ValueError(
                    f"calibration.parts: {part.kind} of {needed} is not in [1, {least}], the "
                    f"range for {sizes.fit} pictures to fit it on"
                )

    def models_of(self, role: Role) -> tuple[Name, ...]:
        """The names of a role's models; the first one leads."""
        return model_names(self.roles[role])

    def reseeded(self, seed: int) -> Self:
        """Returns the recipe with another training seed for every model; the splits stay."""
        return self._with_training(lambda training: dataclasses.replace(training, seed=seed))

    def with_precisions(
        self,
        arithmetic: Callable[[Precision], Precision],
        begun: Mapping[str, Precision] | None = None,
    ) -> Self:
        """Returns the recipe with the precisions that are really used.

        Args:
            arithmetic: the precision that the machine uses for a model's own precision.
            begun: precisions in which models have already begun, by name; these take precedence.
        """
        precisions = {
            name: arithmetic(model.training.precision) for name, model in self.models.items()
        }
        precisions |= begun or {}
        return self._with_trainings(
            {
                name: dataclasses.replace(model.training, precision=precisions[name])
                for name, model in self.models.items()
            }
        )

    def continues(self, earlier: Recipe) -> bool:
        """Whether a run of the `earlier` recipe can continue as a run of this one; see `Training`.

        If this recipe trains for longer, its version and description may differ. The data may have
        moved: the models' files identify what they were trained on (`train.check_data`).
        Precisions are not compared, because they depend on the machine.
        """
        if self.models.keys() != earlier.models.keys():
            return False
        now = {name: model.training.precision for name, model in self.models.items()}
        earlier = earlier.with_precisions(lambda precision: precision, now)
        # What started from a model has started from the weights of its earlier training.
        starts = {model.start_from for model in self.models.values() if model.start_from}
        if any(self.models[name].training != earlier.models[name].training for name in starts):
            return False
        trainings = {name: model.training for name, model in earlier.models.items()}
        shorter = _with_source(self._with_trainings(trainings), earlier.data.source)
        if any(model.training != trainings[name] for name, model in self.models.items()):
            overrides = {"version": earlier.version, "description": earlier.description}
            shorter = shorter.model_copy(update=overrides)
        return shorter == earlier and all(
            model.training.continues(dataclasses.asdict(trainings[name]))
            for name, model in self.models.items()
        )

    def _with_training(self, change: Callable[[Training], Training]) -> Self:
        return self._with_trainings(
            {name: change(model.training) for name, model in self.models.items()}
        )

    def _with_trainings(self, trainings: Mapping[str, Training]) -> Self:
        models = {
            name: self.models[name].model_copy(update={"training": training})
            for name, training in trainings.items()
        }
        return self.model_copy(update={"models": models})

    def without(self, labels: tuple[str, ...]) -> Self:
        """Returns the recipe with these labels held out too, as outliers to detect."""
        every = tuple(dict.fromkeys((*self.data.without, *labels)))
        return self.model_copy(update={"data": self.data.model_copy(update={"without": every})})

    def other_paths(self) -> dict[str, Path]:
        """The paths of the other data sets by name, whether or not they exist."""
        folder = Path(self.data.source).parent
        return {name: folder / source for name, source in self.evaluation.others.items()}

    def others(self, levels: int) -> dict[str, Pixels]:
        """Loads the other data sets that exist, uint8 (n, c, h, w), by name.

        A set lies in the folder of the recipe's own source, and is read like it. The labels that
        were held out are one more set.

        Raises:
            InvalidInput: a set is the recipe's own source or another set, its pictures have
                another shape than the recipe's own, or they do not span their levels.
        """
        without = self.data.without
        there = {name: path for name, path in self.other_paths().items() if path.exists()}
        sets: dict[str, Pixels] = {}
        if not (there or without):
            return sets
        source = sources.read(self.data.source)
        known = {Path(self.data.source).resolve(): "the data"}
        for name, path in there.items():
            if (same := known.setdefault(path.resolve(), name)) != name:
                raise InvalidInput(
                    f"evaluation.others.{name}", f"{path} is {same} too: name another, or none"
                )
            raw = sources.read(path)
            if raw.x.shape[1:] != source.x.shape[1:]:
                raise InvalidInput(
                    f"evaluation.others.{name}",
                    f"has pictures {raw.x.shape[1:]} where those of {source.name} are "
                    f"{source.x.shape[1:]}: leave it out",
                )
            if not self.data.levels and levels == raw.levels and raw.is_dark:
                raise InvalidInput(
                    f"evaluation.others.{name}",
                    f"its pixels reach {raw.peak} where white is {raw.levels - 1}: stretch them, "
                    "or leave it out",
                )
            sets[name] = self._to_model_levels(
                raw.x if raw.test is None else raw.test[0], raw, levels
            )
        if without:
            raw = sources.with_label_names(source, self.data.labels)
            if len(outside := sources.held_out(raw, without)):
                name = f"held_out_{'_'.join(without)}"
                sets[name] = self._to_model_levels(outside, raw, levels)
        return sets

    def _to_model_levels(self, x: Pixels, raw: Source, levels: int) -> Pixels:
        """Pictures of a source with `levels` levels, binarised or quantised as for the models."""
        if self.data.binarise:
            none = np.zeros(len(x), np.int64)
            return data.binarised(data.Split(x, none), raw, 0).x
        return data.quantised(x, raw, levels)

    def published(self) -> dict[str, Any]:
        """The recipe as plain values, without folders of this machine.

        Of absolute paths, only the file name is kept; such sets are looked for beside the data.
        """
        values = self.as_table()
        values["data"]["source"] = Path(self.data.source).name
        values["evaluation"]["others"] = {
            name: path.name if (path := Path(source)).is_absolute() else source
            for name, source in self.evaluation.others.items()
        }
        return values

    def as_table(self) -> dict[str, Any]:
        """The recipe as plain values, in the form of the file."""
        values = self.model_dump(mode="json")
        for model in values["models"].values():
            model |= model.pop("options")
        return values

    def write(self, path: Path) -> None:
        """Writes the recipe as TOML by renaming, unless the file has this content already."""
        text = tomli_w.dumps(self.as_table())
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")  # several commands may write it
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def shipped() -> dict[str, str]:
    """The names and descriptions of the recipes that ship with likely."""
    folder = resources.files("likely_export") / "recipes"
    texts = {Path(file.name).stem: file.read_text() for file in folder.iterdir()}
    return {name: tomllib.loads(texts[name])["description"] for name in sorted(texts)}


def load(name_or_path: str | Path, source: str | None = None, size: str = "") -> Recipe:
    """Loads a recipe.

    Args:
        name_or_path: name of a recipe that ships with likely, or path of a .toml file.
        source: source of the pictures; the recipe's own by default. A relative one of a recipe
            that ships with likely is relative to the working directory.
        size: name of one of the recipe's sizes; its default size if empty.

    Raises:
        InvalidInput: there is no such recipe, or it is invalid; the message names the key.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in shipped():
            raise InvalidInput(
                "recipe", f"{name_or_path} is neither a .toml file nor one of {list(shipped())}"
            )
        text = (resources.files("likely_export") / "recipes" / f"{path}.toml").read_text()
        recipe = parse(text, Path(), size)
    elif not path.is_file():
        raise InvalidInput("recipe", f"{path} is not there")
    else:
        recipe = parse(_read(path), path.parent, size)
    if source is None:
        return recipe
    return _with_source(recipe, source if source == "digits" else str(Path(source).resolve()))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput("recipe", f"{path} is not UTF-8: {error.reason}") from error


def parse(text: str, folder: Path | None = None, size: str = "") -> Recipe:
    """Parses a recipe from TOML text; relative sources are relative to the folder.

    A table `sizes.NAME` contains the values that replace others at that size.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput("recipe", f"is not TOML: {error}") from error
    sizes = table.pop("sizes", {})
    if not isinstance(sizes, Mapping):
        raise InvalidInput("sizes", f"must be a table of sizes, not {sizes!r}")
    if wrong := [name for name, other in sizes.items() if not isinstance(other, Mapping)]:
        raise InvalidInput(f"sizes.{wrong[0]}", f"must be a table, not {sizes[wrong[0]]!r}")
    if size and size not in sizes:
        raise InvalidInput("size", f"{size} is none of {', '.join(sizes) or 'no sizes'}")
    table = _merged(table, sizes.get(size, {}))
    recipe = from_table(table)
    if folder is None or recipe.data.source == "digits":
        return recipe
    return _with_source(recipe, str((folder / recipe.data.source).resolve()))


def model_names(role: str | Sequence[str]) -> tuple[str, ...]:
    """The names of a role's models, which a recipe gives alone or in a list."""
    return (role,) if isinstance(role, str) else tuple(role)


def from_table(table: Mapping[str, Any], source: str | None = None) -> Recipe:
    """Returns the recipe of plain values, such as a manifest's, with another source if given."""
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise first_error(error, "recipe") from error
    return _with_source(recipe, source) if source else recipe


def first_error(error: ValidationError, whole: str) -> InvalidInput:
    """Returns the first error of pydantic; `whole` is its field if it concerns no single one.

    Unknown keys come first, because a missing key is often a misspelt one.
    """
    first = min(error.errors(), key=lambda one: one["type"] != UNKNOWN)
    return InvalidInput(".".join(map(str, first["loc"])) or whole, _sentence(first))


def _merged(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table with the other's values in place of its own, recursively."""
    both = {
        key: _merged(nested, value)
        if isinstance(value, Mapping) and isinstance(nested := table.get(key), Mapping)
        else value
        for key, value in other.items()
    }
    return {**table, **both}


def _with_source(recipe: Recipe, source: str) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})


def _unique(names: tuple[_Named, ...]) -> tuple[_Named, ...]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice")
    return names


def _sentence(error: Any) -> str:
    if error["type"] == UNKNOWN:
        return "is not a known key"
    if error["type"] == "missing":
        return "is missing"
    return str(error["msg"]).removeprefix("Value error, ")


def _checked(config: type[Any], table: Any, given_elsewhere: tuple[str, ...] = ()) -> Any:
    """Validates a table against a dataclass: all keys are known, and the types are right.

    Returns:
        The dataclass; or a dict of the values, if some fields are given elsewhere.
    """
    if isinstance(table, config):
        return table
    if not isinstance(table, Mapping):
        raise ValueError(f"must be a table, not {table!r}")
    fields = [
        field.name for field in dataclasses.fields(config) if field.name not in given_elsewhere
    ]
    if unknown := sorted(table.keys() - set(fields)):
        raise ValueError(f"{unknown[0]} is not a known key; these are: {', '.join(fields)}")
    required = {f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING}
    if missing := sorted(required - table.keys() - set(given_elsewhere)):
        raise ValueError(f"{missing[0]} is missing")
    hints = get_type_hints(config)
    values = {key: _typed(hints[key], key, value) for key, value in table.items()}
    return values if given_elsewhere else config(**values)


def _typed(hint: Any, key: str, value: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}: {error.errors()[0]['msg']}, not {value!r}") from error
