import numpy as np
import pytest

from elkax.models.search import Curvature, Point, Problem, Search, bounded_step, expected_gain

EPS = float(np.finfo(np.float64).eps)


def search_for(value, gradient, hessian, start, *, count=100, tolerance=1e-10, expected=None):
    """Search for the minimum of a function of NumPy arrays."""
    seen = []

    def evaluate(theta):
        seen.append(Point(theta, float(value(theta)), np.asarray(gradient(theta), float)))
        return seen[-1]

    def curvature(theta):
        size = len(theta)
        by_means = np.zeros((size, size)) if expected is None else np.diag(expected)
        zero = np.zeros((size, size))
        return Curvature(np.asarray(hessian(theta), float), by_means, zero, zero[0], np.array(1.0))

    problem = Problem(evaluate, curvature, count, EPS, tolerance, EPS)
    return Search(problem, evaluate(np.asarray(start, float))), seen


def quadratic(matrix, top):
    return (
        lambda x: 0.5 * (x - top) @ matrix @ (x - top),
        lambda x: matrix @ (x - top),
        lambda x: matrix,
    )


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_steps_are_the_same_in_other_units(unit):
    top = np.array([3.0, -2.0])
    matrix = np.array([[40.0, 10.0], [10.0, 9.0]])
    scale = np.array([unit, 1.0])
    functions = quadratic(matrix * scale[:, None] * scale, top / scale)
    search, seen = search_for(*functions, [0.0, 0.0])
    assert search.run(50) == "converged"
    reference, same = search_for(*quadratic(matrix, top), [0.0, 0.0])
    reference.run(50)
    np.testing.assert_allclose(search.point.theta * scale, top, rtol=1e-9)
    paths = (np.array([p.theta * s for p in each]) for each, s in ((seen, scale), (same, 1.0)))
    np.testing.assert_allclose(*paths, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("refused", [np.nan, np.inf, -np.inf])
def test_no_point_that_is_not_finite_is_accepted(refused):
    # A wall just behind the minimum, where the value is not finite and the gradient is zero.
    top, matrix = np.array([1.0]), np.array([[50.0]])
    value, gradient, hessian = quadratic(matrix, top)
    search, seen = search_for(
        lambda x: value(x) if x[0] < 1.001 else refused,
        lambda x: gradient(x) if x[0] < 1.001 else np.zeros(1),
        # Half of the curvature, so that steps go too far.
        lambda x: hessian(x) / 2,
        [-3.0],
    )
    assert search.run(100) == "converged"
    assert any(point.value == refused or np.isnan(point.value) for point in seen)
    np.testing.assert_allclose(search.point.theta, top, atol=1e-4)
    assert search.point.value == min(p.value for p in seen if p.is_finite())


def test_a_saddle_is_left_and_never_called_converged():
    # Minima at (+-1, 0); the start has no gradient.
    search, _ = search_for(
        lambda x: 25 * (x[0] ** 2 - 1) ** 2 + 50 * x[1] ** 2,
        lambda x: np.array([100 * x[0] * (x[0] ** 2 - 1), 100 * x[1]]),
        lambda x: np.diag([300 * x[0] ** 2 - 100, 100.0]),
        [0.0, 0.0],
    )
    assert search.gain > 1e-3
    assert search.run(50) == "converged"
    np.testing.assert_allclose(np.abs(search.point.theta), [1.0, 0.0], atol=1e-6)


def test_values_that_round_do_not_stop_the_search():
    """With noise of 1e-4 nats in the values, gradients still lead to the minimum."""
    matrix, top = np.array([[30.0, 5.0], [5.0, 2.0]]), np.array([0.2, 0.1])
    value, gradient, hessian = quadratic(matrix, top)
    search, _ = search_for(
        lambda x: np.float32(1000.0 + value(x)), gradient, hessian, [0.0, 0.0], tolerance=1e-9
    )
    search._problem = search._problem._replace(eps=float(np.finfo(np.float32).eps))
    assert search.run(50) == "converged"
    np.testing.assert_allclose(search.point.theta, top, atol=1e-5)


def test_a_curvature_that_is_not_finite_is_no_success():
    value, gradient, _ = quadratic(np.eye(1), np.zeros(1))
    search, _ = search_for(value, gradient, lambda x: np.full((1, 1), np.nan), [0.0])
    assert search.run(5) != "converged" and search.gain == np.inf


def test_gain_and_step_are_those_of_newton():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    hessian, gradient = root @ root.T + 0.1 * np.eye(4), rng.normal(size=4)
    newton = -np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(bounded_step(hessian, gradient, 1e3), newton, rtol=1e-9)
    gain = expected_gain(hessian, gradient, np.ones(4), EPS)
    np.testing.assert_allclose(gain, -0.5 * gradient @ newton, rtol=1e-9)
    # On the boundary of the region no other point has a lower value.
    hessian -= 2.0 * np.eye(4)
    step = bounded_step(hessian, gradient, 0.7)
    np.testing.assert_allclose(np.linalg.norm(step), 0.7)
    others = rng.normal(size=(2000, 4))
    others *= 0.7 * rng.uniform(size=(2000, 1)) ** 0.25 / np.linalg.norm(others, axis=1)[:, None]

    def model(s):
        return s @ gradient + 0.5 * np.einsum("...i,ij,...j->...", s, hessian, s)

    assert model(step) <= np.min(model(others))
