"""The statistics of report.py: pure functions of numbers, with the formula and its source."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


def sign_flip(differences):
    """Exact two-sided p of paired differences (Fisher 1935): the share of sign vectors s with
    |sum(s d)| >= |sum(d)|.

    Of each half of the pairs all signed sums are made; how many of the other half's fall short is looked up.
    """
    d = np.array(differences, dtype=float)
    limit = abs(d.sum()) - 1e-9
    halves = []
    for part in (d[::2], d[1::2]):
        sums = np.zeros(1)
        for value in part:
            sums = np.concatenate([sums + value, sums - value])
        halves.append(np.sort(sums))
    one, other = halves
    short = np.searchsorted(other, limit - one, "left") - np.searchsorted(other, -limit - one, "right")
    pairs = len(one) * len(other)
    return float((pairs - short.clip(0).sum()) / pairs)


def holm(values):
    """Holm's (1979) adjusted p-values:  max over j <= i of min(1, (m - j + 1) p_(j)).   values: {name: p}."""
    adjusted, highest = {}, 0.0
    for i, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(values) - i) * p))
        adjusted[name] = highest
    return adjusted


def half_width(values):
    """Half of the 95 % t interval of a mean:  t(n - 1) sd / sqrt(n), sd with n - 1; NaN of a single value."""
    n = len(values)
    if n < 2:
        return float("nan")
    return float(t.ppf(0.975, n - 1) * np.std(values, ddof=1)) / n**0.5


@dataclass
class Contrast:
    """Paired differences of one method, {(task, seed): d}, and what they say."""

    pairs: dict
    mean: float
    half: float             # of the t interval of the mean over pairs
    mean_of_seeds: float    # of the means of each seed, since pairs of a seed share data and structure,
    half_of_seeds: float    # and half of its t interval
    p: float                # of the exact sign-flip test
    holm: float = 1.0       # the same after Holm

    @property
    def above(self):
        return sum(d > 0 for d in self.pairs.values())


def contrasts(base, others):
    """{name: Contrast} of base - other over shared cells, where these are two or more; and Holm.
    base: {cell: score}.   others: {name: {cell: score}}, a family fixed beforehand.   A cell: (task, seed, maybe more).
    """
    found = {}
    for name, scores in others.items():
        pairs = {cell: base[cell] - scores[cell] for cell in base if cell in scores}
        if len(pairs) > 1:
            d = list(pairs.values())
            by_seed = defaultdict(list)
            for (_, seed, *_), value in pairs.items():
                by_seed[seed].append(value)
            means = [np.mean(values) for values in by_seed.values()]
            found[name] = Contrast(pairs, float(np.mean(d)), half_width(d), float(np.mean(means)), half_width(means),
                                   sign_flip(d))
    for name, p in holm({name: c.p for name, c in found.items()}).items():
        found[name].holm = p
    return found


def jaccard(a, b):
    """|a and b| / |a or b|, of two empty sets 1."""
    return len(a & b) / len(a | b) if a | b else 1.0


def jaccard_by_chance(a, b, pool):
    """Of two random sets as large, out of `pool`:  E|a and b| = |a| |b| / pool, put into the ratio."""
    both = len(a) * len(b) / pool
    return both / (len(a) + len(b) - both) if a or b else 1.0


def shown(values, digits=1):
    """mean ± standard deviation."""
    values = [v for v in values if v is not None]
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else "–"


def signed(value, digits=2):
    """+1.00, and a minus sign as in print."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")               # no −0.0


def interval(contrast):
    """The mean over seeds and, of two seeds or more, its interval: −3.38 [−5.69, −1.06]."""
    mean, half = contrast.mean_of_seeds, contrast.half_of_seeds
    return signed(mean) + (f" [{signed(mean - half)}, {signed(mean + half)}]" if half == half else "")
