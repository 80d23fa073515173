"""What a search for a maximum of the likelihood comes to, in words."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jaxtyping import PyTree

from elkax.gaussian import Covariance
from elkax.models.search import Point, Search
from elkax.smoothers import ExactDiffuse, Stationary
from elkax.smoothers.prepare import find_form

# Moved by one standard error towards its boundary, a number changes the slope by this share at most
# of what its curvature says. A maximum inside changes it by all of it.
FLAT = 0.1

FLOAT64 = 'compute in float64 (jax.config.update("jax_enable_x64", True))'


def names_of(theta: PyTree) -> list[str]:
    """Name the numbers of a pytree in the order of `jax.flatten_util.ravel_pytree`."""
    names = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(theta)[0]:
        for index in np.ndindex(np.shape(leaf)):
            place = f"[{', '.join(map(str, index))}]" if index else ""
            names.append(f"theta{jax.tree_util.keystr(path)}{place}")
    return names


def find_boundary(
    evaluate: Callable[[np.ndarray], Point], point: Point, hessian: np.ndarray
) -> np.ndarray:
    r"""Find the numbers that ran to a boundary, as the logarithm of a variance that is zero does.

    There the log-likelihood falls off as $ce^{a\theta}$: its slope and its curvature vanish
    together, so that their quotient, a Newton step, looks like any other. But one standard error
    further on nothing changes any more, where beside a maximum the slope is that of a parabola.

    Args:
        evaluate: negative log-likelihood and its gradient.
        point: where the search ended.
        hessian: of the negative log-likelihood there.

    Returns:
        (p,) bools. Takes one gradient for each number.
    """
    found = np.zeros(len(point.theta), bool)
    for i, (slope, curvature) in enumerate(zip(point.gradient, np.diagonal(hessian), strict=True)):
        if slope == 0.0 or not curvature > 0:
            continue
        distance = 1.0 / np.sqrt(curvature)
        # Far out a variance may be zero in floating point, and the likelihood not defined.
        for _ in range(4):
            theta = point.theta.copy()
            theta[i] -= np.sign(slope) * distance
            there = evaluate(theta)
            if there.is_finite():
                break
            distance /= 2
        moved = there.theta[i] - point.theta[i]
        if there.is_finite() and moved != 0.0:
            found[i] = (there.gradient[i] - slope) / moved < FLAT * curvature
    return found


def describe_end(
    search: Search, ending: str, tolerance: float, dtype: Any, form: str | None, notes: list[str]
) -> str:
    """Say whether the search converged, and if it did not, why and what to do."""
    gain = f"a further step is expected to gain {search.gain:.1e} nats"
    if ending == "converged":
        return "; ".join([f"converged: {gain}, within the tolerance of {tolerance:.1e}", *notes])
    remedies = ["start elsewhere"]
    if isinstance(find_form(form, dtype), Covariance):
        remedies.insert(0, 'use form="square_root"')
    if jnp.finfo(dtype).eps > 1e-10:
        remedies.insert(0, FLOAT64)
    if ending == "max_iters":
        cause = f"the {search.iterations} iterations allowed are used up"
        remedies.insert(0, "raise max_iters")
    else:
        cause = (
            f"no step after iteration {search.iterations} raised the log-likelihood by more than "
            f"{jnp.dtype(dtype).name} rounds, or all led to where it is not finite"
        )
    advice = f"what to do: {', or '.join(remedies)}"
    return "; ".join([f"not converged: {gain}, more than {tolerance:.1e}; {cause}", advice, *notes])


def describe_missing_errors(theta: PyTree, boundary: np.ndarray, unknown: np.ndarray) -> list[str]:
    """Say which numbers have no standard error, and why."""
    names, values = (
        np.array(names_of(theta)),
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta)]),
    )
    notes = []
    if np.any(boundary):
        each = ", ".join(
            f"{name} (now {value:.4g})"
            for name, value in zip(names[boundary], values[boundary], strict=True)
        )
        notes.append(
            f"{each} ran to the boundary, where the log-likelihood no longer depends on it, as the "
            "logarithm of a variance does whose best value is zero: it has no standard error, and "
            "those of the others hold for its value; set such a variance to zero in build and "
            "leave it out of theta"
        )
    if np.any(unknown):
        notes.append(
            f"the data do not determine {', '.join(names[unknown])}, which have no standard error: "
            "fix numbers in build until the rest is determined"
        )
    return notes


def describe_start(
    build: Callable[[Any], ParamsLGSSM],
    theta: PyTree,
    initial: Stationary | ExactDiffuse | None,
    point: Point,
) -> str:
    """Say why the log-likelihood is not finite where the search would start."""
    reason = _why_not_finite(build, theta, initial, point)
    return (
        "the log-likelihood and its gradient must be finite at the start, got "
        f"{-point.value} and {-point.gradient} at {point.theta}: {reason}"
    )


def _why_not_finite(
    build: Callable[[Any], ParamsLGSSM],
    theta: PyTree,
    initial: Stationary | ExactDiffuse | None,
    point: Point,
) -> str:
    groups = _arrays_of(build, theta)
    dynamics, emissions = groups["dynamics"], groups["emissions"]
    for group, values in (("dynamics", dynamics), ("emissions", emissions)):
        for name, value in values.items():
            if not np.all(np.isfinite(value)):
                return f"build gives {group}.{name} that is not finite there; start elsewhere"
    built = groups["initial"]
    stationary = isinstance(initial, Stationary)
    weights = dynamics.get("weights")
    if stationary and weights is not None:
        explosive = np.max(np.abs(np.linalg.eigvals(weights))) >= 1
    else:
        explosive = initial is None and any(np.any(np.isnan(value)) for value in built.values())
    if explosive:
        return (
            "the dynamics have no stationary distribution there, from which the states were to "
            "start; start from coefficients of a stationary process, such as zeros"
        )
    if point.value == np.inf:
        return (
            "the data contradict the model there (an observation without error, or variances "
            "that are zero in this type); start with larger variances"
        )
    return (
        f"parameters are finite there, and what is computed from them is not; {FLOAT64}, use "
        'form="square_root", start elsewhere, or look for values in the inputs that are not finite'
    )


def _arrays_of(build: Callable[[Any], ParamsLGSSM], theta: PyTree) -> dict[str, dict[str, Any]]:
    """Give the arrays built, by group and name."""

    def arrays(theta: PyTree) -> dict[str, dict[str, Any]]:
        return {
            group: {
                name: value
                for name, value in values._asdict().items()
                if value is not None and not callable(value)
            }
            for group, values in build(theta)._asdict().items()
        }

    # Traced, so that a component does not refuse the numbers before they can be looked at.
    return jax.tree.map(np.asarray, jax.jit(arrays)(theta))
