"""Recipes: what to train on which data, and what the bundle is to answer with it.

A recipe is a TOML file. One that ships with likely is loaded by name, any other
by its path; relative paths in it are relative to its folder.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

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

UNKNOWN = "extra_forbidden"  # pydantic's name for a key that a table does not have


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Table):
    """Which pictures, and how they are divided; see `data.load`."""

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
        """The data set, divided."""
        return data.load(
            self.source,
            self.splits,
            levels=self.levels,
            binarise=self.binarise,
            labels=self.labels,
            without=self.without,
            seed=self.seed,
        )


class Model(_Table):
    """A family, the options of its config, and how it is trained."""

    family: str
    options: dict[str, Any] = {}
    training: Training

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, table: Any) -> Any:
        if not isinstance(table, Mapping) or "options" in table:
            return table
        own = {key: table[key] for key in ("family", "training") if key in table}
        return {**own, "options": {key: table[key] for key in table.keys() - own.keys()}}

    @field_validator("training", mode="before")
    @classmethod
    def _known_training(cls, training: Any) -> Any:
        return _checked(Training, training)

    @model_validator(mode="after")
    def _known_options(self) -> Self:
        options = _checked(family(self.family).config, self.options, given=GIVEN_BY_DATA)
        # Frozen for its users, not for the validator that turns lists into tuples.
        self.options.clear()
        self.options.update(options)
        return self


class Calibration(_Table):
    """What outlier decisions are made of, and what the report checks.

    Attributes:
        statistics: names of `likely_export.statistics.STATISTICS`; by default all that the
            density's own tables give.
        parts: how they are combined; see `calibrate.PartConfig`.
        contrast: the corruptions that a contrast part learns from, none of which is reported.
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
        return tuple(_checked(PartConfig, part) for part in parts)

    @field_validator("contrast")
    @classmethod
    def _known_corruptions(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in CHOOSING]:
            raise ValueError(f"{unknown[0]} is none of {', '.join(CHOOSING)}")
        return names

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for part in self.parts:
            if unknown := [name for name in part.statistics if name not in self.statistics]:
                raise ValueError(f"parts: {unknown[0]} is not among the statistics")
            if part.kind == "contrast" and not self.contrast:
                raise ValueError("contrast: a part learns from corruptions, and none are named")
        return self


class Latent(_Table):
    """Which directions are found through the features, beside those of the labels.

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
        figure: of ours that it stands beside, such as `accuracy`.
        value: what was published.
        source: where, and what differs.
    """

    figure: str
    value: float
    source: str


class Evaluation(_Table):
    """What the bundle is reported against.

    Attributes:
        others: sources of other data sets by name, beside the recipe's own source; one that
            is not there is left out.
        anchors: published figures to stand beside ours.
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
    """Everything that decides a bundle."""

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
        if Role.CONDITIONAL in self.roles and Role.DENSITY not in self.roles:
            raise ValueError("roles: a conditional model needs a density model beside it")
        for role in self.roles:
            for model in self.models_of(role):
                if model not in self.models:
                    raise ValueError(f"roles.{role}: {model} is none of {', '.join(self.models)}")
        if Role.DENSITY in self.roles:
            self._check_statistics()
            self._check_sizes()
        return self

    def _check_statistics(self) -> None:
        families = {self.models[name].family for name in self.models_of(Role.DENSITY)[1:]}
        for name in self.calibration.statistics:
            if (needed := STATISTICS[name].needs) and needed not in families:
                raise ValueError(f"calibration: {name} needs a {needed} beside the density")

    def _check_sizes(self) -> None:
        """Returns if the splits are large enough for what is learnt and promised from them."""
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
        # Two that follow each other are in two folds, so that every fold leaves one to learn from.
        learns = any(part.kind == "contrast" for part in self.calibration.parts)
        if learns and sizes.fit < 2 * len(self.calibration.contrast):
            raise ValueError(
                f"data.splits.fit: {sizes.fit} pictures; a contrast needs two for each of its "
                f"{len(self.calibration.contrast)} corruptions"
            )
        # Parts are fitted by cross-fitting too, without a fold of the split.
        least = sizes.fit - -(-sizes.fit // FOLDS)
        for part in self.calibration.parts:
            needed = {"mixture": part.components, "neighbours": part.neighbours}.get(part.kind, 1)
            if not 1 <= needed <= least:
                raise ValueError(
                    f"calibration.parts: {part.kind} of {needed} is not in [1, {least}], as "
                    f"{sizes.fit} pictures to fit it on allow"
                )

    def models_of(self, role: Role) -> tuple[Name, ...]:
        """The names of the models behind a role, the one that leads first."""
        named = self.roles[role]
        return (named,) if isinstance(named, str) else named

    def reseeded(self, seed: int) -> Self:
        """The same recipe with another seed for every model; parts and splits stay."""
        return self._with_training(lambda own: dataclasses.replace(own, seed=seed))

    def computed(
        self,
        arithmetic: Callable[[Precision], Precision],
        begun: Mapping[str, Precision] | None = None,
    ) -> Self:
        """The same recipe in what a machine makes of each model's precision, or it has begun in."""
        given = {name: arithmetic(each.training.precision) for name, each in self.models.items()}
        given |= begun or {}
        return self._with_trainings(
            {
                name: dataclasses.replace(model.training, precision=given[name])
                for name, model in self.models.items()
            }
        )

    def continues(self, earlier: Recipe) -> bool:
        """Whether a run of another recipe is the beginning of one of this; see `Training`.

        Where this one's training is longer, its version and description may be others. The data may
        lie anywhere: what a model was trained on, its files tell (`train.check_data`). A precision
        is that of the machine which a model has begun on, or begins on now.
        """
        if self.models.keys() != earlier.models.keys():
            return False
        now = {name: model.training.precision for name, model in self.models.items()}
        earlier = earlier.computed(lambda own: own, now)
        trainings = {name: model.training for name, model in earlier.models.items()}
        shorter = _relocated(self._with_trainings(trainings), earlier.data.source)
        if any(model.training != trainings[name] for name, model in self.models.items()):
            told = {"version": earlier.version, "description": earlier.description}
            shorter = shorter.model_copy(update=told)
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
        """The same recipe with these labels' pictures held out too, to be told from the rest."""
        every = tuple(dict.fromkeys((*self.data.without, *labels)))
        return self.model_copy(update={"data": self.data.model_copy(update={"without": every})})

    def places(self) -> dict[str, Path]:
        """Where the other data sets lie, if they are there, by their names."""
        folder = Path(self.data.source).parent
        return {name: folder / source for name, source in self.evaluation.others.items()}

    def others(self, levels: int) -> dict[str, Pixels]:
        """The other data sets to report against that are there, uint8 (n, c, h, w).

        A set lies in the folder of the recipe's own source, and is read as that is. Labels that
        were held out are one more.

        Raises:
            InvalidInput: a set is the recipe's own or another one, or its pictures are of another
                shape than the recipe's own, or do not span their levels.
        """
        without = self.data.without
        there = {name: path for name, path in self.places().items() if path.exists()}
        found: dict[str, Pixels] = {}
        if not (there or without):
            return found
        own = sources.read(self.data.source)
        known = {Path(self.data.source).resolve(): "the data"}
        for name, path in there.items():
            if (same := known.setdefault(path.resolve(), name)) != name:
                raise InvalidInput(
                    f"evaluation.others.{name}", f"{path} is {same} too: name another, or none"
                )
            raw = sources.read(path)
            if raw.x.shape[1:] != own.x.shape[1:]:
                raise InvalidInput(
                    f"evaluation.others.{name}",
                    f"has pictures {raw.x.shape[1:]} where those of {own.name} are "
                    f"{own.x.shape[1:]}: leave it out",
                )
            if not self.data.levels and levels == raw.levels and raw.dark:
                raise InvalidInput(
                    f"evaluation.others.{name}",
                    f"its pixels reach {raw.peak} where white is {raw.levels - 1}: stretch them, "
                    "or leave it out",
                )
            found[name] = self._taught(raw.x if raw.test is None else raw.test[0], raw, levels)
        if without:
            raw = sources.named(own, self.data.labels)
            if len(outside := sources.held_out(raw, without)):
                name = f"held_out_{'_'.join(without)}"
                found[name] = self._taught(outside, raw, levels)
        return found

    def _taught(self, x: Pixels, raw: Source, levels: int) -> Pixels:
        """Pictures of a source in so many levels, as the models are taught them."""
        if self.data.binarise:
            none = np.zeros(len(x), np.int64)
            return data.binarised(data.Split(x, none), raw, 0).x
        return data.quantised(x, raw, levels)

    def published(self) -> dict[str, Any]:
        """The recipe as plain values, without the folders of this machine.

        Other sets are looked for beside the data, as far as no relative path says otherwise.
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
        """Writes the recipe as TOML, by rename and where it is not there yet; `load` reads it."""
        text = tomli_w.dumps(self.as_table())
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def shipped() -> dict[str, str]:
    """The names of the recipes that come with likely, and what they describe."""
    folder = resources.files("likely_export") / "recipes"
    texts = {Path(file.name).stem: file.read_text() for file in folder.iterdir()}
    return {name: tomllib.loads(texts[name])["description"] for name in sorted(texts)}


def load(name_or_path: str | Path, source: str | None = None, size: str = "") -> Recipe:
    """The recipe of that name or in that file.

    Args:
        name_or_path: of a recipe that comes with likely, or a .toml file.
        source: of pictures, if not the recipe's own.
        size: another of the sizes that the recipe names.

    Raises:
        InvalidInput: there is none, or it is not understood; names the key.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if str(name_or_path) not in shipped():
            raise InvalidInput(
                "recipe", f"{name_or_path} is neither a .toml file nor one of {list(shipped())}"
            )
        text = (resources.files("likely_export") / "recipes" / f"{path}.toml").read_text()
        recipe = parse(text, size=size)
    elif not path.is_file():
        raise InvalidInput("recipe", f"{path} is not there")
    else:
        recipe = parse(_read(path), path.parent, size)
    if source is None:
        return recipe
    return _relocated(recipe, source if source == "digits" else str(Path(source).resolve()))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput("recipe", f"{path} is not UTF-8: {error.reason}") from error


def parse(text: str, folder: Path | None = None, size: str = "") -> Recipe:
    """The recipe in a TOML text; relative sources are relative to the folder.

    A table `sizes.NAME` holds what is otherwise in the recipe at that size.
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
    return _relocated(recipe, str((folder / recipe.data.source).resolve()))


def from_table(table: Mapping[str, Any], source: str | None = None) -> Recipe:
    """The recipe of plain values, such as a manifest's, with another source if given."""
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise refusal(error, "recipe") from error
    return _relocated(recipe, source) if source else recipe


def refusal(error: ValidationError, whole: str) -> InvalidInput:
    """The first thing that pydantic refuses, under the name `whole` where it is of no one field.

    Unknown keys go first: what is missing is often what one of them was to be.
    """
    first = min(error.errors(), key=lambda one: one["type"] != UNKNOWN)
    return InvalidInput(".".join(map(str, first["loc"])) or whole, _sentence(first))


def _merged(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the other's values in place of its own, down to the leaves."""
    both = {
        key: _merged(own, value)
        if isinstance(value, Mapping) and isinstance(own := table.get(key), Mapping)
        else value
        for key, value in other.items()
    }
    return {**table, **both}


def _relocated(recipe: Recipe, source: str) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})


def _unique(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice")
    return names


def _sentence(error: Any) -> str:
    if error["type"] == UNKNOWN:
        return "is not a known key"
    if error["type"] == "missing":
        return "is missing"
    return str(error["msg"]).removeprefix("Value error, ")


def _checked(config: type[Any], table: Any, given: tuple[str, ...] = ()) -> Any:
    """The table's values as the dataclass wants them: keys known, types right.

    Returns:
        The dataclass, or a dict of values where some fields are given elsewhere.
    """
    if isinstance(table, config):
        return table
    if not isinstance(table, Mapping):
        raise ValueError(f"must be a table, not {table!r}")
    fields = [field.name for field in dataclasses.fields(config) if field.name not in given]
    if unknown := sorted(table.keys() - set(fields)):
        raise ValueError(f"{unknown[0]} is not a known key; these are: {', '.join(fields)}")
    required = {f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING}
    if missing := sorted(required - table.keys() - set(given)):
        raise ValueError(f"{missing[0]} is missing")
    hints = get_type_hints(config)
    values = {key: _typed(hints[key], key, value) for key, value in table.items()}
    return values if given else config(**values)


def _typed(hint: Any, key: str, value: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}: {error.errors()[0]['msg']}, not {value!r}") from error
