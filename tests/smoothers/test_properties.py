"""What holds for every linear model: found by search over models of every rank."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import elkax
from oracles import LONG, Model, dense_log_likelihood
from random_models import (
    BACKENDS,
    DYNAMICS,
    ERRORS,
    FORMS,
    RTOL,
    SHAPES,
    Kind,
    can_be_told,
    check_pattern,
    check_posterior,
    compiled,
    draw_model,
    masks,
    smooth,
    solve,
    start,
)

# The same examples in every run; programs are compiled within the first, so no deadline. Failures
# are not shrunk: a model is small as it is, and its oracle takes a tenth of a second.
COMMON = {
    "derandomize": True,
    "phases": [Phase.explicit, Phase.generate],
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors],
}
FEW = settings(max_examples=20, **COMMON)
MANY = settings(max_examples=1000, **COMMON)
CASES = [(shape, mask) for shape in ("two states", "four states") for mask in masks((2, 1, 1))]


def kinds(num_states, errors):
    """Every kind of model; the rest is drawn from the seed."""
    size = st.integers(0, num_states)
    gaps = st.sampled_from([0.0, 0.2, 0.5])
    return st.builds(Kind, st.sampled_from(DYNAMICS), size, size, st.sampled_from(errors), gaps)


@cache
def solved(shape, kind, seed, diffuse):
    """A model and its exact posterior, shared by all tests that find the same one."""
    drawn = draw_model(shape, kind, seed, diffuse)
    return drawn, solve(drawn, diffuse)


def search(check, shape_name, mask_name, how, errors=tuple(ERRORS)):
    """Run `check(drawn, expected, diffuse)` on many models of a shape."""
    shape = SHAPES[shape_name]
    diffuse = masks(shape)[mask_name]

    @how
    @given(kinds(shape[0], errors), st.integers(0, 999))
    def run(kind, seed):
        drawn, expected = solved(shape, kind, seed, diffuse)
        assume(can_be_told(expected))
        check(drawn, expected, diffuse)

    run()


def check_equal(backend, form, drawn, expected, diffuse):
    check_posterior(smooth(backend, form, diffuse)(drawn.params, drawn.emissions), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape, mask", CASES)
def test_equals_the_exact_oracle(shape, mask, form):
    search(partial(check_equal, "default", form), shape, mask, FEW)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, mask", CASES)
def test_equals_the_exact_oracle_at_length(shape, mask, backend, form):
    search(partial(check_equal, backend, form), shape, mask, MANY)


def check_finite(form, drawn, expected, diffuse):
    """NaN where the data leave something open, and nowhere else."""
    posterior = smooth("default", form, diffuse)(drawn.params, drawn.emissions)
    assert np.isfinite(float(posterior.marginal_loglik)) == np.isfinite(expected.log_likelihood)
    for what in ("filtered", "smoothed"):
        names = f"{what}_means", f"{what}_covariances"
        check_pattern(
            *(getattr(posterior, x) for x in names), *(getattr(expected, x) for x in names), what
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape, mask", CASES)
def test_finite_wherever_the_oracle_is(shape, mask, form):
    search(partial(check_finite, form), shape, mask, FEW)


def check_variances(form, drawn, expected, diffuse):
    """Bands are square roots of variances: not even rounding may make one negative."""
    posterior = smooth("default", form, diffuse)(drawn.params, drawn.emissions)
    for what in ("filtered", "smoothed"):
        covariances = np.asarray(getattr(posterior, f"{what}_covariances"))
        variances = np.diagonal(covariances, axis1=1, axis2=2)
        assert np.all(variances >= 0), (what, np.min(variances))  # NaN fails, too


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape, mask", CASES)
def test_no_variance_is_negative(shape, mask, form):
    search(partial(check_variances, form), shape, mask, FEW)


def check_order(form, drawn, expected, diffuse):
    """Later data take variance away: filtered minus smoothed is positive semidefinite."""
    posterior = smooth("default", form, diffuse)(drawn.params, drawn.emissions)
    filtered, smoothed = (
        np.asarray(x) for x in (posterior.filtered_covariances, posterior.smoothed_covariances)
    )
    assert np.all(np.isfinite(expected.filtered_means) <= np.isfinite(expected.smoothed_means))
    for t, known in enumerate(np.isfinite(expected.filtered_means)):
        block = np.ix_(known, known)
        lost = filtered[t][block] - smoothed[t][block]
        least = np.min(np.linalg.eigvalsh(lost), initial=0.0) if np.isfinite(lost).all() else np.nan
        # Rounding is relative to the variances before the updates, as in `check_moments`.
        variance = max(expected.scale, np.max(np.abs(filtered[t][block]), initial=0))
        assert least >= -RTOL * variance, (t, least)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape, mask", CASES)
def test_smoothing_takes_variance_away(shape, mask, form):
    search(partial(check_order, form), shape, mask, FEW)


def check_backends(form, drawn, expected, diffuse):
    for backend in ("blocked", "associative"):
        check_equal(backend, form, drawn, expected, diffuse)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["proper", "diffuse"])
def test_every_backend_equals_the_exact_oracle(mask, form):
    search(partial(check_backends, form), "two states", mask, FEW)


# What the likelihood is differentiated by: matrices of the parameters, and the data.
PARTS = ("H", "F", "Q", "R", "y")


def gradient(form, diffuse, drawn):
    """Derivative in each of `PARTS`; compiled once per shape."""
    slopes, in_data = compiled_gradient(form, diffuse)(drawn.params, drawn.emissions)
    emissions, dynamics = slopes.emissions, slopes.dynamics
    parts = (emissions.weights, dynamics.weights, dynamics.cov, emissions.cov, in_data)
    return dict(zip(PARTS, map(np.asarray, parts), strict=True))


@cache
def compiled_gradient(form, diffuse):
    value = partial(elkax.lgssm_marginal_log_prob, form=form, initial=start(diffuse))
    return jax.jit(jax.grad(value, argnums=(0, 1)))


def directions(drawn):
    """One direction of each part, symmetric for covariances, zero where nothing was observed."""
    rng = np.random.default_rng(11)
    parts = {name: getattr(drawn.model, name)[-1] for name in PARTS[:-1]}
    parts["y"] = drawn.emissions
    out = {name: rng.standard_normal(value.shape) for name, value in parts.items()}
    for name in ("Q", "R"):
        out[name] = (out[name] + out[name].T) / 2
    out["y"] = np.where(np.isnan(drawn.emissions), 0.0, out["y"])
    return out


def slope(drawn, name, direction, diffuse):
    """Fourth-order difference of the dense oracle in extended precision."""
    long = Model(*(x.astype(LONG) for x in drawn.model))

    def value(h):
        if name == "y":
            return dense_log_likelihood(long, drawn.emissions + h * direction, diffuse)
        moved = getattr(long, name) + h * direction
        return dense_log_likelihood(long._replace(**{name: moved}), drawn.emissions, diffuse)

    h = LONG(1e-5)
    return float((8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h))


def check_gradient(form, drawn, expected, diffuse):
    """Regular models alone: where an entry is left out the likelihood jumps."""
    assume(not expected.left_out.any() and expected.rank == sum(diffuse))
    assume(expected.least >= 1e-2 * expected.scale)  # the differences step far less than that
    moves, found = directions(drawn), gradient(form, diffuse, drawn)
    for name in PARTS:
        ours = float(np.sum(found[name] * moves[name]))
        theirs = slope(drawn, name, moves[name], diffuse)
        size = float(np.linalg.norm(found[name]) * np.linalg.norm(moves[name]))
        # Differences leave the fifth derivative times 1e-20, and 1e-14 of rounding.
        assert abs(ours - theirs) <= 1e-7 * (1 + size), (name, ours, theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape, mask, errors",
    [
        ("two states", "proper", ("noisy",)),
        ("two states", "proper", ("exact",)),
        ("two states", "diffuse", ("noisy",)),
        ("two states", "partly", ("noisy",)),
    ],
)
def test_gradients_are_those_of_the_oracle(shape, mask, errors, form):
    search(partial(check_gradient, form), shape, mask, FEW, errors=errors)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["proper", "diffuse", "partly"])
def test_gradients_of_larger_models(mask, form):
    how = settings(max_examples=50, **COMMON)
    search(partial(check_gradient, form), "four states", mask, how, errors=("noisy",))


DRAWS = 4000


def check_draws(form, drawn, expected, diffuse):
    """Mean and covariance of what is determined, within six standard errors."""
    sample = compiled("lgssm_posterior_sample", "default", form, diffuse, num_samples=DRAWS)
    draws = np.asarray(sample(jax.random.key(5), drawn.params, drawn.emissions))
    mean, cov = expected.smoothed_means, expected.smoothed_covariances
    known = np.isfinite(mean)
    assert np.isfinite(draws[:, known]).all()
    variances = np.where(known, np.diagonal(cov, axis1=1, axis2=2), 0)
    size = expected.scale + np.max(variances) + np.max(np.abs(mean[known]), initial=0) ** 2
    floor = RTOL * (1 + size)
    off = np.abs(np.mean(draws, 0) - mean)[known]
    assert np.all(off <= 6 * np.sqrt(variances / DRAWS)[known] + floor), np.max(off)
    pairs = known[:, :, None] & known[:, None, :]
    centred = np.where(known, draws - np.where(known, mean, 0), 0)
    found = np.einsum("kti,ktj->tij", centred, centred) / DRAWS
    squares = variances[:, :, None] * variances[:, None, :] + np.where(pairs, cov, 0) ** 2
    off = np.abs(found - np.where(pairs, cov, 0))[pairs]
    assert np.all(off <= 6 * np.sqrt(squares / DRAWS)[pairs] + floor), np.max(off)


@pytest.mark.parametrize("mask, form", [("proper", "covariance"), ("partly", "square_root")])
def test_draws_have_the_moments(mask, form):
    search(partial(check_draws, form), "two states", mask, FEW)


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def check_single(form, drawn, expected, diffuse):
    """In float32, where the model's own numbers are exact in it and its answer is well told."""
    y = drawn.emissions
    assume(np.array_equal(y.astype(np.float32), y, equal_nan=True))
    assume(expected.growth <= 100 and expected.least >= 1e-2 * expected.scale)
    # An unknown that is halved in every step is soon below the rounding of what is known.
    assume(np.isfinite(expected.smoothed_means).all() or not np.any(np.abs(drawn.model.F) == 0.5))
    posterior = smooth("default", form, diffuse)(single(drawn.params), single(y))
    assert posterior.smoothed_means.dtype == jnp.float32
    # 1e-7 times the growth, and times the ratio of the largest variance to the smallest error's.
    check_posterior(posterior, expected, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape, mask", CASES)
def test_equals_the_exact_oracle_in_float32(shape, mask, form):
    search(partial(check_single, form), shape, mask, FEW)
