"""Which models live: found by name and version, described for callers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from likely.answers import Limits, ModelInfo
from likely.bundle import Role
from likely.errors import BundleError, InvalidInput, ModelNotFound, Unavailable

if TYPE_CHECKING:
    from likely.engine import Engine

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
METHODS = {
    "Complete": "likely.v1.GenerationService/Complete",
    "Classify": "likely.v1.ScoringService/Classify",
    "Encode": "likely.v1.ScoringService/Encode",
    "Generate": "likely.v1.GenerationService/Generate",
    "Score": "likely.v1.ScoringService/Score",
}

Policy = Literal["newest", "oldest"]


class Registry:
    """The engines of a server; empty and unavailable until it is filled.

    Attributes:
        policy: which version answers a request that names none.
    """

    def __init__(self, policy: Policy = "newest") -> None:
        self.policy = policy
        self._engines: dict[str, dict[str, Engine]] | None = None

    def fill(self, engines: Sequence[Engine]) -> None:
        """Serves these engines from now on.

        Raises:
            BundleError: two of them have the same name and version.
        """
        shelves: dict[str, dict[str, Engine]] = {}
        for engine in sorted(engines, key=lambda engine: age(engine.manifest.version)):
            name, version = engine.manifest.name, engine.manifest.version
            if version in shelves.setdefault(name, {}):
                raise BundleError(f"two bundles hold {name}@{version}; one of them must go")
            shelves[name][version] = engine
        self._engines = shelves

    def find(self, name: str, version: str = "") -> Engine:
        """The engine of that name and version; an empty version is the default one.

        Raises:
            InvalidInput: the name or the version is none that a bundle can have.
            ModelNotFound: no such model is served.
            Unavailable: the models are still being loaded.
        """
        check_name("model_name", name)
        if version:
            check_name("model_version", version)
        versions = self._shelves().get(name)
        if versions is None:
            raise ModelNotFound(name, f"no model {name}; served are {self._listed()}")
        chosen = version or list(versions)[-1 if self.policy == "newest" else 0]
        if chosen not in versions:
            raise ModelNotFound(
                f"{name}@{version}", f"no {name}@{version}; served are {self._listed()}"
            )
        return versions[chosen]

    def engines(self) -> list[Engine]:
        """All engines, sorted by name and then by age of version."""
        shelves = self._shelves()
        return [engine for name in sorted(shelves) for engine in shelves[name].values()]

    def known(self, name: str) -> bool:
        """Whether a model of that name is served."""
        return name in (self._engines or {})

    def close(self) -> None:
        """Ends all engines."""
        for engine in self.engines() if self._engines else []:
            engine.close()
        self._engines = None

    def _shelves(self) -> dict[str, dict[str, Engine]]:
        if self._engines is None:
            raise Unavailable("the models are still being loaded")
        return self._engines

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


def describe(engine: Engine, limits: Limits, default_alpha: float) -> ModelInfo:
    """What the engine's model takes, gives and promises."""
    manifest = engine.manifest
    density = manifest.graphs[Role.DENSITY]
    conditional = manifest.graphs.get(Role.CONDITIONAL)
    encode = manifest.graphs.get(Role.ENCODE)
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        shape=manifest.shape,
        levels=manifest.levels,
        labels=tuple(label.name for label in manifest.labels),
        priors=tuple(label.prior for label in manifest.labels),
        methods=tuple(sorted(full for method, full in METHODS.items() if engine.answers(method))),
        density_kind=density.kind,
        conditional_kind=conditional.kind if conditional else None,
        importance_samples=conditional.importance_samples if conditional else 0,
        latent_dimensions=int(encode.outputs[0].shape[-1]) if encode else 0,
        calibration_size=manifest.calibration.size,
        finest_alpha=engine.detector.finest_alpha,
        default_alpha=default_alpha,
        posterior_temperature=manifest.calibration.temperature,
        execution_providers=engine.providers,
        limits=limits,
        digest=engine.digest,
    )
