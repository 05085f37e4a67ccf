"""From a training run to a bundle: export, calibrate, record golden outputs, compare."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from likely import bayes, noise
from likely.answers import Doubles, Labels, Pixels
from likely.bundle import MANIFEST, Bundle, Manifest, Role, write_manifest
from likely.bundle.signing import SIGNATURE
from likely.errors import BundleError, InvalidInput
from likely.graphs import Array, Device, Session
from likely.outliers import Detector
from likely_export import (
    attributes,
    calibrate,
    corruptions,
    directions,
    graphs,
    measures,
    roles,
)
from likely_export.calibrate import Seen
from likely_export.classifier import Classifier, fit_temperature
from likely_export.data import Dataset, Split
from likely_export.evaluate import BOUND, EVALUATION
from likely_export.graphs import Exported
from likely_export.recipes import Recipe
from likely_export.runs import Run
from likely_export.vae import VAE

BATCH = 16
COMPARED = 10_000
CALIBRATION = "calibration.npz"
LATENT = "latent.npz"
GOLDEN = "golden.npz"
WEIGHTS = "weights.bin"

Report = Callable[[str], None]


def build(run: Path, out: Path, report: Report = print) -> Manifest:
    """The manifest of the bundle that a trained run becomes.

    Args:
        run: a folder that `likely-export train` filled.
        out: where the bundle shall lie; an older bundle there is replaced.
        report: told what is being done.

    Raises:
        InvalidInput: the run is not complete, or a model's weights are of another training or
            other data than its recipe says.
        BundleError: a graph differs from its model, or `out` holds something else.
    """
    opened = Run.open(run)
    data = opened.recipe.data.load()
    with _replacing(out) as folder:
        exported = dict(_export(opened, data, folder, report))
        graphs.share([folder / each.graph.file for each in exported.values()], folder / WEIGHTS)
        made: dict[str, object] = {}
        if Role.DENSITY in exported:
            made |= _judged(opened.recipe, exported, data, folder, report)
        if {Role.ENCODE, Role.DECODE} <= set(exported):
            report("find directions")
            made |= _directions(opened.recipe, exported, data, folder)
        golden = {
            f"{role}/{name}": array
            for role, each in exported.items()
            for name, array in each.golden.items()
        }
        np.savez_compressed(folder / GOLDEN, **golden)  # type: ignore[arg-type]
        if (bound := _bound(opened, data)) is not None:
            (folder / EVALUATION).write_text(
                json.dumps({BOUND: bound}, indent=1, allow_nan=False) + "\n"
            )
        fields = {
            "name": opened.recipe.name,
            "version": opened.recipe.version,
            "description": opened.recipe.description,
            "shape": data.shape,
            "levels": data.levels,
            "labels": _labels(data) if _knows_labels(exported) else [],
            "graphs": {role: each.graph.model_dump() for role, each in exported.items()},
            **made,
            "golden": GOLDEN,
            "parity_nats": max(each.parity for each in exported.values()),
            "recipe": opened.recipe.published(),
            "data_digest": data.digest,
        }
        return write_manifest(folder, fields)


def _bound(run: Run, data: Dataset) -> dict[str, float] | None:
    """-log p(x) of the test part at most, of a VAE alone: no graph of its bundle gives it."""
    if Role.DENSITY in run.recipe.roles or Role.ENCODE not in run.recipe.roles:
        return None
    (name,) = run.recipe.models_of(Role.ENCODE)
    model = graphs.halved(run.model(name, data.digest))
    if not isinstance(model, VAE):
        return None
    part = data.test.x[:COMPARED], data.test.y[:COMPARED]
    with torch.no_grad():
        pairs = zip(*(torch.from_numpy(each).split(BATCH) for each in part), strict=True)
        nats = torch.cat([model.evaluate(x, y) for x, y in pairs])
    return measures.mean(nats.double().numpy())


def extend(
    bundle: Path, run: Path, out: Path, report: Report = print, version: str | None = None
) -> Manifest:
    """The manifest of a bundle that also has the discriminative model of a run.

    All else stays to the byte: what the bundle answered, it answers as before. Decisions were
    compared with torch's where the bundle was built; the new labels are not among them.

    Args:
        bundle: of the same data, divided likewise.
        run: a folder in which at least that model of the recipe was trained.
        out: where the new bundle shall lie; an older bundle there is replaced.
        report: told what is being done.
        version: of the new bundle; None for the old one's.

    Raises:
        InvalidInput: the run is of other data, or has no such model, or its weights are of
            another training; the bundle has no labels.
        BundleError: the graph differs from its model, or `out` holds something else.
    """
    opened, given = Run.open(run), Bundle.open(bundle)
    if Role.DISCRIMINATE not in opened.recipe.roles:
        raise InvalidInput(str(run), "its recipe has no model of the role discriminate")
    data = opened.recipe.data.load()
    if data.digest != given.manifest.data_digest:
        raise InvalidInput(opened.recipe.data.source, "is not what the bundle was made with")
    if not given.manifest.labels:
        raise InvalidInput(str(bundle), "has no labels, so there are none to tell apart")
    with _replacing(out) as folder:
        for name in given.manifest.files:
            shutil.copyfile(bundle / name, folder / name)
        report(f"export {Role.DISCRIMINATE}")
        exported = _exported(opened, Role.DISCRIMINATE, data, folder)
        golden = given.golden()
        golden |= {f"{Role.DISCRIMINATE}/{name}": a for name, a in exported.golden.items()}
        np.savez_compressed(folder / given.manifest.golden, **golden)  # type: ignore[arg-type]
        fields = _extended(given.manifest, opened.recipe, exported)
        return write_manifest(folder, fields | {"version": version or given.manifest.version})


def _extended(manifest: Manifest, recipe: Recipe, exported: Exported) -> dict[str, Any]:
    """The manifest's fields with the discriminative graph, and what it was trained by."""
    fields = manifest.model_dump(exclude={"files"})
    fields["graphs"][Role.DISCRIMINATE] = exported.graph.model_dump()
    fields["parity_nats"] = max(manifest.parity_nats, exported.parity)
    table = recipe.published()
    models = {name: table["models"][name] for name in recipe.models_of(Role.DISCRIMINATE)}
    named = {Role.DISCRIMINATE.value: table["roles"][Role.DISCRIMINATE]}
    own = fields["recipe"]
    fields["recipe"] = {
        **own,
        "models": {**own.get("models", {}), **models},
        "roles": {**own.get("roles", {}), **named},
    }
    return fields


def _judged(
    recipe: Recipe,
    exported: Mapping[Role, Exported],
    data: Dataset,
    folder: Path,
    report: Report,
) -> dict[str, object]:
    """What the manifest says of the calibration and of the decisions made by it."""
    report("calibrate")
    arrays, weights, temperature = _calibrate(recipe, exported, data, folder)
    np.savez_compressed(folder / CALIBRATION, **arrays)  # type: ignore[arg-type]
    report("compare decisions")
    compared, changed = _decisions(recipe, exported, data, folder, arrays, weights, temperature)
    return {
        "calibration": {
            "file": CALIBRATION,
            "size": len(data.calibrate),
            "temperature": temperature,
            "weights": weights,
            "statistics": exported[Role.DENSITY].source.widths,
        },
        "decisions_compared": compared,
        "decisions_changed": changed,
    }


def _directions(
    recipe: Recipe, exported: Mapping[Role, Exported], data: Dataset, folder: Path
) -> dict[str, object]:
    """What the manifest says of the directions, found on the fit split; nothing of none."""
    session = _session(folder, exported[Role.ENCODE])
    feeds: dict[str, Array] = {"x": data.fit.x}
    if session.spec.input("y") is not None:
        feeds["y"] = data.fit.y
    (features,) = _rows(session, feeds, ["mean"])
    measured = {
        name: attributes.measured(name, data.fit.x, data.levels)
        for name in recipe.latent.attributes
    }
    entries, arrays = directions.found(features, data.fit.y, data.labels, measured)
    if not entries:
        return {}
    np.savez_compressed(folder / LATENT, **arrays)  # type: ignore[arg-type]
    return {"latent": {"file": LATENT, "directions": entries}}


def _knows_labels(exported: Mapping[Role, Exported]) -> bool:
    """Whether a graph takes a label, or stands where labels may be judged."""
    return Role.DENSITY in exported or any(
        each.graph.input("y") is not None for each in exported.values()
    )


def _export(
    run: Run, data: Dataset, folder: Path, report: Report
) -> Iterator[tuple[Role, Exported]]:
    for role in run.recipe.roles:
        report(f"export {role}")
        yield role, _exported(run, role, data, folder)


def _exported(run: Run, role: Role, data: Dataset, folder: Path) -> Exported:
    models = [graphs.halved(run.model(name, data.digest)) for name in run.recipe.models_of(role)]
    for model in models:
        if isinstance(model, Classifier):
            fit_temperature(model, data.fit)
    source = roles.source(role, models, run.recipe.calibration.statistics)
    return graphs.export(source, folder / f"{role}.onnx", data.levels, len(data.labels))


def _calibrate(
    recipe: Recipe, exported: Mapping[Role, Exported], data: Dataset, folder: Path
) -> tuple[dict[str, Array], tuple[float, ...], float]:
    """The detector's arrays, the experts' weights and the posterior's temperature."""
    density = _session(folder, exported[Role.DENSITY])
    parts = recipe.calibration.parts
    corrupted = None
    if any(part.kind == "contrast" for part in parts):
        corrupted = _seen(density, _corrupted(recipe.calibration.contrast, data))
    columns = _columns(exported[Role.DENSITY].source.widths)
    labels = len(data.labels) if density.spec.output("label") else 1
    learnt = calibrate.combination(_seen(density, data.fit.x), parts, columns, corrupted, labels)
    ranked = _seen(density, data.calibrate.x)
    if Role.CONDITIONAL not in exported:
        return calibrate.detector(learnt, ranked), (), 1.0
    conditional = _session(folder, exported[Role.CONDITIONAL])
    priors = _priors(data)
    evidence = _evidence(conditional, data.fit)
    weights: tuple[float, ...] = ()
    if evidence.shape[1] > 1:
        weights, temperature = calibrate.expert_weights(evidence, data.fit.y, priors)
    else:
        temperature = calibrate.temperature(evidence[:, 0], data.fit.y, priors)
    pooled = bayes.pooled(_evidence(conditional, data.calibrate), np.array(weights or (1.0,)))
    posterior = bayes.posterior(pooled, priors, temperature)
    arrays = calibrate.detector(learnt, ranked, posterior, data.calibrate.y)
    return arrays, weights, temperature


def _decisions(
    recipe: Recipe,
    exported: Mapping[Role, Exported],
    data: Dataset,
    folder: Path,
    arrays: Mapping[str, Array],
    weights: tuple[float, ...],
    temperature: float,
) -> tuple[int, int]:
    """How many test pictures torch and ONNX Runtime judged, and how many they judge otherwise."""
    detector = Detector(arrays)
    x = data.test.x[:COMPARED]
    found = _seen(_session(folder, exported[Role.DENSITY]), x)
    module = exported[Role.DENSITY].source.module
    with torch.no_grad():
        parts = [module(part) for part in torch.from_numpy(x).split(BATCH)]
    statistics = np.concatenate([part[2].numpy() for part in parts])
    label = np.concatenate([part[3].numpy() for part in parts]) if len(parts[0]) > 3 else None
    ours, torchs = (
        detector.p_value(detector.score(s, y))
        for s, y in ((found.statistics, found.label), (statistics, label))
    )
    changed = np.zeros(len(x), bool)
    for alpha in recipe.calibration.alphas:
        changed |= (ours <= alpha) != (torchs <= alpha)
    if Role.CONDITIONAL in exported:
        session = _session(folder, exported[Role.CONDITIONAL])
        evidence = _evidence(session, Split(x, data.test.y[:COMPARED]))
        module = exported[Role.CONDITIONAL].source.module
        feeds = {"x": x}
        if (eps := session.spec.input("eps")) is not None:
            feeds["eps"] = np.array(noise.common(eps.array_shape(len(x))))
        with torch.no_grad():
            each = [
                module(*(torch.from_numpy(feed[at : at + BATCH]) for feed in feeds.values()))
                for at in range(0, len(x), BATCH)
            ]
        # Of several experts the second output, of a single one the first or only one.
        own = [e[1] if weights else (e[0] if isinstance(e, tuple) else e)[:, None] for e in each]
        ours_label, torchs_label = (
            _taken(one, weights, _priors(data), temperature)
            for one in (evidence, torch.cat(own).numpy())
        )
        changed |= torchs_label != ours_label
    if Role.DISCRIMINATE in exported:
        changed |= _relabelled(exported[Role.DISCRIMINATE], folder, x)
    return len(x), int(changed.sum())


def _taken(
    evidence: Array, weights: tuple[float, ...], priors: Doubles, temperature: float
) -> Labels:
    """The labels that a server would give for log p_e(x|y) (n, experts, labels), int64 (n,)."""
    pooled = bayes.pooled(evidence, np.array(weights or (1.0,)))
    return bayes.posterior(pooled, priors, temperature).argmax(1)


def _relabelled(exported: Exported, folder: Path, x: Pixels) -> npt.NDArray[np.bool_]:
    """Whether torch and ONNX Runtime take a picture for different labels, (n,)."""
    (found,) = _rows(_session(folder, exported), {"x": x}, ["log_pyx"])
    with torch.no_grad():
        parts = [exported.source.module(part) for part in torch.from_numpy(x).split(BATCH)]
    changed: npt.NDArray[np.bool_] = torch.cat(parts).numpy().argmax(1) != found.argmax(1)
    return changed


def _session(folder: Path, exported: Exported) -> Session:
    return Session(folder / exported.graph.file, exported.graph, Device("cpu"))


def _seen(density: Session, x: Pixels) -> Seen:
    """What the density graph says of pictures."""
    if density.spec.output("label") is None:
        (statistics,) = _rows(density, {"x": x}, ["statistics"])
        return Seen(statistics, np.zeros(len(x), np.int64))
    statistics, label = _rows(density, {"x": x}, ["statistics", "label"])
    return Seen(statistics, label)


def _corrupted(names: Sequence[str], data: Dataset) -> Pixels:
    """Fit pictures, each corrupted in one of these ways, as many as there are of them."""
    parts = np.array_split(data.fit.x, len(names))
    return np.concatenate(
        [
            corruptions.corrupt(name, part, data.levels)
            for name, part in zip(names, parts, strict=True)
        ]
    )


def _columns(widths: Mapping[str, int]) -> dict[str, npt.NDArray[np.int64]]:
    """Where each statistic's numbers stand."""
    ends = np.cumsum(list(widths.values()))
    return {
        name: np.arange(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def _evidence(conditional: Session, part: Split) -> Array:
    """log p_e(x|y) of a part, (n, experts, labels)."""
    feeds: dict[str, Array] = {"x": part.x}
    if (eps := conditional.spec.input("eps")) is not None:
        feeds["eps"] = noise.common(eps.array_shape(len(part)))
    if conditional.spec.output("evidence") is None:
        return _rows(conditional, feeds, ["log_pxy"])[0][:, None]
    return _rows(conditional, feeds, ["evidence"])[0]


def _rows(session: Session, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
    n = len(feeds["x"])
    parts = [
        session.run(
            {name: np.ascontiguousarray(feed[at : at + BATCH]) for name, feed in feeds.items()},
            outputs,
        )
        for at in range(0, n, BATCH)
    ]
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _labels(data: Dataset) -> list[dict[str, object]]:
    return [
        {"name": name, "prior": prior}
        for name, prior in zip(data.labels, _priors(data).tolist(), strict=True)
    ]


def _priors(data: Dataset) -> Doubles:
    """How often each label stands in the training part."""
    counts = np.bincount(data.train.y, minlength=len(data.labels))
    priors: Doubles = counts / counts.sum()
    return priors


@contextmanager
def rewriting(bundle: Path) -> Iterator[Path]:
    """A whole copy of a bundle, to be written to, that takes its place once all has gone well.

    Raises:
        BundleError: the bundle is signed.
    """
    check_unsigned(bundle)
    with _replacing(bundle) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        yield folder


def check_unsigned(bundle: Path) -> None:
    """Returns if no signature would cease to hold with a change of the bundle.

    Raises:
        BundleError: it is signed.
    """
    if (bundle / SIGNATURE).exists():
        raise BundleError(
            f"{bundle} is signed, and {SIGNATURE} would not hold for what is written to it: "
            "take the signature away first, and sign it again afterwards",
            "signature",
        )


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` once all has gone well.

    The old one is set aside beside it until the new one stands, so that no end of this process
    leaves neither.
    """
    if out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise BundleError(f"{out} exists and is no bundle; it is not replaced")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    staging.chmod(0o755)
    try:
        yield staging
        _exchange(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Puts a folder in the place of another, if there is one; where that fails, that one stays."""
    aside = new.with_name(f"{new.name}-old")
    if old.exists():
        old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        if aside.exists():
            aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
