"""What a linear-Gaussian model leaves undetermined, told before anything is differentiated."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.utils.bijectors import RealToPSDBijector
from jaxtyping import Array, Float

from elkax.models.free_parameters import FreeParameters
from elkax.smoothers.prepare import diffuse_mask

# More states than these are not looked at: their changes of basis are D^2 unknowns.
MOST_STATES = 20
DYNAMICS, EMISSIONS = ("dynamics", "weights"), ("emissions", "weights")
# In the order in which they are proposed to be frozen.
PLACES = (
    ("initial", "mean"),
    ("initial", "cov"),
    EMISSIONS,
    DYNAMICS,
    ("dynamics", "cov"),
    ("dynamics", "bias"),
    ("emissions", "bias"),
    ("dynamics", "input_weights"),
)

Place = tuple[str, str]


def refuse_unidentified(params: ParamsLGSSM, free: FreeParameters, *, has_prior: bool) -> None:
    """Refuse what has no standard errors, as far as parameters alone can tell.

    Args:
        params: constrained parameters.
        free: those of them that are trainable.
        has_prior: whether more than the likelihood speaks for the parameters.

    Raises:
        ValueError: if a trainable parameter has no unconstrained form, or the basis of the states
            is free and there is no prior.
    """
    if isinstance(free.theta, jax.core.Tracer):
        return
    for (group, name), constrainer in free.constrainers.items():
        value = getattr(getattr(params, group), name)
        if constrainer is not None and not np.all(np.isfinite(constrainer.inverse(value))):
            raise ValueError(
                f"{group}.{name} must be positive definite to have standard errors, got {value}; "
                f"freeze it (props.{group}.{name}.trainable = False)"
            )
    message = None if has_prior else _describe_free_basis(params, free.constrainers)
    if message:
        raise ValueError(message)


def refuse_undetermined(covariances: Float[Array, "*batch T D D"]) -> None:
    """Refuse smoothed states of which a variance is infinite, so that an estimate means nothing.

    Raises:
        ValueError: naming the states.
    """
    infinite = np.isinf(np.diagonal(np.asarray(covariances), axis1=-2, axis2=-1))
    states = np.flatnonzero(np.any(infinite.reshape(-1, infinite.shape[-1]), axis=0))
    if states.size:
        raise ValueError(
            f"the data do not determine the states {', '.join(map(str, states))} (counted from 0), "
            "which start exactly diffuse, so the parameters have no standard errors: leave these "
            "states out, or give them a proper initial variance"
        )


def _describe_free_basis(params: ParamsLGSSM, free: dict[Place, Any]) -> str | None:
    r"""Say what to freeze if the trainable parameters can follow a change of basis of the states.

    $z \to (I + A)z + a$ changes F by $AF - FA$, Q by $AQ + QA^\top$, H by $-HA$, and so on, and the
    likelihood not at all. What a frozen parameter changes by must be zero: each solution $(A, a)$
    of these equations that changes any other is a direction in which nothing can be estimated.

    Args:
        params: constrained parameters.
        free: place and constrainer of the trainable ones.

    Returns:
        The message, or None where there is no such direction, or where it cannot be told: for
        parameters that vary in time or are traced, constraints other than that of a covariance,
        or many states.
    """
    changes = _changes(params)
    usual = all(each is None or isinstance(each, RealToPSDBijector) for each in free.values())
    if changes is None or not usual:
        return None
    # Of a singular value: the rounding of parameters, or of the products whose root it is.
    tolerance = max(float(jnp.finfo(params.dynamics.cov.dtype).eps) ** (2 / 3), 1e-7)

    def narrow(directions: np.ndarray, frozen: set[Place]) -> np.ndarray:
        """Keep the directions that change no frozen parameter, and some other."""
        for rows, wanted in (
            ([changes[place] for place in changes if place in frozen], False),
            ([changes[place] for place in changes if place not in frozen], True),
        ):
            seen = [row @ directions for row in rows]
            empty = np.zeros((directions.shape[1],) * 2)
            values, vectors = np.linalg.eigh(sum((each.T @ each for each in seen), empty))
            directions = directions @ vectors[:, (values > tolerance**2) == wanted]
        return directions

    frozen = set(changes) - set(free)
    size = next(iter(changes.values())).shape[1]
    left = first = narrow(np.eye(size), frozen)
    remedy = []
    for place in PLACES:
        if place in changes and place in free and left.shape[1]:
            narrower = narrow(left, frozen | {place})
            if narrower.shape[1] < left.shape[1]:
                left, frozen = narrower, frozen | {place}
                remedy.append(place)
    if not first.shape[1]:
        return None
    moved = [
        place
        for place in PLACES
        if place in free and place in changes and np.max(np.abs(changes[place] @ first)) > tolerance
    ]
    switches = "; ".join(f"props.{group}.{name}.trainable = False" for group, name in remedy)
    return (
        f"the model is not identified: changes of basis of its states ({first.shape[1]} free "
        f"numbers) change {_names(moved)} and leave the likelihood as it is, so that these have no "
        f"standard errors; freeze what fixes the basis, such as {_names(remedy)}: {switches}"
    )


def _names(places: Sequence[Place]) -> str:
    names = [f"{group}.{name}" for group, name in places]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _changes(params: ParamsLGSSM) -> dict[Place, np.ndarray] | None:
    """Give what parameters change by: a matrix with a column for each entry of A, then of a.

    Parameters that are None count as zero. States are taken in units of their deviations, and every
    matrix is scaled to a largest entry of one.
    """
    values = {
        place: getattr(getattr(params, place[0]), place[1])
        for place in PLACES
        if getattr(getattr(params, place[0]), place[1]) is not None
    }
    if any(callable(value) or isinstance(value, jax.core.Tracer) for value in values.values()):
        return None
    known = {place: np.asarray(value, float) for place, value in values.items()}
    F, Q, H = known[DYNAMICS], known["dynamics", "cov"], known[EMISSIONS]
    size = F.shape[-1]
    if (F.ndim, Q.ndim, H.ndim) != (2, 2, 2) or size > MOST_STATES:
        return None
    diffuse = np.array(diffuse_mask(params.initial))
    P = np.where(diffuse[:, None] | diffuse, 0.0, known["initial", "cov"])
    m = np.where(diffuse, 0.0, known["initial", "mean"])
    b = known.get(("dynamics", "bias"), np.zeros(size))
    B = known.get(("dynamics", "input_weights"), np.zeros((size, 0)))
    variances = np.where(np.diagonal(Q) > 0, np.diagonal(Q), np.diagonal(P))
    s = np.sqrt(np.where(variances > 0, variances, 1.0))
    F, H, Q, P = F * s / s[:, None], H * s, Q / (s[:, None] * s), P / (s[:, None] * s)
    m, b, B = m / s, b / s, B / s[:, None]

    A = np.eye(size * size, size * size + size).T.reshape(-1, size, size)
    a = np.eye(size * size + size, size, -size * size)
    proper = ~diffuse
    found = {
        DYNAMICS: A @ F - F @ A,
        ("dynamics", "cov"): A @ Q + Q @ np.swapaxes(A, 1, 2),
        ("dynamics", "bias"): A @ b + a - a @ F.T,
        ("dynamics", "input_weights"): A @ B,
        EMISSIONS: -H @ A,
        ("emissions", "bias"): -a @ H.T,
        ("initial", "mean"): (A @ m + a)[:, proper],
        ("initial", "cov"): (A @ P + P @ np.swapaxes(A, 1, 2))[:, proper][:, :, proper],
        # What is diffuse stays among what is.
        ("initial", "diffuse"): A[:, proper][:, :, diffuse],
    }
    largest = {place: np.max(np.abs(x), initial=0.0) for place, x in found.items()}
    return {
        place: x.reshape(len(A), -1).T / largest[place]
        for place, x in found.items()
        if largest[place] > 0
    }
