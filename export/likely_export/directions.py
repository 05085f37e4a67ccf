"""Directions through latent features, found on pictures that trained no model.

Features z have the mean m_y and, around it, the covariance S within each label. A direction
is a step and a probe with probe . step = 1: the step moves features as is likeliest for what
it changes, S w for a probe along w, and the probe tells where features lie.

Of an attribute a, w is the linear regression of a on z within labels, constrained to
w . (m_y - m_y') = 0: so places along it are alike for all labels and, of features that are
Gaussian within labels, a step changes no label's odds. Where that leaves less than half of
what the regression explains, as in few dimensions, w is free. It moves the estimate of a by
one standard deviation of a within labels. Of a label, the step leads from the mean of the others
to its own, and w is that of Fisher's linear discriminant (1936).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from likely.answers import Doubles, Floats, Labels

KEPT = 0.5  # of the explained variance, for which the constraint is worth its price
RIDGE = 1e-3  # of the mean variance, so that features that stand still divide nothing
ALIKE = 1e-9  # of attributes or features: what differs by no more is the same
STILL = 1e-30  # a mean variance of features of which all stand still


def found(
    features: Floats, y: Labels, names: Sequence[str], attributes: Mapping[str, Doubles]
) -> tuple[list[dict[str, str]], dict[str, Doubles]]:
    """The directions' entries in the manifest, and the arrays of `likely.latent`.

    None of either where there is no attribute, and one label alone; none of what does not vary
    with the features.

    Args:
        features: (n, z).
        y: int64 (n,), their labels.
        names: of the labels.
        attributes: (n,) each, by name.
    """
    z = features.astype(np.float64)
    present = np.unique(y)
    means = {int(label): z[y == label].mean(0) for label in present}
    within = z - np.stack([means[int(label)] for label in y])
    covariance = within.T @ within / len(z)
    covariance += np.eye(z.shape[1]) * RIDGE * max(np.trace(covariance) / z.shape[1], STILL)
    apart = np.stack(list(means.values())) - z.mean(0)
    entries: list[dict[str, str]] = []
    ways: list[tuple[Doubles, Doubles, float]] = []
    for name, values in attributes.items():
        centred = (
            values
            - np.array([values[y == label].mean() for label in present])[
                np.searchsorted(present, y)
            ]
        )
        slope = _regression(covariance, within.T @ centred / len(z), apart)
        if not (float(centred.std()) > ALIKE and slope @ covariance @ slope > 0):
            continue
        probe = slope / float(centred.std())
        shift = covariance @ probe
        entries.append({"name": name, "kind": "attribute"})
        ways.append((shift / (probe @ shift), probe, -float(probe @ z.mean(0))))
    if len(present) > 1:
        for label, mean in means.items():
            others = z[y != label].mean(0)
            step = mean - others
            if not np.abs(step).max() > ALIKE:
                continue
            probe = np.linalg.solve(covariance, step)
            probe /= probe @ step
            entries.append({"name": f"label {names[label]}", "kind": "label"})
            ways.append((step, probe, -float(probe @ others)))
    if not ways:
        return [], {}
    steps, probes, offsets = zip(*ways, strict=True)
    arrays = {"steps": np.stack(steps), "probes": np.stack(probes), "offsets": np.array(offsets)}
    return entries, arrays


def _regression(covariance: Doubles, with_attribute: Doubles, apart: Doubles) -> Doubles:
    """w that minimises E(a - w . z)^2, under `apart` w = 0 unless that costs too much, (z,).

    Args:
        covariance: of z, (z, z).
        with_attribute: covariance of z and a, (z,).
        apart: what w is to be orthogonal to, (k, z).
    """
    free = np.linalg.solve(covariance, with_attribute)
    towards = np.linalg.solve(covariance, apart.T)
    slope = free - towards @ np.linalg.pinv(apart @ towards) @ (apart @ free)
    kept = slope @ covariance @ slope / max(float(free @ covariance @ free), 1e-12)
    chosen: Doubles = slope if kept >= KEPT else free.astype(np.float64)
    return chosen
