"""Stiff models over 10,000 steps in float32, against float64 on the rounded model."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from oracles import model_arrays, sequential
from problems import constant_velocity, integrated_wiener, near_unit_root, precise_sensor

T = 10_000
BACKENDS = {
    "sequential": elkax.Sequential(),
    # As many as are chosen for this length.
    "blocks": elkax.Blocked(128),
    "four blocks": elkax.Blocked(4),
    "associative": elkax.Associative(),
}
FORMS = ("covariance", "square_root")
EPS = float(np.finfo(np.float32).eps)
PROBLEMS = {
    "constant velocity, dt = 0.01": lambda: constant_velocity(T, dt=0.01),
    "integrated Wiener, dt = 0.01": lambda: integrated_wiener(T, n=3, dt=0.01, noise=0.1),
    "measurement noise 1e-4": lambda: precise_sensor(T, ratio=1e-4),
    "near-unit root": lambda: near_unit_root(T, gap=1e-4, H=((1.0, 0.4), (0.0, 1.0))),
    "near-unit root, one mixture measured": lambda: near_unit_root(T, gap=1e-4),
}


def with_three_states(problem):
    """Add an independent, unmeasured third state to a model of two: one program for all models."""
    p = problem.params
    if p.initial.mean.shape == (3,):
        return problem

    def extend(matrix, corner):
        return jnp.pad(matrix, ((0, 1), (0, 1))).at[2, 2].set(corner)

    params = p._replace(
        initial=p.initial._replace(
            mean=jnp.append(p.initial.mean, 0), cov=extend(p.initial.cov, 1)
        ),
        dynamics=p.dynamics._replace(
            weights=extend(p.dynamics.weights, 0.5), cov=extend(p.dynamics.cov, 1)
        ),
        emissions=p.emissions._replace(weights=jnp.pad(p.emissions.weights, ((0, 0), (0, 1)))),
    )
    return problem._replace(params=params)


@cache
def rounded(name):
    """The problem in float32; the reference reads these rounded numbers as exact."""
    problem = with_three_states(PROBLEMS[name]())
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem)


@cache
def truth(name):
    """A float64 loop in Joseph form: 2e-14 of a variance and 2e-9 sd of a mean from the exact."""
    problem = rounded(name)
    return sequential(model_arrays(problem.params, T, dtype=np.float64), problem.emissions)


@cache
def compiled(backend, form):
    return jax.jit(partial(elkax.lgssm_smoother, backend=BACKENDS[backend], form=form))


@cache
def result(name, backend, form):
    return jax.device_get(compiled(backend, form)(*rounded(name)[:2]))


def variances(covariances):
    return np.diagonal(covariances, axis1=1, axis2=2)


@cache
def errors(name, backend, form):
    """Worst errors: variances relative, means in units of what is allowed, likelihood relative."""
    ours, true = result(name, backend, form), truth(name)
    found = {}
    for kind in ("filtered", "smoothed"):
        expected = variances(getattr(true, f"{kind}_covariances")).astype(float)
        actual = variances(getattr(ours, f"{kind}_covariances"))
        found[f"{kind} variance"] = np.max(np.abs(actual / expected - 1))
        means = getattr(true, f"{kind}_means").astype(float)
        allowed = np.maximum(0.05 * np.sqrt(expected), 100 * EPS * np.abs(means))
        found[f"{kind} mean"] = np.max(np.abs(getattr(ours, f"{kind}_means") - means) / allowed)
    value = float(true.log_likelihood)
    found["log-likelihood"] = abs(float(ours.marginal_loglik) - value) / (abs(value) + T)
    return found


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_nan_and_no_negative_variance(name, backend, form):
    posterior = result(name, backend, form)
    for leaf in posterior:
        assert leaf.dtype == np.float32
        assert np.all(np.isfinite(leaf))
    assert np.all(variances(posterior.filtered_covariances) > 0)
    assert np.all(variances(posterior.smoothed_covariances) > 0)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_means_within_their_uncertainty(name, backend, form):
    """Means within the larger of 0.05 posterior standard deviations and 100 eps of their size."""
    found = errors(name, backend, form)
    assert found["filtered mean"] <= 1 and found["smoothed mean"] <= 1, found


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_square_root_form_keeps_five_digits_of_every_variance(name, backend):
    found = errors(name, backend, "square_root")
    assert found["filtered variance"] <= 1e-5 and found["smoothed variance"] <= 1e-5, found


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_of_the_covariance_form(name, backend, record_property):
    """Recorded for the documentation; a loss of more than 2 % would be a defect, not rounding."""
    found = errors(name, backend, "covariance")
    for what, error in found.items():
        record_property(what, float(error))
    print(f"\n{name}, {backend}: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
    assert found["filtered variance"] <= 2e-2 and found["smoothed variance"] <= 2e-2, found


# In the units of `errors`: a few eps of a variance, of a mean (100 eps is one), of a sum.
FLOORS = {"variance": 8 * EPS, "mean": 0.05, "log-likelihood": 8 * EPS}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", list(BACKENDS)[1:])
def test_parallel_error_within_ten_times_the_sequential(name, backend, form):
    sequential_errors, parallel = errors(name, "sequential", form), errors(name, backend, form)
    for what, error in parallel.items():
        floor = next(value for key, value in FLOORS.items() if what.endswith(key))
        assert error <= 10 * sequential_errors[what] + floor, (what, error, sequential_errors[what])
