"""Smoothing from factor to factor, by rotations alone."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elkax.gaussian.costates import continues
from elkax.gaussian.factor import gram
from elkax.gaussian.markov import GaussMarkov, Transition
from elkax.gaussian.model import Model
from elkax.gaussian.output import FilterOutput
from elkax.gaussian.square_root import SquareRoot, Turn
from elkax.scan import Backend, lanes, run
from elkax.scan.lanes import matmul, matvec, transpose


class After(NamedTuple):
    """What a step back to t takes.

    Attributes:
        turn: how the noise at t turned into that at t + 1.
        mean: filtered mean at t.
        low: what rounding left out of it.
        factor: $L_{t|t}$.
        later: $L_{t+1|t+1}$.
    """

    turn: Turn
    mean: Array
    low: Array
    factor: Array
    later: Array


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["size", "form"])
@dataclass(frozen=True)
class Whitened(GaussMarkov):
    r"""The smoother in the coordinates $z_t = m_{t|t} + L_{t|t}x_t$, $x_t \sim N(0, I)$.

    A prediction turns the noise of both, $[F L_{t|t}, L_Q]\Theta = [L_+, 0]$ with an orthogonal
    $\Theta$, so that $x_t = \Theta_{11}w + \Theta_{12}v$ where $z_{t+1} = m_+ + L_+w$ and v is
    independent of all that comes later. A measurement gives $w = a + \Gamma x_{t+1}$, see
    `shrink_columns`. So $x_t = \Theta_{11}(a + \Gamma x_{t+1}) + \Theta_{12}v$: no weight is
    larger than one, nothing is solved with, and $L_+$ may be singular. The filter gives all of
    these, since a singular covariance has more than one factor.

    The output is the smoothed mean and covariance, and $\mathrm{Cov}[z_t, z_{t+1}]$.
    """

    def step(self, state: tuple[Array, Array], x: After) -> tuple[tuple[Array, Array], tuple]:
        """Step back."""
        transition = _transition(x.turn)
        after, _ = lanes.halves(state[1])
        state = self.apply(transition, state)
        weights, coordinates = lanes.halves(transition.weights)[0], lanes.halves(state[1])[0]
        spread = matmul(x.factor, coordinates)
        moved = matmul(x.factor, matmul(weights, after))
        lagged = matmul(moved, transpose(matmul(x.later, after)))
        mean = lanes.add(x.mean, lanes.add(x.low, matvec(x.factor, state[0])))
        return state, (mean, gram(spread), lagged)

    def absorb(self, summary: Transition, x: After) -> Transition:
        """Lengthen a block."""
        return self.combine(summary, _transition(x.turn))


def _transition(turn: Turn) -> Transition:
    """Compute the step of the coordinates."""
    turned, rest, gamma, shift = turn
    both = lanes.add_matrix(turned, lanes.add_matrix(gamma, lanes.product(turned, gamma)))
    both = lanes.materialize(both)
    weights = lanes.add_identity(jnp.ones_like(both[:, 0]), both)
    if not lanes.is_short(both.dtype):
        weights, _ = lanes.halves(weights)
    return Transition(weights, lanes.add(shift, matvec(turned, shift)), rest)


def smooth_by_factors(
    model: Model, filtered: FilterOutput, form: SquareRoot, backend: Backend | None
) -> tuple[Array, Array, Array]:
    """Compute smoothed means, covariances and, for t = 0, ..., T - 2, lag-one covariances.

    Args:
        model: the model, covariances themselves.
        filtered: the output of the turning filter, with factors of the covariances.
        form: how covariances are stored.
        backend: how to run the backward recurrence.
    """
    size = filtered.mean.shape[-1]
    # The end goes nowhere, and neither does padding: a rotation by nothing. Whether time t + 1
    # exists is known without data, so the filter is not asked.
    on = continues(model)

    def later(leaf: Array) -> Array:
        moved = jnp.concatenate((leaf[1:], jnp.zeros_like(leaf[:1])))
        if on is None:
            return moved
        return jnp.where(on.reshape((-1,) + (1,) * (leaf.ndim - 1)), moved, 0.0)

    factors = jnp.concatenate((filtered.cov[1:], filtered.cov[-1:]))
    if on is not None:
        factors = jnp.where(on[:, None, None], factors, filtered.cov)
    xs = After(
        jax.tree.map(later, filtered.turn),
        filtered.mean,
        filtered.low,
        filtered.cov,
        factors,
    )
    eye = jnp.eye(size, dtype=filtered.mean.dtype)
    start = (jnp.zeros_like(filtered.mean[-1]), form.exact(eye))
    _, (mean, cov, lagged) = run(
        Whitened(size, form), start, xs, backend=backend, state_dim=size, reverse=True
    )
    return mean, cov, lagged[:-1]
