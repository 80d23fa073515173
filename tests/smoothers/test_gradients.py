"""Derivatives of the log-likelihood against finite differences of the dense reference.

The reference is a rational function of the covariances, finite for slightly indefinite ones too,
and runs in extended precision: its fourth-order differences are good to 1e-12, so what is measured
is the rounding of the derivative itself.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elkax
from oracles import LONG, dense, dense_log_likelihood, model_arrays
from problems import ar2, varying, with_inputs, with_missing
from smoothers.linear_checks import BACKENDS, FEW_WAYS, within

T = 5
ZERO = np.zeros((2, 2))
GAPS = {"rows": (2,), "entries": ((0, 1), (3, 0))}
small = partial(with_inputs, D=2, N=2, T=T)
POINTS = {
    "regular": small(),
    "zero Q": small(Q=ZERO),
    "zero Q and P0": small(Q=ZERO, P0=ZERO),
    "rank-one Q": small(Q=np.array([[1.0, 0.5], [0.5, 0.25]])),
    "missing": with_missing(small(), **GAPS),
    "missing, zero Q": with_missing(small(Q=ZERO), **GAPS),
    "one exact sensor": small(R=np.diag([0.0, 0.5])),
    "time-varying, missing": with_missing(varying(D=2, N=2, T=5), rows=(1,), entries=((3, 0),)),
    "AR(2), R = 0": ar2(T),
    "nine states": with_missing(small(D=9, Q=np.diag([0.0, *np.ones(8)])), **GAPS),
}
SAME_STRUCTURE = [name for name in POINTS if not name.startswith(("time-varying", "AR", "nine"))]
# The derivative is a sum of T terms of order one to a hundred; conditions are up to 1e3.
RTOL = 1e-9


def fourth_order(function, h):
    """First derivative at zero of a function of one number."""
    return (8 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12 * h)


def log_likelihood(problem, diffuse=()):
    rows = problem.emissions.shape[0]
    model = model_arrays(problem.params, rows, problem.inputs)
    return dense_log_likelihood(model, problem.emissions, diffuse)


def is_covariance(path):
    return path[-1].name == "cov"


@cache
def expected_gradient(name):
    """Derivatives of the reference; those of a covariance along symmetric directions."""
    problem = POINTS[name]
    leaves, tree = jax.tree_util.tree_flatten_with_path(problem.params)
    leaves = [(path, np.asarray(leaf).astype(LONG)) for path, leaf in leaves]
    gradients = []
    for k, (path, leaf) in enumerate(leaves):
        gradient = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            mirror = (*index[:-2], index[-1], index[-2]) if is_covariance(path) else index
            if mirror < index:
                gradient[index] = gradient[mirror]
                continue
            direction = np.zeros_like(leaf)
            direction[index] += LONG(0.5)
            direction[mirror] += LONG(0.5)

            def along(h, k=k, direction=direction):
                moved = [x + h * direction if i == k else x for i, (_, x) in enumerate(leaves)]
                return log_likelihood(problem._replace(params=tree.unflatten(moved)))

            gradient[index] = fourth_order(along, LONG(1e-4))
        gradients.append(gradient)
    return tree.unflatten(gradients)


def check_gradient(actual, name):
    expected = expected_gradient(name)
    scale = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))

    def check(path, got, want):
        got = np.asarray(got)
        if is_covariance(path):
            got = (got + np.swapaxes(got, -1, -2)) / 2
        # The largest entries decide: derivatives with respect to different parameters share sums.
        bound = RTOL * (np.abs(want) + 1e-2 * scale)
        within(got, want, bound, "gradient" + jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, actual, expected)


@cache
def gradient_function(backend, form):
    def value(params, emissions, inputs):
        return elkax.lgssm_marginal_log_prob(
            params, emissions, inputs, backend=BACKENDS[backend], form=form
        )

    return jax.jit(jax.grad(value))


@pytest.mark.parametrize("name", SAME_STRUCTURE)
@pytest.mark.parametrize("backend, form", FEW_WAYS)
def test_gradient(name, backend, form):
    """Every parameter, at regular points and where Q, P0 or a row of R is exactly zero."""
    check_gradient(gradient_function(backend, form)(*POINTS[name]), name)


@pytest.mark.parametrize(
    "name, backend, form",
    [
        ("time-varying, missing", "blocked", "square_root"),
        ("AR(2), R = 0", "blocked", "covariance"),
        ("nine states", "sequential", "square_root"),
        ("nine states", "blocked", "covariance"),
    ],
)
def test_gradient_of_other_structures(name, backend, form):
    """Parameters for every time step, without inputs, None among them; step by step from D = 9."""
    gradient = gradient_function(backend, form)(*POINTS[name])
    check_gradient(gradient, name)


def test_gradient_ignores_padding():
    """The gradient at a given length: zero, not NaN, in the padding and right before it."""
    name, length = "time-varying, missing", 5
    problem = POINTS[name]

    def pad(x):
        return jnp.concatenate([x, jnp.full((3, *x.shape[1:]), jnp.nan)])

    params = problem.params
    padded = params._replace(
        dynamics=jax.tree.map(pad, params.dynamics), emissions=jax.tree.map(pad, params.emissions)
    )
    value = partial(elkax.lgssm_marginal_log_prob, length=length)
    gradient = jax.jit(jax.grad(value))(padded, pad(problem.emissions), pad(problem.inputs))
    tail = jax.tree.map(lambda x: x[length:], (gradient.dynamics, gradient.emissions))
    for leaf in jax.tree.leaves(tail):
        np.testing.assert_array_equal(leaf, 0.0)
    head = jax.tree.map(lambda x: x[:length], (gradient.dynamics, gradient.emissions))
    check_gradient(gradient._replace(dynamics=head[0], emissions=head[1]), name)


def test_gradient_under_vmap():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(POINTS.get, SAME_STRUCTURE))
    value = partial(elkax.lgssm_marginal_log_prob, form="square_root")
    gradients = jax.jit(jax.vmap(jax.grad(value)))(*stacked)
    for i, name in enumerate(SAME_STRUCTURE):
        check_gradient(jax.tree.map(lambda x, i=i: x[i], gradients), name)


def test_gradient_of_many_states_under_vmap():
    """Step by step, against the score in blocks of time; not as many series as emissions."""
    problem = POINTS["nine states"]
    series = jnp.stack([problem.emissions + i for i in range(3)])

    def slope(scale, emissions, backend):
        def value(scale):
            params = problem.params
            moved = params.dynamics._replace(weights=scale * params.dynamics.weights)
            return elkax.lgssm_marginal_log_prob(
                params._replace(dynamics=moved), emissions, problem.inputs, backend=backend
            )

        return jax.grad(value)(scale)

    each = jax.jit(jax.vmap(slope, (None, 0, None)), static_argnums=2)
    ours, score = each(1.0, series, None), each(1.0, series, elkax.Blocked(2))
    np.testing.assert_allclose(ours, score, rtol=1e-9)


def test_gradient_with_respect_to_emissions_and_inputs():
    """Zero for what is missing, and the reference's differences for the rest."""
    problem = POINTS["missing, zero Q"]
    gradient = jax.grad(elkax.lgssm_marginal_log_prob, argnums=(1, 2))
    gradients = jax.jit(gradient)(*problem)
    for field, gradient in zip(("emissions", "inputs"), gradients, strict=True):
        data = np.asarray(getattr(problem, field)).astype(LONG)
        expected = np.zeros(data.shape)
        for index in np.ndindex(data.shape):
            direction = np.zeros_like(data)
            direction[index] = 1

            def along(h, field=field, data=data, direction=direction):
                return log_likelihood(problem._replace(**{field: data + h * direction}))

            expected[index] = fourth_order(along, LONG(1e-4))
        missing = np.isnan(data)
        np.testing.assert_array_equal(np.asarray(gradient)[missing], 0.0)
        within(gradient, expected, RTOL * (1 + np.max(np.abs(expected))), f"gradient.{field}")


@pytest.mark.parametrize("form", ["covariance", "square_root"])
def test_forward_mode(form):
    """A directional derivative equals the reference's gradient times the direction."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        x = rng.standard_normal(x.shape)
        return jnp.asarray(x + np.swapaxes(x, -1, -2)) if is_covariance(path) else jnp.asarray(x)

    def slope(problem, direction):
        def value(params):
            return elkax.lgssm_marginal_log_prob(params, *problem[1:], form=form)

        return jax.jvp(value, (problem.params,), (direction,))[1]

    slope = jax.jit(slope)
    for name in ("regular", "missing, zero Q"):
        direction = jax.tree_util.tree_map_with_path(draw, POINTS[name].params)
        terms = jax.tree.map(lambda g, v: np.sum(g * v), expected_gradient(name), direction)
        terms = np.array(jax.tree.leaves(terms))
        bound = RTOL * np.abs(terms).sum()
        within(slope(POINTS[name], direction), terms.sum(), bound, f"slope, {name} ")


def at(theta, problem):
    """A curve through the model: transition scaled, Q + q I, R scaled, start moved."""
    a, q, r, m = theta
    p = problem.params
    eye = np.eye(p.dynamics.cov.shape[-1])
    params = p._replace(
        initial=p.initial._replace(mean=p.initial.mean + m),
        dynamics=p.dynamics._replace(weights=p.dynamics.weights * a, cov=p.dynamics.cov + q * eye),
        emissions=p.emissions._replace(cov=p.emissions.cov * r),
    )
    return problem._replace(params=params)


THETA = (1.0, 0.0, 1.0, 0.0)


def in_long_double(problem):
    long = jax.tree.map(lambda x: np.asarray(x).astype(LONG), problem.params)
    return problem._replace(params=long)


@cache
def expected_hessian(name):
    """Nested fourth-order differences of the reference."""
    problem = in_long_double(POINTS[name])
    steps = np.eye(4, dtype=LONG)

    def second(i, j):
        def inner(h):
            return fourth_order(
                lambda k: log_likelihood(
                    at(np.array(THETA, LONG) + h * steps[i] + k * steps[j], problem)
                ),
                LONG(1e-3),
            )

        return float(fourth_order(inner, LONG(1e-4)))

    values = {(i, j): second(i, j) for i in range(4) for j in range(i + 1)}
    return np.array([[values[max(i, j), min(i, j)] for j in range(4)] for i in range(4)])


@pytest.mark.parametrize("form", ["covariance", "square_root"])
def test_hessian(form):
    """Forward over reverse, with Q positive, zero (one-sided in q) and missing entries."""

    def value(theta, problem):
        return elkax.lgssm_marginal_log_prob(*at(theta, problem), form=form)

    hessian = jax.jit(jax.hessian(value))
    for name in ("regular", "missing", "zero Q", "missing, zero Q"):
        actual, expected = hessian(jnp.array(THETA), POINTS[name]), expected_hessian(name)
        # Differences of differences are good to 1e-9 of the largest entry.
        within(actual, expected, 1e-8 * np.max(np.abs(expected)), f"Hessian, {name} ")


def test_hessian_in_reverse_over_reverse():
    def value(theta):
        return elkax.lgssm_marginal_log_prob(*at(theta, POINTS["missing"]))

    hessian = jax.jit(jax.jacrev(jax.jacrev(value)))
    expected = expected_hessian("missing")
    within(hessian(jnp.array(THETA)), expected, 1e-8 * np.max(np.abs(expected)), "Hessian ")


@pytest.mark.parametrize(
    "backend, form", [("sequential", "covariance"), ("blocked", "square_root")]
)
def test_gradient_of_smoothed_moments(backend, form):
    """Of means and covariances, right also where Q and P0 are exactly zero."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((T, 2)), rng.standard_normal((T, 2, 2))

    def weigh(posterior):
        means, covs = posterior.smoothed_means, posterior.smoothed_covariances
        return (weights[0] * means).sum() + (weights[1] * covs).sum()

    def value(theta, problem):
        options = {"backend": BACKENDS[backend], "form": form}
        return weigh(elkax.lgssm_smoother(*at(theta, problem), **options))

    gradient = jax.jit(jax.grad(value))
    for name in ("regular", "missing", "zero Q", "zero Q and P0", "missing, zero Q"):
        problem = POINTS[name]
        long, expected = in_long_double(problem), []
        for step in np.eye(4, dtype=LONG):

            def along(h, step=step, problem=long):
                moved = at(np.array(THETA, LONG) + h * step, problem)
                model = model_arrays(moved.params, T, moved.inputs)
                return weigh(dense(model, moved.emissions))

            expected.append(float(fourth_order(along, LONG(1e-4))))
        actual = gradient(jnp.array(THETA), problem)
        within(actual, np.array(expected), 1e-9 * (1 + np.max(np.abs(expected))), name)
