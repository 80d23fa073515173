"""Random linear-Gaussian models whose matrices and data are exact in float64, of every rank.

Low-rank matrices made in floating point are not positive semidefinite, and then no answer is
right. Here factors have entries in {-1, -1/2, 0, 1/2, 1}, so that covariances are exact products,
and states and emissions are drawn from the model in rational arithmetic, so that exact data lie on
the model's own support to the last digit.

Everything but the shape and the diffuse states is data: ranks by columns of zeros, exact entries
by zeros in R, gaps by NaN. One compiled program serves all models of a shape.
"""

from fractions import Fraction
from functools import cache, partial
from typing import NamedTuple

import jax
import numpy as np

import elkax
from exact_oracle import ExactPosterior, exact, fractions
from oracles import Model, model_arrays
from problems import make_params

# (D, N, T): few, since every shape is a program for each form, backend and set of diffuse states.
SHAPES = {"two states": (2, 1, 12), "four states": (4, 2, 30), "one state": (1, 1, 1)}
DYNAMICS = ("permutation", "halved", "nilpotent", "singular", "triangular", "mixed")
# Variances of the emission entries, by name: without error, with, and one of each.
ERRORS = {"exact": (0.0, 0.0), "noisy": (0.25, 0.25), "one exact": (0.0, 0.25)}
VALUES = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])

# None is what runs when nothing is named.
BACKENDS = {
    "default": None,
    "sequential": elkax.Sequential(),
    "blocked": elkax.Blocked(4),
    "associative": elkax.Associative(),
}
FORMS = ("covariance", "square_root")
WAYS = [(backend, form) for backend in BACKENDS for form in FORMS]
FEW_WAYS = [("default", "covariance"), ("default", "square_root")]


def start(diffuse):
    """The argument `initial` for a set of diffuse states."""
    return elkax.ExactDiffuse(components=tuple(map(bool, diffuse))) if np.any(diffuse) else None


@cache
def compiled(function, backend, form, diffuse, **options):
    """A jitted function of the package, shared by every test that asks for the same one."""
    options |= {"backend": BACKENDS[backend], "form": form, "initial": start(diffuse)}
    return jax.jit(partial(getattr(elkax, function), **options))


def smooth(backend, form, diffuse=()):
    """The smoother, compiled once per shape; it gives the filter and the likelihood, too."""
    return compiled("lgssm_smoother", backend, form, diffuse)


class Kind(NamedTuple):
    """What is chosen about a model; the rest comes from its seed."""

    dynamics: str
    rank: int  # of the factor of Q
    start: int  # rank of the factor of P0
    errors: str
    gaps: float  # share of the entries that are missing


class Drawn(NamedTuple):
    """A model with its data."""

    params: object
    emissions: np.ndarray
    model: Model


def _signed_permutation(rng, D):
    return np.eye(D)[rng.permutation(D)] * rng.choice([-1.0, 1.0], D)[:, None]


def _dynamics(rng, kind, D):
    """Transition matrices whose powers grow slowly if at all, so that 30 steps stay exact."""
    if kind == "permutation":
        return _signed_permutation(rng, D)
    if kind == "halved":
        return _signed_permutation(rng, D) / 2
    if kind == "nilpotent":
        order = rng.permutation(D)
        return np.triu(rng.choice(VALUES, (D, D)), 1)[np.ix_(order, order)]
    if kind == "singular":
        return _signed_permutation(rng, D) * (rng.permutation(D) < max(D // 2, 1))
    if kind == "triangular":  # trends; powers grow like t^(D-1) at most
        return np.eye(D) + np.triu(rng.choice([0.0, 0.5, 1.0], (D, D)), 1)
    # Halves of a permutation that some rows are not halved in.
    return _signed_permutation(rng, D) * rng.choice([0.5, 1.0], D)[:, None]


def _factor(rng, D, rank):
    """A factor (D, D) with D - rank columns of zeros."""
    return rng.choice(VALUES, (D, D)) * (np.arange(D) < rank)


def _draw(rng, m0, start, F, noise, H, R, T):
    """Emissions (T, N) of the model itself, in rational arithmetic and exact in float64."""
    D, N = len(m0), len(R)
    F, H, m0, start, noise = (fractions(x) for x in (F, H, m0, start, noise))
    deviations = fractions(np.sqrt(R))  # 0 or 1/2
    z = m0 + start @ fractions(rng.integers(-2, 3, D))
    rows = []
    for t in range(T):
        if t:
            z = F @ z + noise @ fractions(rng.integers(-2, 3, D))
        rows.append(H @ z + deviations * fractions(rng.integers(-2, 3, N)))
    y = np.array(rows, object)
    out = y.astype(np.float64)
    assert all(Fraction(float(a)) == b for a, b in zip(out.flat, y.flat, strict=True)), "not exact"
    return out


def draw_model(shape, kind, seed, diffuse=()):
    """Draw a model of a kind, and emissions from it; diffuse states start at whole numbers."""
    D, N, T = shape
    rng = np.random.default_rng([seed, D, N, T])
    F = _dynamics(rng, kind.dynamics, D)
    noise, start = _factor(rng, D, kind.rank), _factor(rng, D, kind.start)
    H = rng.choice(VALUES, (N, D))
    H[:, rng.integers(D)] = rng.choice([-1.0, 1.0], N)  # no row of zeros
    R = np.array(ERRORS[kind.errors])[rng.permutation(2)][:N]
    m0 = rng.integers(-2, 3, D).astype(float)
    if np.any(diffuse):
        start = np.where(np.asarray(diffuse)[:, None], 0.0, start)
    params = make_params(m0, start @ start.T, F, noise @ noise.T, H, np.diag(R))
    far = np.where(np.asarray(diffuse), rng.integers(-9, 10, D), 0) if np.any(diffuse) else 0
    emissions = _draw(rng, m0 + far, start, F, noise, H, R, T)
    emissions[rng.random((T, N)) < kind.gaps] = np.nan
    return Drawn(params, emissions, model_arrays(params, T, dtype=np.float64))


def random_kind(shape, seed):
    """Every kind is about as likely as any other."""
    D = shape[0]
    rng = np.random.default_rng(seed)
    return Kind(
        dynamics=str(rng.choice(DYNAMICS)),
        rank=int(rng.integers(0, D + 1)),
        start=int(rng.integers(0, D + 1)),
        errors=str(rng.choice(list(ERRORS))),
        gaps=float(rng.choice([0.0, 0.2, 0.5])),
    )


def masks(shape):
    """Which states are diffuse: few choices, since each is a program."""
    D = shape[0]
    some = tuple(i % 2 == 0 for i in range(D))
    return {"proper": (), "diffuse": (True,) * D} | ({"partly": some} if D > 1 else {})


@cache
def case(shape_name, mask_name, seed):
    """Model number `seed` of a shape, and its exact posterior."""
    shape = SHAPES[shape_name]
    mask = masks(shape)[mask_name]
    drawn = draw_model(shape, random_kind(shape, seed), seed, mask)
    return drawn, solve(drawn, mask)


def solve(drawn, mask=()) -> ExactPosterior:
    """The exact posterior of a drawn model."""
    return exact(drawn.model, drawn.emissions, mask)


# Float64 rounds at 1e-16. An entry without error is divided by a variance as small as `LEAST` times
# the largest one, and thirty steps carry what that leaves on.
RTOL = 1e-9
LEAST = 1e-5
# How much the filter may amplify a perturbation of a covariance.
GROWTH = 1e4


def can_be_told(expected):
    """Whether rounding of the model's own numbers leaves an answer in float64.

    A decaying state that is measured without error may have a true variance below the rounding of
    the others'; and with exact entries and states that nothing disturbs, a filter need not forget
    its start, so that a perturbation at the last digit grows into the answer (1e28 times in thirty
    steps of one model). No method in this type has an answer then.
    """
    return expected.least >= LEAST * expected.scale and expected.growth <= GROWTH


def check_pattern(means, covariances, expected_means, expected_covariances, what):
    """Undetermined states: mean NaN, variance inf, covariances NaN; everything else finite."""
    for name, actual, wanted in (
        ("means", means, expected_means),
        ("covariances", covariances, expected_covariances),
    ):
        actual = np.asarray(actual)
        for sort in (np.isnan, np.isinf):
            differs = sort(actual) != sort(wanted)
            if differs.any():
                where = tuple(int(i) for i in np.argwhere(differs)[0])
                raise AssertionError(
                    f"{what} {name}{list(where)}: got {actual[where]}, expected {wanted[where]}; "
                    f"{differs.sum()} of {differs.size} differ in {sort.__name__}"
                )


def _close(actual, expected, bound, what):
    """Compare what is finite; `check_pattern` has compared the rest."""
    finite = np.isfinite(expected)
    error = np.where(finite, np.abs(np.asarray(actual) - np.where(finite, expected, 0)), 0)
    if not np.all(error <= bound):  # NaN fails
        where = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        where = tuple(int(i) for i in where)
        raise AssertionError(
            f"{what}{list(where)}: got {np.asarray(actual)[where]}, expected {expected[where]}, "
            f"allowed {bound:.1e}; {np.sum(~(error <= bound))} of {error.size} wrong"
        )


def check_moments(means, covariances, expected_means, expected_covariances, scale, what, rtol=RTOL):
    """Covariances relative to the largest variance of the model, means to the largest of either.

    Rounding of an update is relative to the variance before it, which reaches other states by F.
    """
    check_pattern(means, covariances, expected_means, expected_covariances, what)
    finite = expected_covariances[np.isfinite(expected_covariances)]
    variance = max(scale, np.max(np.abs(finite), initial=0.0))
    size = np.max(np.abs(expected_means[np.isfinite(expected_means)]), initial=0.0)
    _close(covariances, expected_covariances, rtol * variance, f"{what} covariances")
    _close(means, expected_means, rtol * (size + np.sqrt(variance)), f"{what} means")


def check_posterior(posterior, expected, rtol=RTOL):
    """Every field of dynamax's smoothed posterior against the exact one."""
    value = float(posterior.marginal_loglik)
    bound = rtol * (abs(expected.log_likelihood) + expected.left_out.size)
    if np.isinf(expected.log_likelihood):
        assert value == expected.log_likelihood, value
    else:
        _close(value, np.array(expected.log_likelihood), bound, "log-likelihood ")
    for what in ("filtered", "smoothed"):
        check_moments(
            *(getattr(posterior, f"{what}_{x}") for x in ("means", "covariances")),
            *(getattr(expected, f"{what}_{x}") for x in ("means", "covariances")),
            expected.scale,
            what,
            rtol,
        )
    # The pairs of neighbours, as one matrix of moments about the exact means.
    m = expected.smoothed_means
    lagged = np.asarray(posterior.smoothed_cross_covariances) - m[:-1, :, None] * m[1:, None, :]
    size = np.max(np.abs(m[np.isfinite(m)]), initial=0.0)
    wanted = expected.lagged_covariances
    check_pattern(m[:-1], lagged, m[:-1], wanted, "lag-one")
    finite = np.abs(expected.smoothed_covariances[np.isfinite(expected.smoothed_covariances)])
    variance = max(expected.scale, np.max(finite, initial=0.0))
    _close(lagged, wanted, rtol * (variance + size * (size + np.sqrt(variance))), "lag-one ")
