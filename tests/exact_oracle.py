"""Exact reference for linear-Gaussian models of any rank: rational numbers, so no rounding at all.

`exact` takes in one entry of an emission at a time (R diagonal) and decides every rank exactly:
an entry whose innovation variance is zero is zero, and a diffuse state is undetermined or it is
not. Numbers become floats at the very end. Plain Python integers inside; no JAX, no code of the
package. Meant for D <= 4, N <= 2, T <= 30.
"""

import math
from fractions import Fraction
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

ZERO, ONE = Fraction(0), Fraction(1)


class ExactPosterior(NamedTuple):
    """What `exact` returns, as floats; time leads, and names are those of `DensePosterior`.

    A state that the data do not determine has mean NaN, variance inf and covariances NaN.
    """

    log_likelihood: float
    filtered_means: np.ndarray
    filtered_covariances: np.ndarray
    smoothed_means: np.ndarray
    smoothed_covariances: np.ndarray
    lagged_covariances: np.ndarray  # Cov[z_t, z_{t+1} | y], T - 1 rows
    rank: int  # of the information on the diffuse effects
    left_out: np.ndarray  # entries whose innovation variance is exactly zero (T, N)
    contradicted: np.ndarray  # those of them whose residual is not zero (T, N)
    scale: float  # the largest variance that any state had, diffuse ones counted as one
    least: float  # the smallest positive innovation variance of an entry without error, or inf
    growth: float  # how much a perturbation of a covariance is amplified by the filter at most


def fractions(values):
    """Every float as the rational number that it is."""
    values = np.asarray(values, np.float64)
    out = np.empty(values.shape, object)
    for index in np.ndindex(values.shape):
        out[index] = Fraction(float(values[index]))
    return out


def _floats(values):
    return values.astype(np.float64)


def _logarithm(value):
    """Logarithm of a positive rational number, whatever its size."""
    return math.log(value.numerator) - math.log(value.denominator)


class _Entry(NamedTuple):
    """One entry of an emission with a positive innovation variance."""

    row: np.ndarray
    gain: np.ndarray
    residual: np.ndarray  # for delta = 0, then its change with each unit delta
    variance: Fraction
    error: Fraction  # variance of its error


class _Run(NamedTuple):
    """The filter for delta = 0 and for the change with each unit delta (columns)."""

    predicted: list  # (columns, covariance) at t given y_{1:t-1}
    filtered: list
    entries: list  # of every t, those taken in
    grams: list  # sums of residual residual^T / variance up to t
    left_out: np.ndarray
    contradicted: np.ndarray


def _start(model, diffuse, proper_part):
    """Mean columns and covariance of z_1.

    A diffuse effect is a proper one of variance `proper_part` plus a diffuse one: the limit is the
    same for every number, and no innovation variance is zero only because delta is held fixed.
    """
    D = len(model.m0)
    mean, cov = fractions(model.m0), fractions(model.P0)
    states = [i for i in range(D) if diffuse[i]]
    columns = np.full((D, 1 + len(states)), ZERO)
    columns[:, 0] = mean
    for column, i in enumerate(states):
        columns[i, 0] = ZERO
        columns[i, 1 + column] = ONE
        cov[i, :] = cov[:, i] = ZERO
        cov[i, i] = Fraction(proper_part)
    return columns, cov


def _run(model, emissions, diffuse, proper_part):
    """Filter, one entry at a time."""
    T, N, D = model.H.shape
    columns, cov = _start(model, diffuse, proper_part)
    F, c, Q, H, d, R = (fractions(x) for x in model[2:])
    assert all(R[t, i, j] == 0 for t in range(T) for i in range(N) for j in range(N) if i != j)
    run = _Run([], [], [], [], np.zeros((T, N), bool), np.zeros((T, N), bool))
    gram = np.full((columns.shape[1],) * 2, ZERO)
    for t in range(T):
        if t:
            columns, cov = F[t] @ columns, F[t] @ cov @ F[t].T + Q[t]
            columns[:, 0] = columns[:, 0] + c[t]
        run.predicted.append((columns, cov))
        taken = []
        for n in range(N):
            if np.isnan(emissions[t, n]):
                continue
            row = H[t, n]
            residual = -(row @ columns)
            residual[0] += Fraction(float(emissions[t, n])) - d[t, n]
            direction = cov @ row
            variance = row @ direction + R[t, n, n]
            if variance == 0:
                assert not any(residual[1:]), "an effect that P0 has cannot be new"
                run.left_out[t, n] = True
                run.contradicted[t, n] = residual[0] != 0
                continue
            gain = direction / variance
            columns = columns + np.outer(gain, residual)
            cov = cov - np.outer(gain, direction)
            gram = gram + np.outer(residual, residual) / variance
            taken.append(_Entry(row, gain, residual, variance, R[t, n, n]))
        run.filtered.append((columns, cov))
        run.entries.append(taken)
        run.grams.append(gram)
    return run


class _Effect:
    """Flat delta given residuals r_0 + E delta: J = E^T W E, and J delta = -E^T W r_0."""

    def __init__(self, gram):
        self.J, self.score = gram[1:, 1:], -gram[1:, 0]
        size = len(self.J)
        # Gauss-Jordan elimination of [J | score | I]: row operations that solve for any right side.
        table = np.concatenate([self.J, np.eye(size, dtype=int) * ONE], axis=1)
        pivots = []
        for column in range(size):
            rows = [i for i in range(len(pivots), size) if table[i, column] != 0]
            if not rows:
                continue
            k = len(pivots)
            table[[k, rows[0]]] = table[[rows[0], k]]
            table[k] = table[k] / table[k, column]
            for i in range(size):
                if i != k:
                    table[i] = table[i] - table[i, column] * table[k]
            pivots.append(column)
        self.rank = len(pivots)
        # A generalised inverse: the free effects are zero.
        self.inverse = np.full((size, size), ZERO)
        self.inverse[pivots] = table[: self.rank, size:]
        free = [j for j in range(size) if j not in pivots]
        self.null = np.full((size, len(free)), ZERO)
        for k, j in enumerate(free):
            self.null[j, k] = ONE
            self.null[pivots, k] = -table[: self.rank, j]
        self.mean = self.inverse @ self.score

    def undetermined(self, units):
        """Which rows of a change with delta do not vanish on what the data leave open."""
        return np.array([any(row @ self.null) for row in units], bool)

    def moments(self, columns, cov):
        """Integrate delta out of a state; returns floats."""
        units = columns[:, 1:]
        unknown = self.undetermined(units)
        mean = _floats(columns[:, 0] + units @ self.mean)
        cov = self.covariance(units, cov, units)
        mean[unknown] = cov[unknown] = cov[:, unknown] = np.nan
        cov[unknown, unknown] = np.inf
        return mean, cov

    def covariance(self, left, cov, right):
        """Covariance of two states, NaN where one of them is undetermined."""
        out = _floats(cov + left @ self.inverse @ right.T)
        out[self.undetermined(left)] = np.nan
        out[:, self.undetermined(right)] = np.nan
        return out

    def log_pseudo_determinant(self):
        """Logarithm of the product of the positive eigenvalues of J: the sum of its minors."""
        minors = (
            _determinant(self.J[np.ix_(rows, rows)])
            for rows in map(list, combinations(range(len(self.J)), self.rank))
        )
        return _logarithm(sum(minors, ZERO))


def _determinant(matrix):
    """Laplace expansion; at most 4 rows."""
    if not len(matrix):
        return ONE
    rest = np.arange(1, len(matrix))
    return sum(
        (-1) ** j
        * matrix[0, j]
        * _determinant(matrix[np.ix_(rest, np.delete(range(len(matrix)), j))])
        for j in range(len(matrix))
    )


def _log_likelihood(run, effect):
    r"""$\lim_{\kappa\to\infty}\log p(y\mid\delta\sim N(0,\kappa I))+\tfrac r2\log\kappa$."""
    if run.contradicted.any():
        return -math.inf
    variances = [entry.variance for taken in run.entries for entry in taken]
    square = run.grams[-1][0, 0] - effect.score @ effect.mean
    logs = math.fsum(map(_logarithm, variances)) + effect.log_pseudo_determinant()
    return 0.0 - 0.5 * (len(variances) * math.log(2 * math.pi) + float(square) + logs)


def _smooth(run, F):
    """Bryson-Frazier given delta: smoothed (columns, covariance), and covariances with the next."""
    T = len(run.filtered)
    D, width = run.filtered[0][0].shape
    vector, matrix = np.full((D, width), ZERO), np.full((D, D), ZERO)
    smoothed, lagged = [], []
    for t in reversed(range(T)):
        for entry in reversed(run.entries[t]):
            keep = np.eye(D, dtype=int) * ONE - np.outer(entry.gain, entry.row)
            vector = keep.T @ vector + np.outer(entry.row, entry.residual / entry.variance)
            matrix = keep.T @ matrix @ keep + np.outer(entry.row, entry.row) / entry.variance
        columns, cov = run.predicted[t]
        smoothed.append((columns + cov @ vector, cov - cov @ matrix @ cov))
        if t:
            carried = run.filtered[t - 1][1] @ F[t].T
            lagged.append(carried - carried @ matrix @ cov)
            vector, matrix = F[t].T @ vector, F[t].T @ matrix @ F[t]
    return smoothed[::-1], lagged[::-1]


def _largest_variance(model, diffuse):
    """The largest variance of any state before any emission; diffuse states start with one."""
    _, cov = _start(model, diffuse, 1)
    F, Q = fractions(model.F), fractions(model.Q)
    largest = max(np.diag(cov))
    for t in range(1, len(F)):
        cov = F[t] @ cov @ F[t].T + Q[t]
        largest = max(largest, *np.diag(cov))
    return float(largest)


def _growth(run, F):
    r"""Largest $\|\Phi\|^2$ of the transitions $\Phi$ of the filter's errors, from any s to any t.

    Where it is large, what rounding does to a covariance grows into the answer: with exact entries
    and states that nothing disturbs, the filter need not forget its start.
    """
    D = run.filtered[0][0].shape[0]
    products, largest = np.zeros((0, D, D)), 1.0
    for t, taken in enumerate(run.entries):
        step = np.array(F[t], np.float64) if t else np.eye(D)
        products = step @ products
        for entry in taken:
            keep = np.eye(D) - np.outer(_floats(entry.gain), _floats(entry.row))
            products = keep @ products
        largest = max(largest, np.max(np.sum(products**2, axis=(1, 2)), initial=0.0))
        products = np.concatenate([products, np.eye(D)[None]])
    return largest


def exact(model, emissions, diffuse=(), proper_part=1):
    """Every posterior moment of a model, exactly.

    Args:
        model: `oracles.Model` in float64, R diagonal; every number is taken for what it is.
        emissions: (T, N), NaN where missing.
        diffuse: which states of z_1 have a flat prior; none if empty.
        proper_part: the answer does not depend on it; see `_start`.
    """
    D = len(model.m0)
    diffuse = np.asarray(diffuse if np.size(diffuse) else np.zeros(D), bool)
    run = _run(model, np.asarray(emissions, np.float64), diffuse, proper_part)
    filtered = [
        _Effect(gram).moments(*given) for gram, given in zip(run.grams, run.filtered, strict=True)
    ]
    effect = _Effect(run.grams[-1])
    given, lagged = _smooth(run, fractions(model.F))
    smoothed = [effect.moments(*each) for each in given]
    lagged = [
        effect.covariance(given[t][0][:, 1:], cov, given[t + 1][0][:, 1:])
        for t, cov in enumerate(lagged)
    ]
    return ExactPosterior(
        _log_likelihood(run, effect),
        *(np.stack(x) for x in zip(*filtered, strict=True)),
        *(np.stack(x) for x in zip(*smoothed, strict=True)),
        np.array(lagged, np.float64).reshape(-1, D, D),
        effect.rank,
        run.left_out,
        run.contradicted,
        _largest_variance(model, diffuse),
        min((float(e.variance) for e in chain(*run.entries) if not e.error), default=math.inf),
        _growth(run, model.F),
    )
