"""Directions through latent features, found on pictures that no model was trained on.

Features z have the mean m_y for each label y, and the covariance S within labels. A direction
consists of a step and a probe with probe . step = 1. The step is the likeliest change of
features that changes the probe's value, S w for a probe along w. The probe returns the
position of features along the direction.

For an attribute a, w is the linear regression of a on z within labels, constrained to
w . (m_y - m_y') = 0. Then positions are comparable across labels and, if features are Gaussian
within labels, a step changes no label's odds. If the constraint leaves less than half of the
variance that the regression explains, as in few dimensions, w is not constrained. A step moves
the estimate of a by one standard deviation of a within labels. For a label, the step leads from
the mean of all other labels to the label's own mean, and w is that of Fisher's linear
discriminant (1936).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from likely.answers import Doubles, Floats, Labels

MIN_KEPT_SHARE = 0.5  # least share of the explained variance that the constraint must leave
RIDGE = 1e-3  # of the mean variance; makes the covariance invertible if some features are constant
EQUALITY_TOLERANCE = 1e-9  # attributes or features that differ by no more count as equal
VARIANCE_FLOOR = 1e-30  # a floor of the mean variance, for features that are all constant


def find_directions(
    features: Floats, y: Labels, names: Sequence[str], attributes: Mapping[str, Doubles]
) -> tuple[list[dict[str, str]], dict[str, Doubles]]:
    """Returns the directions' entries in the manifest, and the arrays of `likely.latent`.

    There is no direction for an attribute that does not vary with the features, for a label whose
    mean is that of the others, or for the only label.

    Args:
        features: (n, z).
        y: labels of the pictures, int64 (n,).
        names: names of the labels.
        attributes: attributes of the pictures by name, (n,) each.
    """
    z = features.astype(np.float64)
    present = np.unique(y)
    means = {int(label): z[y == label].mean(0) for label in present}
    within = z - np.stack([means[int(label)] for label in y])
    covariance = within.T @ within / len(z)
    covariance += (
        np.eye(z.shape[1]) * RIDGE * max(np.trace(covariance) / z.shape[1], VARIANCE_FLOOR)
    )
    mean_offsets = np.stack(list(means.values())) - z.mean(0)
    entries: list[dict[str, str]] = []
    ways: list[tuple[Doubles, Doubles, float]] = []
    for name, values in attributes.items():
        centred = (
            values
            - np.array([values[y == label].mean() for label in present])[
                np.searchsorted(present, y)
            ]
        )
        slope = _regression(covariance, within.T @ centred / len(z), mean_offsets)
        if not (float(centred.std()) > EQUALITY_TOLERANCE and slope @ covariance @ slope > 0):
            continue
        probe = slope / float(centred.std())
        shift = covariance @ probe
        entries.append({"name": name, "kind": "attribute"})
        ways.append((shift / (probe @ shift), probe, -float(probe @ z.mean(0))))
    if len(present) > 1:
        for label, mean in means.items():
            others = z[y != label].mean(0)
            step = mean - others
            if not np.abs(step).max() > EQUALITY_TOLERANCE:
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


def _regression(covariance: Doubles, with_attribute: Doubles, constraints: Doubles) -> Doubles:
    """The w (z,) that minimises E(a - w . z)^2, with `constraints` w = 0 if that costs little.

    Args:
        covariance: covariance of z, (z, z).
        with_attribute: covariance of z and a, (z,).
        constraints: vectors to which w must be orthogonal, (k, z).
    """
    free = np.linalg.solve(covariance, with_attribute)
    towards = np.linalg.solve(covariance, constraints.T)
    slope = free - towards @ np.linalg.pinv(constraints @ towards) @ (constraints @ free)
    kept = slope @ covariance @ slope / max(float(free @ covariance @ free), 1e-12)
    chosen: Doubles = slope if kept >= MIN_KEPT_SHARE else free.astype(np.float64)
    return chosen
