"""Which models live: found by name, version and label, held while used, described for callers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from likely.answers import VERSION_LABELS, Direction, Limits, ModelInfo
from likely.bundle import Role
from likely.errors import BundleError, InvalidInput, ModelNotFound, Unavailable

if TYPE_CHECKING:
    from likely.engine import Engine

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
METHODS = {
    "Complete": "likely.v1.GenerationService/Complete",
    "Classify": "likely.v1.ScoringService/Classify",
    "Decode": "likely.v1.LatentService/Decode",
    "Encode": "likely.v1.ScoringService/Encode",
    "Generate": "likely.v1.GenerationService/Generate",
    "Interpolate": "likely.v1.LatentService/Interpolate",
    "Score": "likely.v1.ScoringService/Score",
    "Traverse": "likely.v1.LatentService/Traverse",
}

LOADING = "the models are still being loaded"

Policy = Literal["newest", "oldest"]


class Held:
    """An engine, and how many requests use it.

    Attributes:
        engine: what is held.
        users: leases that have not ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.users = 0
        self._left: asyncio.Event | None = None

    async def unused(self) -> None:
        """Returns once no request uses the engine."""
        while self.users:
            self._left = asyncio.Event()
            await self._left.wait()

    def __enter__(self) -> Engine:
        self.users += 1
        return self.engine

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.users -= 1
        if not self.users and self._left:
            self._left.set()


class Registry:
    """The engines of a server; requests find them once it is filled and open.

    All methods belong to the event loop's thread, so that each is one step for every request.

    Attributes:
        policy: which version answers a request that names none, where none is `stable`.
    """

    def __init__(self, policy: Policy = "newest") -> None:
        self.policy = policy
        self._shelves: dict[str, dict[str, Held]] | None = None
        self._labels: dict[str, dict[str, str]] = {}
        self._is_open = False

    def fill(self, engines: Sequence[Engine]) -> None:
        """Serves these engines from now on.

        Raises:
            BundleError: two of them have the same name and version.
        """
        self._shelves = {}
        for engine in engines:
            self.add(engine)

    def open(self) -> None:
        """Lets requests find what is served, all of it being there, and labelled."""
        self._is_open = True

    def add(self, engine: Engine) -> None:
        """Serves this engine too.

        Raises:
            BundleError: that name and version is served already, or its version is called
                as a label is.
        """
        name, version = engine.manifest.name, engine.manifest.version
        if version in VERSION_LABELS:
            raise BundleError(
                f"{name}@{version} is called as a label is; requests could mean either", "version"
            )
        shelf = self._filled().setdefault(name, {})
        if version in shelf:
            raise BundleError(f"two bundles hold {name}@{version}; one of them must go", "version")
        shelf[version] = Held(engine)
        self._filled()[name] = dict(sorted(shelf.items(), key=lambda item: age(item[0])))

    def replace(self, engine: Engine) -> Held:
        """Serves this engine in the place of that of its name and version, which is given back.

        Labels stay, and requests that use the former are not disturbed.

        Raises:
            ModelNotFound: no such model is served.
        """
        name, version = engine.manifest.name, engine.manifest.version
        former = self._held(name, version)
        self._filled()[name][version] = Held(engine)
        return former

    def remove(self, name: str, version: str) -> Held:
        """The engine of that name and version (no label), which no request finds any more.

        Its labels go with it; requests that use it are not disturbed.

        Raises:
            ModelNotFound: no such model is served.
        """
        held = self._held(name, version)
        shelves = self._filled()
        for label in self.labels(name, version):
            del self._labels[name][label]
        del shelves[name][version]
        if not shelves[name]:
            del shelves[name]
        return held

    def find(self, name: str, version: str = "") -> Engine:
        """The engine of that name and version or label; an empty version is the default one.

        Raises:
            InvalidInput: the name or the version is none that a bundle can have.
            ModelNotFound: no such model is served.
            Unavailable: the first models are still being loaded.
        """
        return self._found(name, version).engine

    def lease(self, name: str, version: str = "") -> Held:
        """What `find` finds, for a request; while entered as a context, it is not unloaded.

        Raises:
            InvalidInput, ModelNotFound: as `find`.
            Unavailable: the models are still being loaded.
        """
        self._require_open()
        return self._found(name, version)

    def default(self, name: str) -> str | None:
        """The version that answers a request that names none: the stable one, or by policy."""
        versions = list((self._shelves or {}).get(name, ()))
        if not versions:
            return None
        stable = self._labels.get(name, {}).get("stable")
        return stable or versions[-1 if self.policy == "newest" else 0]

    def set_label(self, name: str, label: str, version: str | None) -> None:
        """Lets a label name that version, or none.

        Raises:
            InvalidInput: there is no such label.
            ModelNotFound: no such version is served.
        """
        if label not in VERSION_LABELS:
            raise InvalidInput("label", f"{label!r} is none of {', '.join(VERSION_LABELS)}")
        if version is None:
            self._labels.get(name, {}).pop(label, None)
            return
        self._held(name, version)
        self._labels.setdefault(name, {})[label] = version

    def labels(self, name: str, version: str) -> tuple[str, ...]:
        """The labels that name this version, sorted."""
        named = self._labels.get(name, {})
        return tuple(sorted(label for label, target in named.items() if target == version))

    def engines(self) -> list[Engine]:
        """All engines, sorted by name and then by age of version.

        Raises:
            Unavailable: the first models are still being loaded.
        """
        shelves = self._filled()
        return [held.engine for name in sorted(shelves) for held in shelves[name].values()]

    def served(self) -> list[Engine]:
        """All engines, for a request.

        Raises:
            Unavailable: the models are still being loaded.
        """
        self._require_open()
        return self.engines()

    def known(self, name: str) -> bool:
        """Whether a model of that name is served."""
        return name in (self._shelves or {})

    def close(self) -> None:
        """Ends all engines."""
        for engine in self.engines() if self._shelves else []:
            engine.close()
        self._shelves = None
        self._labels = {}
        self._is_open = False

    def _found(self, name: str, version: str) -> Held:
        named = self._labels.get(name, {}).get(version, version) or self.default(name) or ""
        held = (self._shelves or {}).get(name, {}).get(named)
        if held is not None:
            return held
        check_name("model_name", name)
        if version:
            check_name("model_version", version)
        return self._held(name, named)

    def _held(self, name: str, version: str) -> Held:
        versions = self._filled().get(name)
        if versions is None:
            raise ModelNotFound(name, f"no model {name}; served are {self._listed()}")
        if version not in versions:
            raise ModelNotFound(
                f"{name}@{version}", f"no {name}@{version}; served are {self._listed()}"
            )
        return versions[version]

    def _filled(self) -> dict[str, dict[str, Held]]:
        if self._shelves is None:
            raise Unavailable(LOADING)
        return self._shelves

    def _require_open(self) -> None:
        if not self._is_open:
            raise Unavailable(LOADING)

    def _listed(self) -> str:
        names = [f"{e.manifest.name}@{e.manifest.version}" for e in self.engines()]
        return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") or "none"


def age(version: str) -> tuple[object, ...]:
    """Sorts versions: numbers by value, a word before no word (1.0-rc1, 1.0, 1.0.1, 1.10)."""
    parts = re.findall(r"\d+|[a-z]+", version)
    key = [(2, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
    return (*key, (1, 0, ""), version)


def check_name(field: str, name: str) -> None:
    """Refuses what no bundle can be called, before it reaches a log, a metric or a path.

    Raises:
        InvalidInput: not 1 to 64 characters of a-z, 0-9, `_`, `.`, `-`.
    """
    if not NAME.fullmatch(name):
        shown = repr(name[:64]) + ("…" if len(name) > 64 else "") if name else "an empty name"
        raise InvalidInput(
            field,
            f"{shown} is no name: 1 to 64 of a-z, 0-9, '_', '.', '-', a letter or digit first",
        )


def describe(
    engine: Engine, limits: Limits, default_alpha: float, version_labels: Sequence[str] = ()
) -> ModelInfo:
    """What the engine's model takes, gives and promises."""
    manifest = engine.manifest
    density, calibration = manifest.graphs.get(Role.DENSITY), manifest.calibration
    conditional = manifest.graphs.get(Role.CONDITIONAL)
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        shape=manifest.shape,
        levels=manifest.levels,
        labels=tuple(label.name for label in manifest.labels),
        priors=tuple(label.prior for label in manifest.labels),
        methods=tuple(sorted(full for method, full in METHODS.items() if engine.answers(method))),
        density_kind=density.kind if density else None,
        conditional_kind=conditional.kind if conditional else None,
        importance_samples=conditional.importance_samples if conditional else 0,
        latent_dimensions=manifest.latent_dimensions(),
        calibration_size=calibration.size if calibration else 0,
        finest_alpha=engine.detector.finest_alpha if calibration else 1.0,
        default_alpha=default_alpha,
        posterior_temperature=calibration.temperature if calibration else 1.0,
        execution_providers=engine.providers,
        limits=limits,
        digest=engine.digest,
        version_labels=tuple(version_labels),
        discriminative=Role.DISCRIMINATE in manifest.graphs,
        directions=tuple(
            Direction(each.name, each.kind)
            for each in (manifest.latent.directions if manifest.latent else ())
        ),
        deterministic=manifest.deterministic,
    )
