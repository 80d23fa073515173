"""What the tests of the linear-Gaussian smoothers share: backends, compiled calls, tolerances."""

from functools import cache, partial

import jax
import numpy as np

import elkax
from oracles import dense, model_arrays
from problems import contract_problems

# Four blocks divide none of the lengths in use, and T = 1 and 2 leave some of them out.
BACKENDS = {
    "sequential": elkax.Sequential(),
    "associative": elkax.Associative(),
    "blocked": elkax.Blocked(num_blocks=4),
}
FORMS = ("covariance", "square_root")
# The associative scan compiles longest, so it meets the contract in one form.
WAYS = [
    ("sequential", "covariance"),
    ("sequential", "square_root"),
    ("blocked", "covariance"),
    ("blocked", "square_root"),
    ("associative", "covariance"),
]
QUICK_WAYS = WAYS[:-1]
# Every backend and every form once, for shapes of which the full product would only cost compiles.
FEW_WAYS = [("sequential", "square_root"), ("blocked", "covariance")]

# Float64 rounds at 1e-16; problems here have condition numbers up to about 1e6.
RTOL = 1e-9
# A variance that an exact measurement removes keeps the rounding of the variance before it: 4 eps.
FLOOR = 1e-15 / RTOL


@cache
def compiled(function, backend, form, **options):
    """A jitted function of the package, shared by every test that asks for the same one."""
    function = partial(getattr(elkax, function), backend=BACKENDS[backend], form=form, **options)
    return jax.jit(function)


def smooth_to_length(backend, form, params, emissions, inputs, length):
    """The smoother with its length as an array argument."""
    return elkax.lgssm_smoother(
        params, emissions, inputs, backend=BACKENDS[backend], form=form, length=length
    )


@cache
def compiled_smoother(backend, form):
    """`smooth_to_length` jitted: the one program of the contract's problems and lengths."""
    return jax.jit(partial(smooth_to_length, backend, form))


@cache
def contract():
    return contract_problems()


@cache
def reference(name):
    return oracle(contract()[name])


def oracle(problem, diffuse=()):
    """Dense reference of a problem."""
    T = problem.emissions.shape[0]
    return dense(model_arrays(problem.params, T, problem.inputs), problem.emissions, diffuse)


def scales(means, covariances, prior):
    """Size of every mean: itself over the whole series, its sd, and what rounding leaves."""
    variances = np.diagonal(covariances, axis1=-2, axis2=-1)
    floor = FLOOR * np.diagonal(prior, axis1=-2, axis2=-1)
    sd = np.sqrt(np.maximum(variances, 0) + floor)
    return np.max(np.abs(means), axis=0) + sd, sd


def within(actual, expected, bound, what):
    """Assert |actual - expected| <= bound everywhere; NaN fails."""
    error = np.abs(np.asarray(actual) - expected)
    bound = np.broadcast_to(bound, error.shape)
    ok = error <= bound
    if not np.all(ok):
        worst = np.unravel_index(
            np.argmax(np.where(ok, 0, np.nan_to_num(error, nan=1e300))), ok.shape
        )
        raise AssertionError(
            f"{what}{list(map(int, worst))}: got {np.asarray(actual)[worst]}, expected "
            f"{expected[worst]}, allowed {bound[worst]:.1e}; {np.sum(~ok)} of {ok.size} wrong"
        )


def check_moments(means, covariances, expected_means, expected_covariances, prior, what, rtol=RTOL):
    """Means relative to their size, covariances to the product of the standard deviations."""
    mean_scale, sd = scales(expected_means, expected_covariances, prior)
    within(means, expected_means, rtol * mean_scale, f"{what} means")
    bound = rtol * sd[..., :, None] * sd[..., None, :]
    within(covariances, expected_covariances, bound, f"{what} covariances")


def check_log_likelihood(value, expected, num_timesteps, rtol=RTOL):
    # The sum has one term of order one for every step, which may cancel.
    within(value, np.asarray(expected), rtol * (abs(expected) + num_timesteps), "log-likelihood ")


def check_filtered(posterior, expected, rtol=RTOL):
    T = expected.filtered_means.shape[0]
    check_log_likelihood(posterior.marginal_loglik, expected.log_likelihood, T, rtol)
    check_moments(
        posterior.filtered_means,
        posterior.filtered_covariances,
        expected.filtered_means,
        expected.filtered_covariances,
        expected.prior_covariances,
        "filtered",
        rtol,
    )


def check_smoothed(posterior, expected, rtol=RTOL):
    """Every field of dynamax's smoothed posterior."""
    check_filtered(posterior, expected, rtol)
    moments = expected.smoothed_means, expected.smoothed_covariances, expected.prior_covariances
    check_moments(
        posterior.smoothed_means, posterior.smoothed_covariances, *moments, "smoothed", rtol
    )
    size, _ = scales(*moments)
    bound = rtol * size[:-1, :, None] * size[1:, None, :]
    within(posterior.smoothed_cross_covariances, expected.cross_moments, bound, "cross moments")
