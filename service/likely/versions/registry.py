"""The registry of served models: lookup by name, version and label; leases; descriptions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from likely.answers import NAME_PATTERN, VERSION_LABELS, Direction, Limits, ModelInfo
from likely.bundle import Role
from likely.errors import BundleError, InvalidInput, ModelNotFound, Unavailable

if TYPE_CHECKING:
    from likely.engine import Engine

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


class LeasedEngine:
    """An engine with a count of its leases; entering it as a context takes a lease.

    Attributes:
        engine: the engine.
        users: number of leases that have not ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.users = 0
        self._released: asyncio.Event | None = None

    async def wait_until_unused(self) -> None:
        """Waits until no request uses the engine."""
        while self.users:
            self._released = asyncio.Event()
            await self._released.wait()

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
        if not self.users and self._released:
            self._released.set()


class Registry:
    """The engines of a server; requests find them once it is filled and open.

    All methods must be called on the event loop's thread, so that each is atomic for requests.
    """

    def __init__(self, policy: Policy = "newest") -> None:
        """Creates an empty registry.

        Args:
            policy: which version answers a request that names none, if no version is `stable`.
        """
        self._policy = policy
        self._versions_by_name: dict[str, dict[str, LeasedEngine]] | None = None
        self._labels: dict[str, dict[str, str]] = {}
        self._is_open = False

    def fill(self, engines: Sequence[Engine]) -> None:
        """Fills the registry with the engines to serve.

        Raises:
            BundleError: two of them have the same name and version, or a version has the name of
                a label.
        """
        self._versions_by_name = {}
        for engine in engines:
            self.add(engine)

    def open(self) -> None:
        """Lets requests find engines, once all of them are loaded and labelled."""
        self._is_open = True

    def add(self, engine: Engine) -> None:
        """Adds an engine.

        Raises:
            BundleError: that name and version is served already, or the version has the name
                of a label.
        """
        name, version = engine.manifest.name, engine.manifest.version
        if version in VERSION_LABELS:
            raise BundleError(
                f"the version of {name}@{version} is also a label; requests could mean either",
                "version",
            )
        versions = self._require_filled().setdefault(name, {})
        if version in versions:
            raise BundleError(f"two bundles hold {name}@{version}; one of them must go", "version")
        versions[version] = LeasedEngine(engine)
        self._require_filled()[name] = dict(
            sorted(versions.items(), key=lambda item: version_sort_key(item[0]))
        )

    def replace(self, engine: Engine) -> LeasedEngine:
        """Replaces the engine of the same name and version, and returns the replaced one.

        Labels stay. Requests that use the replaced engine are not affected.

        Raises:
            ModelNotFound: no such model is served.
        """
        name, version = engine.manifest.name, engine.manifest.version
        former = self._get(name, version)
        self._require_filled()[name][version] = LeasedEngine(engine)
        return former

    def remove(self, name: str, version: str) -> LeasedEngine:
        """Removes an engine and its labels, so that no request finds it, and returns it.

        Requests that use the engine are not affected.

        Args:
            name: name of the model.
            version: its version, not a label.

        Raises:
            ModelNotFound: no such model is served.
        """
        held = self._get(name, version)
        by_name = self._require_filled()
        for label in self.labels(name, version):
            del self._labels[name][label]
        del by_name[name][version]
        if not by_name[name]:
            del by_name[name]
        return held

    def find(self, name: str, version: str = "") -> Engine:
        """Returns the engine with that name and that version or label.

        Args:
            name: name of the model.
            version: version or label; empty for the default version.

        Raises:
            InvalidInput: no bundle can have that name or version.
            ModelNotFound: no such model is served.
            Unavailable: the first models are still being loaded.
        """
        return self._resolve(name, version).engine

    def lease(self, name: str, version: str = "") -> LeasedEngine:
        """Returns what `find` returns, as a lease for a request.

        The engine is not closed while the result is entered as a context.

        Raises:
            InvalidInput, ModelNotFound: as `find`.
            Unavailable: the models are still being loaded.
        """
        self._require_open()
        return self._resolve(name, version)

    def default(self, name: str) -> str | None:
        """The version that answers requests that name none; None if the model is not served.

        This is the version with the label `stable`, otherwise the one that the policy selects.
        """
        versions = list((self._versions_by_name or {}).get(name, ()))
        if not versions:
            return None
        stable = self._labels.get(name, {}).get("stable")
        return stable or versions[-1 if self._policy == "newest" else 0]

    def set_label(self, name: str, label: str, version: str | None) -> None:
        """Points a label at a version, or removes it if the version is None.

        Raises:
            InvalidInput: there is no such label.
            ModelNotFound: no such version is served.
        """
        if label not in VERSION_LABELS:
            raise InvalidInput("label", f"{label!r} is none of {', '.join(VERSION_LABELS)}")
        if version is None:
            self._labels.get(name, {}).pop(label, None)
            return
        self._get(name, version)
        self._labels.setdefault(name, {})[label] = version

    def labels(self, name: str, version: str) -> tuple[str, ...]:
        """The labels that point at this version, sorted."""
        named = self._labels.get(name, {})
        return tuple(sorted(label for label, target in named.items() if target == version))

    def engines(self) -> list[Engine]:
        """All engines, sorted by name and then by age of version.

        Raises:
            Unavailable: the first models are still being loaded.
        """
        by_name = self._require_filled()
        return [held.engine for name in sorted(by_name) for held in by_name[name].values()]

    def served(self) -> list[Engine]:
        """All engines as `engines` returns them, but only once the registry is open to requests.

        Raises:
            Unavailable: the models are still being loaded.
        """
        self._require_open()
        return self.engines()

    def has_model(self, name: str) -> bool:
        """Whether a model of that name is served."""
        return name in (self._versions_by_name or {})

    def close(self) -> None:
        """Closes all engines and empties the registry."""
        for engine in self.engines() if self._versions_by_name else []:
            engine.close()
        self._versions_by_name = None
        self._labels = {}
        self._is_open = False

    def _resolve(self, name: str, version: str) -> LeasedEngine:
        named = self._labels.get(name, {}).get(version, version) or self.default(name) or ""
        held = (self._versions_by_name or {}).get(name, {}).get(named)
        if held is not None:
            return held
        check_name("model_name", name)
        if version:
            check_name("model_version", version)
        return self._get(name, named)

    def _get(self, name: str, version: str) -> LeasedEngine:
        versions = self._require_filled().get(name)
        if versions is None:
            raise ModelNotFound(name, f"no model {name}; served are {self._list_served()}")
        if version not in versions:
            raise ModelNotFound(
                f"{name}@{version}", f"no {name}@{version}; served are {self._list_served()}"
            )
        return versions[version]

    def _require_filled(self) -> dict[str, dict[str, LeasedEngine]]:
        if self._versions_by_name is None:
            raise Unavailable(LOADING)
        return self._versions_by_name

    def _require_open(self) -> None:
        if not self._is_open:
            raise Unavailable(LOADING)

    def _list_served(self) -> str:
        names = [f"{e.manifest.name}@{e.manifest.version}" for e in self.engines()]
        return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") or "none"


def version_sort_key(version: str) -> tuple[object, ...]:
    """Sort key for versions, from old to new: 1.0-rc1, 1.0, 1.0.1, 1.10.

    Numbers are compared by value. A version with a word sorts before the same version without.
    """
    parts = re.findall(r"\d+|[a-z]+", version)
    key = [(2, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]
    return (*key, (1, 0, ""), version)


def check_name(field: str, name: str) -> None:
    """Refuses an invalid name or version before it reaches a log, a metric or a path.

    Args:
        field: name of the request's field, for the error.
        name: the name or version to check.

    Raises:
        InvalidInput: it is not 1 to 64 characters of a-z, 0-9, `_`, `.`, `-`, with a letter or
            digit first.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        shown = repr(name[:64]) + ("…" if len(name) > 64 else "") if name else "an empty name"
        raise InvalidInput(
            field,
            f"{shown} is no name: 1 to 64 of a-z, 0-9, '_', '.', '-', a letter or digit first",
        )


def describe(
    engine: Engine, limits: Limits, default_alpha: float, version_labels: Sequence[str] = ()
) -> ModelInfo:
    """Returns the description of an engine's model that clients receive."""
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
            Direction(direction.name, direction.kind)
            for direction in (manifest.latent.directions if manifest.latent else ())
        ),
        deterministic=manifest.deterministic,
    )
